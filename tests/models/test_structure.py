"""Shared structure: 0 for what has nothing to do with each other, 1 for the same cells, in between for the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.embeddings import draw_embeddings

from lloki_atlas.errors import InputError
from lloki_atlas.models.step import Chunk
from lloki_atlas.models.structure import check_structure, shared_structure

NAMES = ("A|1", "B|2", "C|3")


def rows_of(platform: int, n: int = 200, seed: int = 0) -> np.ndarray:
    return draw_embeddings(n, platform, seed=seed).astype(np.float32)


def chunk(*parts: np.ndarray) -> Chunk:
    codes = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return Chunk(np.concatenate(parts), codes, codes)


ATLAS = chunk(*(rows_of(code) for code in range(3)))


def score(rows: np.ndarray, others: np.ndarray, seed: int = 0) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    return shared_structure(torch.from_numpy(rows), torch.from_numpy(others), generator=generator)


def gaussian_like(rows: np.ndarray) -> np.ndarray:
    """Cells with the mean and the covariance of others, and no kinds."""
    generator = np.random.default_rng(1)
    mixture = generator.normal(size=(200, len(rows))) / np.sqrt(len(rows))
    return (rows.mean(axis=0) + mixture @ (rows - rows.mean(axis=0))).astype(np.float32)


def test_the_same_cells_share_everything():
    assert score(rows_of(0), rows_of(0))[0] > 0.99


def test_platforms_with_the_same_kinds_of_cells_share_much():
    assert score(rows_of(3), rows_of(0))[0] > 0.3


@pytest.mark.parametrize("seed", range(3))
def test_random_directions_share_nothing(seed):
    random = np.random.default_rng(seed).normal(size=(200, 512)).astype(np.float32)
    found, error = score(random, rows_of(0))
    assert abs(found) < 3 * error + 0.02


def test_cells_of_other_kinds_share_nothing():
    # the same values in other dimensions: as many kinds, as far apart
    found, error = score(np.ascontiguousarray(rows_of(3)[:, ::-1]), rows_of(0))
    assert abs(found) < 3 * error + 0.02


def test_the_covariance_alone_is_no_structure():
    assert score(gaussian_like(rows_of(0)), rows_of(0))[0] < score(rows_of(3), rows_of(0))[0] / 3


def test_neither_offset_nor_scale_of_a_platform_counts():
    rows, others = rows_of(3), rows_of(0)
    expected = score(rows, others)[0]
    assert score(7 * rows + 3, others)[0] == pytest.approx(expected, abs=1e-3)
    assert score(rows, 7 * others - 3)[0] == pytest.approx(expected, abs=1e-3)


def test_the_error_grows_as_cells_get_fewer():
    errors = [score(rows_of(3, n), rows_of(0))[1] for n in (10, 40, 160)]
    assert errors[0] > errors[1] > errors[2] > 0


def check(rows: np.ndarray, atlas: Chunk = ATLAS, seed: int = 0) -> dict[str, float]:
    return check_structure("D|4", chunk(rows), atlas, names=NAMES, random_state=seed)


@pytest.mark.parametrize("n", [10, 200])
def test_a_platform_with_the_kinds_of_the_atlas_is_taken(n):
    found = check(rows_of(3, n))
    assert found["structure"] > 0.2
    assert found["structure_of_atlas"] > 0.2


@pytest.mark.parametrize("n", [10, 200])
def test_a_platform_with_other_kinds_is_refused(n):
    with pytest.raises(InputError, match=r"shares no structure with the atlas: .* \(A\|1, B\|2, C\|3\)"):
        check(np.ascontiguousarray(rows_of(3, n)[:, ::-1]))


def test_one_that_shares_less_than_any_of_the_atlas_is_taken_with_a_warning():
    noisy = rows_of(3) + np.random.default_rng(0).normal(size=(200, 512)).astype(np.float32) * 0.04
    with pytest.warns(UserWarning, match="shares less structure with the atlas .* than any of its platforms"):
        found = check(noisy)
    assert found["structure"] < found["structure_of_atlas"]


def test_an_atlas_of_one_platform_is_compared_with_its_halves():
    one = chunk(rows_of(0))
    assert check(rows_of(3), one)["structure_of_atlas"] > 0.2
    with pytest.raises(InputError, match="shares no structure"):
        check(np.ascontiguousarray(rows_of(3)[:, ::-1]), one)


def test_platforms_of_the_atlas_with_a_single_cell_are_no_measure():
    found = check(rows_of(3), chunk(rows_of(0), rows_of(1), rows_of(2, 1)))
    assert found["structure"] > 0.2


def test_the_same_seed_gives_the_same_numbers():
    assert check(rows_of(3)) == check(rows_of(3))
    assert check(rows_of(3)) != check(rows_of(3), seed=1)
