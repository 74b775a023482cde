"""The frozen encoder: what it computes, and that nothing but a cell and its platform decides a cell's bytes."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.autoencoders import PLATFORMS, spread_model

from lloki_atlas.errors import InputError
from lloki_atlas.models.autoencoder import ConditionalAutoencoder
from lloki_atlas.models.encoder import BLOCK_ROWS, FrozenEncoder

N_CELLS = 2 * BLOCK_ROWS + 100
ENCODER = FrozenEncoder(spread_model())
CELLS = np.random.default_rng(0).normal(size=(N_CELLS, 512)).astype(np.float32)
LATENTS = ENCODER.encode(CELLS, 1)
PRECISIONS = ("float32", "bfloat16")


@cache
def encoder_of(precision: str) -> FrozenEncoder:
    return FrozenEncoder(spread_model(), precision=precision)


def as_bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32)


def same_bits(one: np.ndarray, other: np.ndarray) -> None:
    np.testing.assert_array_equal(as_bits(one), as_bits(other))


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = (part.astype(np.float64) for part in (one, other))
    return (one * other).sum(axis=1) / (np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1))


def test_encoding_gives_float32_of_128():
    assert LATENTS.shape == (N_CELLS, 128)
    assert LATENTS.dtype == np.float32


@pytest.mark.parametrize("platform", range(len(PLATFORMS)))
def test_encoding_is_the_encoder_of_the_model(platform: int):
    with torch.no_grad():
        expected = spread_model().double().encode(torch.from_numpy(CELLS).double(), torch.full((N_CELLS,), platform))
    np.testing.assert_allclose(ENCODER.encode(CELLS, platform), expected, atol=1e-4, rtol=1e-5)


def test_large_biases_cost_no_accuracy():
    model = spread_model()
    with torch.no_grad():
        for layer in model.encoder:
            layer.bias.mul_(100)
    with torch.no_grad():
        expected = model.double().encode(torch.from_numpy(CELLS).double(), torch.full((N_CELLS,), 0)).numpy()
    found = FrozenEncoder(model.float()).encode(CELLS, 0)
    np.testing.assert_allclose(found, expected, atol=1e-6 * expected.max(), rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 10.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_fresh_encoder_gives_no_cell_a_latent_of_zeros(scale: float, seed: int):
    encoder = FrozenEncoder(ConditionalAutoencoder(PLATFORMS, random_state=seed))
    cells = CELLS / np.linalg.norm(CELLS, axis=1, keepdims=True) * np.float32(scale)
    for platform in PLATFORMS:
        assert encoder.encode(cells, platform).max(axis=1).min() > 0


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), n=st.integers(1, N_CELLS), n_threads=st.integers(1, 3))
def test_permuting_or_dropping_cells_changes_no_bit_of_the_others(seed: int, n: int, n_threads: int):
    order = np.random.default_rng(seed).permutation(N_CELLS)[:n]
    same_bits(ENCODER.encode(CELLS[order], 1, n_threads=n_threads), LATENTS[order])


def test_a_cell_has_the_same_bits_at_every_position_of_a_block():
    for position in range(BLOCK_ROWS):
        batch = np.roll(CELLS[:BLOCK_ROWS], position, axis=0)
        same_bits(ENCODER.encode(batch, 1)[position], LATENTS[0])


@pytest.mark.parametrize("size", [1, 7, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, 2 * BLOCK_ROWS])
def test_any_batch_size_gives_the_same_bits(size: int):
    stop = min(N_CELLS, 60 * size)
    parts = [ENCODER.encode(CELLS[start : min(start + size, stop)], 1) for start in range(0, stop, size)]
    same_bits(np.concatenate(parts), LATENTS[:stop])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_own_threads_change_no_bit(precision: str):
    # enough cells for every thread to have some
    cells = np.tile(CELLS, (6, 1)).astype(np.float16)
    encoder = encoder_of(precision)
    alone = encoder.encode(cells, 2)
    same_bits(alone[:N_CELLS], alone[-N_CELLS:])
    for n_threads in (2, 3):
        same_bits(encoder.encode(cells, 2, n_threads=n_threads), alone)


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_threads_outside_change_no_bit_and_are_left_as_they_were(n_threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        same_bits(ENCODER.encode(CELLS, 1), LATENTS)
        assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)


def test_another_platform_in_the_model_changes_no_bit_of_the_others():
    model, larger = spread_model(), spread_model((*PLATFORMS, "MERSCOPE|d", "STARmap|e"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            larger.get_parameter(name)[: len(weight)] = weight
    for platform in PLATFORMS:
        same_bits(FrozenEncoder(larger).encode(CELLS[:9], platform), ENCODER.encode(CELLS[:9], platform))


@pytest.mark.parametrize("layout", ["fortran", "strided", "float16", "float64", "read-only", "list"])
def test_layout_of_the_input_does_not_matter(layout: str):
    half = CELLS[:700].astype(np.float16)
    cells = half.astype(np.float32)
    read_only = cells.copy()
    read_only.setflags(write=False)
    given = {
        "fortran": np.asfortranarray(cells),
        "strided": np.repeat(cells, 2, axis=0)[::2],
        "float16": half,
        "float64": cells.astype(np.float64),
        "read-only": read_only,
        "list": cells.tolist(),
    }[layout]
    same_bits(ENCODER.encode(given, 1), ENCODER.encode(cells, 1))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_give_rows_of_nan_and_leave_the_others(value: float, precision: str):
    cells, encoder = CELLS.astype(np.float16), encoder_of(precision)
    expected = encoder.encode(cells, 1)
    empty = np.isin(np.arange(N_CELLS), [0, 5, BLOCK_ROWS + 3, N_CELLS - 1])
    cells[empty, 17] = value
    cells[0] = value
    found = encoder.encode(cells, 1)
    assert np.isnan(found[empty]).all()
    same_bits(found[~empty], expected[~empty])


def test_what_relu_hides_is_still_seen_not_to_be_finite():
    model, cells = spread_model(), CELLS[:3].copy()
    with torch.no_grad():
        model.encoder[0].weight[:, 17] = -1.0
    cells[1, 17] = np.inf
    np.testing.assert_array_equal(np.isnan(FrozenEncoder(model).encode(cells, 0)).all(axis=1), [False, True, False])


def test_no_cells_give_no_latents():
    assert ENCODER.encode(np.empty((0, 512), np.float32), 0).shape == (0, 128)


def test_a_name_and_its_number_are_the_same_platform():
    same_bits(ENCODER.encode(CELLS[:9], "Xenium|b"), ENCODER.encode(CELLS[:9], np.int64(1)))


def test_platforms_differ():
    assert not np.array_equal(ENCODER.encode(CELLS[:9], 0), ENCODER.encode(CELLS[:9], 1))


def test_bfloat16_turns_no_latent_by_more_than_rounding():
    found = encoder_of("bfloat16").encode(CELLS, 1)
    assert found.dtype == np.float32
    assert not np.array_equal(found, LATENTS)
    assert cosines(found, LATENTS).min() > 0.9995


@pytest.mark.parametrize("precision", PRECISIONS)
def test_latents_made_as_tensors_are_those_of_the_blocks(precision: str):
    cells, encoder = CELLS[:50].copy(), encoder_of(precision)
    cells[7, 3] = -np.inf
    found, expected = encoder.encode_tensor(torch.from_numpy(cells), "CosMx|c").numpy(), encoder.encode(cells, 2)
    np.testing.assert_allclose(found, expected, atol={"float32": 1e-4, "bfloat16": 0.5}[precision], rtol=1e-2)


def test_an_unknown_precision_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="'half': choose from float32, bfloat16"):
        FrozenEncoder(spread_model(), precision="half")


@pytest.mark.parametrize("platform", ["Xenium|z", 3, -1])
def test_an_unknown_platform_is_refused_with_the_known_ones(platform: str | int):
    with pytest.raises(InputError, match=r"MERFISH\|a, Xenium\|b, CosMx\|c.*to add one, train"):
        ENCODER.encode(CELLS[:1], platform)


@pytest.mark.parametrize("shape", [(512,), (3, 511), (3, 512, 1)])
def test_embeddings_of_another_shape_are_refused(shape: tuple[int, ...]):
    with pytest.raises(InputError, match="512"):
        ENCODER.encode(np.zeros(shape, np.float32), 0)


def test_encoding_changes_neither_the_model_nor_the_input():
    model = spread_model()
    encoder, cells = FrozenEncoder(model), CELLS.copy()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    encoder.encode(cells, 0)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    np.testing.assert_array_equal(cells, CELLS)


def test_training_the_model_on_does_not_reach_its_frozen_encoder():
    model = spread_model()
    encoder = FrozenEncoder(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    same_bits(encoder.encode(CELLS[:9], 1), LATENTS[:9])


def test_freezing_leaves_the_model_trainable():
    model = spread_model()
    FrozenEncoder(model)
    assert all(weight.requires_grad for weight in model.parameters())
