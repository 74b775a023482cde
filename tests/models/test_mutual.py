"""All mutual neighbours of all pairs of platforms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lloki_atlas.models import mutual
from lloki_atlas.models.mutual import mutual_neighbors
from lloki_atlas.models.workers import PART_ROWS, Workers

PLATFORM = np.random.default_rng(5).permutation(np.repeat([4, 0, 9], [30, 12, 50]))


def rows(n: int = len(PLATFORM), d: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32))


def expected(values: torch.Tensor, platform: np.ndarray, k: int) -> list[set[tuple[int, int]]]:
    """The mutual pairs of each pair of platforms, from full sorts in float64."""
    unit = values.numpy().astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines, found = unit @ unit.T, []
    codes = np.unique(platform)
    for place, code in enumerate(codes):
        for other in codes[place + 1 :]:
            left, right = np.flatnonzero(platform == code), np.flatnonzero(platform == other)
            nearest = {i: set(right[np.argsort(-cosines[i, right])[:k]]) for i in left}
            nearest |= {j: set(left[np.argsort(-cosines[j, left])[:k]]) for j in right}
            pairs = {(i, j) for i in left for j in nearest[i] if i in nearest[j] and cosines[i, j] > 0}
            found.append(pairs)
    return found


@pytest.mark.parametrize("k", [1, 7, 40, 1000])
def test_pairs_are_those_of_full_sorts(k: int):
    found = mutual_neighbors(rows(), platform=PLATFORM, n_neighbors=k)
    assert [set(zip(left, right, strict=True)) for left, right, _ in found] == expected(rows(), PLATFORM, k)
    assert all(len(left) == len(set(zip(left, right, strict=True))) for left, right, _ in found)


def test_cosines_are_those_of_the_pairs():
    for left, right, cosines in mutual_neighbors(rows(), platform=PLATFORM, n_neighbors=7):
        exact = torch.nn.functional.cosine_similarity(rows()[left], rows()[right])
        np.testing.assert_allclose(cosines, exact, atol=1e-6)


def test_pairs_are_ordered_by_the_second_row_then_the_first():
    for left, right, _ in mutual_neighbors(rows(), platform=PLATFORM, n_neighbors=20):
        assert np.lexsort((left, right)).tolist() == list(range(len(left)))


def test_one_platform_has_no_other():
    assert mutual_neighbors(rows(10), platform=np.zeros(10, np.int64), n_neighbors=3) == []


def test_a_row_without_a_direction_has_no_neighbours():
    values = rows()
    values[3] = 0
    found = mutual_neighbors(values, platform=PLATFORM, n_neighbors=1000)
    assert not any(3 in left or 3 in right for left, right, _ in found)


def assert_equal(one: list, other: list) -> None:
    for pair in zip(one, other, strict=True):
        for first, second in zip(*pair, strict=True):
            np.testing.assert_array_equal(first, second)


def test_cosines_that_do_not_fit_at_once_make_no_difference(monkeypatch: pytest.MonkeyPatch):
    whole = mutual_neighbors(rows(), platform=PLATFORM, n_neighbors=7)
    monkeypatch.setattr(mutual, "MAX_COSINES", 1500)
    assert_equal(mutual_neighbors(rows(), platform=PLATFORM, n_neighbors=7), whole)


def test_threads_make_no_difference():
    n = 2 * PART_ROWS + 300
    platform = np.repeat([0, 1], [PART_ROWS + 1, n - PART_ROWS - 1])
    alone = mutual_neighbors(rows(n), platform=platform, n_neighbors=40)
    for n_threads in (2, 3):
        with Workers(n_threads) as workers:
            assert_equal(mutual_neighbors(rows(n), platform=platform, n_neighbors=40, each=workers.each), alone)
