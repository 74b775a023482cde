"""The conditional autoencoder and its frozen encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lloki_atlas.errors import InputError
from lloki_atlas.models.autoencoder import ConditionalAutoencoder
from lloki_atlas.models.encoder import BLOCK_ROWS, FrozenEncoder

PLATFORMS = ["MERFISH|a", "Xenium|b", "CosMx|c"]


def spread_model() -> ConditionalAutoencoder:
    """A model whose weights are not the tame ones of the start."""
    model = ConditionalAutoencoder(PLATFORMS, random_state=3)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)
    return model


ENCODER = FrozenEncoder(spread_model())
CELLS = np.random.default_rng(0).normal(size=(700, 512)).astype(np.float32)
LATENTS = ENCODER.encode(CELLS, 1)


def as_bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32)


def test_encoder_and_decoder_have_the_published_numbers_of_weights():
    model = ConditionalAutoencoder(PLATFORMS)
    sizes = [sum(weight.numel() for weight in part.parameters()) for part in (model.encoder, model.decoder)]
    assert sizes == [201_391, 170_671]


def test_a_platform_adds_twenty_numbers():
    counts = [sum(weight.numel() for weight in ConditionalAutoencoder(PLATFORMS[:n]).parameters()) for n in (1, 2, 3)]
    assert np.diff(counts).tolist() == [20, 20]


def test_forward_gives_128_latents_and_512_reconstructed_numbers():
    latents, reconstructed = ConditionalAutoencoder(PLATFORMS)(torch.zeros(4, 512), torch.tensor([0, 1, 2, 0]))
    assert latents.shape == (4, 128)
    assert reconstructed.shape == (4, 512)


def test_latents_are_not_negative_and_reconstructions_may_be():
    latents, reconstructed = spread_model()(torch.from_numpy(CELLS[:50]), torch.zeros(50, dtype=torch.int64))
    assert latents.min() == 0
    assert reconstructed.min() < 0


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_the_token_joins_the_input_of_the_first_layer(part: str):
    model = spread_model().double()
    width = {"encode": 512, "decode": 128}[part]
    layers, tokens = {
        "encode": (model.encoder, model.encoder_tokens),
        "decode": (model.decoder, model.decoder_tokens),
    }[part]
    platform = torch.tensor([2, 0, 1, 1])
    values = torch.rand(4, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([values, tokens.weight[platform]], dim=1)
    for position, layer in enumerate(layers):
        expected = expected @ layer.weight.T + layer.bias
        if part == "encode" or position < 2:
            expected = expected.clamp(min=0)
    torch.testing.assert_close(getattr(model, part)(values, platform), expected, rtol=0, atol=1e-12)


def test_the_two_token_tables_are_different():
    model = ConditionalAutoencoder(PLATFORMS)
    assert not torch.equal(model.encoder_tokens.weight, model.decoder_tokens.weight)


def test_equal_seeds_give_equal_weights_and_others_do_not():
    one, same, other = (ConditionalAutoencoder(PLATFORMS, random_state=seed) for seed in (1, 1, 2))
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name])
    assert not torch.equal(one.encoder[0].weight, other.encoder[0].weight)


def test_making_a_model_leaves_the_global_random_state_alone():
    torch.manual_seed(4)
    before = torch.get_rng_state()
    ConditionalAutoencoder(PLATFORMS)
    assert torch.equal(before, torch.get_rng_state())


def test_weights_do_not_depend_on_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        model = ConditionalAutoencoder(PLATFORMS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("platforms", [[], ["a", "a"]])
def test_no_platform_or_a_repeated_one_is_refused(platforms: list[str]):
    with pytest.raises(InputError, match="platforms"):
        ConditionalAutoencoder(platforms)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 10.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_fresh_encoder_gives_no_cell_a_latent_of_zeros(scale: float, seed: int):
    encoder = FrozenEncoder(ConditionalAutoencoder(PLATFORMS, random_state=seed))
    cells = CELLS / np.linalg.norm(CELLS, axis=1, keepdims=True) * np.float32(scale)
    for platform in PLATFORMS:
        assert encoder.encode(cells, platform).max(axis=1).min() > 0


def test_encoding_gives_float32_of_128():
    assert LATENTS.shape == (700, 128)
    assert LATENTS.dtype == np.float32


def test_encoding_is_the_encoder_of_the_model():
    with torch.no_grad():
        expected = spread_model().double().encode(torch.from_numpy(CELLS).double(), torch.full((700,), 1))
    np.testing.assert_allclose(LATENTS, expected, atol=1e-4, rtol=1e-5)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 700))
def test_permuting_or_dropping_cells_changes_no_bit_of_the_others(seed: int, n: int):
    order = np.random.default_rng(seed).permutation(700)[:n]
    np.testing.assert_array_equal(as_bits(ENCODER.encode(CELLS[order], 1)), as_bits(LATENTS[order]))


def test_a_cell_has_the_same_bits_at_every_position_of_a_block():
    for position in range(BLOCK_ROWS):
        batch = np.roll(CELLS[:BLOCK_ROWS], position, axis=0)
        np.testing.assert_array_equal(as_bits(ENCODER.encode(batch, 1)[position]), as_bits(LATENTS[0]))


@pytest.mark.parametrize("size", [1, 7, 255, 256, 257, 512])
def test_any_batch_size_gives_the_same_bits(size: int):
    stop = min(700, 60 * size)
    parts = [ENCODER.encode(CELLS[start : min(start + size, stop)], 1) for start in range(0, stop, size)]
    np.testing.assert_array_equal(as_bits(np.concatenate(parts)), as_bits(LATENTS[:stop]))


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_threads_outside_change_no_bit_and_are_left_as_they_were(n_threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        np.testing.assert_array_equal(as_bits(ENCODER.encode(CELLS, 1)), as_bits(LATENTS))
        assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["fortran", "strided", "float16"])
def test_layout_of_the_input_does_not_matter(layout: str):
    cells = CELLS.astype(np.float16)
    given = {
        "fortran": np.asfortranarray(cells.astype(np.float32)),
        "strided": np.repeat(cells.astype(np.float32), 2, axis=0)[::2],
        "float16": cells,
    }[layout]
    np.testing.assert_array_equal(ENCODER.encode(given, 1), ENCODER.encode(cells.astype(np.float32), 1))


def test_rows_of_nan_give_rows_of_nan_and_leave_the_others():
    cells = CELLS.copy()
    cells[[0, 300]] = np.nan
    cells[5, 17] = np.nan
    found = ENCODER.encode(cells, 1)
    empty = np.isin(np.arange(700), [0, 5, 300])
    assert np.isnan(found[empty]).all()
    np.testing.assert_array_equal(as_bits(found[~empty]), as_bits(LATENTS[~empty]))


def test_no_cells_give_no_latents():
    assert ENCODER.encode(np.empty((0, 512), np.float32), 0).shape == (0, 128)


def test_a_name_and_its_number_are_the_same_platform():
    np.testing.assert_array_equal(ENCODER.encode(CELLS[:9], "Xenium|b"), ENCODER.encode(CELLS[:9], np.int64(1)))


def test_platforms_differ():
    assert not np.array_equal(ENCODER.encode(CELLS[:9], 0), ENCODER.encode(CELLS[:9], 1))


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
    np.testing.assert_array_equal(encoder.encode(CELLS[:9], 1), LATENTS[:9])


def test_freezing_leaves_the_model_trainable():
    model = spread_model()
    FrozenEncoder(model)
    assert all(weight.requires_grad for weight in model.parameters())
