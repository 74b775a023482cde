"""Lists of the nearest found so far, against sorting everything."""

from __future__ import annotations

import numpy as np
import pytest

from lloki_atlas.kernels.candidates import keep_nearest, no_keys, unpack_keys, worst_distances
from lloki_atlas.kernels.products import BLOCK

NOT_WANTED = np.full(BLOCK, -np.inf, dtype=np.float32)


def similarities(seed: int, n: int, *, ties: bool) -> np.ndarray:
    draws = np.random.default_rng(seed)
    values = draws.integers(-4, 5, size=n) / 4 if ties else draws.uniform(-1, 1, size=n)
    line = np.full(BLOCK, 1.0, dtype=np.float32)  # what stands behind the last column must not be looked at
    line[:n] = values
    return line


@pytest.mark.parametrize("n", [1, 63, 64, 65, BLOCK])
@pytest.mark.parametrize("k", [1, 5, 300])
@pytest.mark.parametrize("ties", [False, True])
def test_a_row_keeps_its_nearest_columns(n, k, ties):
    line, keys = similarities(n + k, n, ties=ties), no_keys(1, k)
    keep_nearest(line, n, 0, 10, 0, 1, keys, 0, NOT_WANTED, keys)
    indices, distances = unpack_keys(keys)
    expected = sorted((np.float32(1) - line[c], c + 10) for c in range(n) if line[c] > 0)[:k]
    assert [(d, i) for d, i in zip(distances[0], indices[0], strict=True) if i >= 0] == expected
    missing = indices[0] < 0
    assert missing.sum() == k - len(expected)
    assert np.isinf(distances[0][missing]).all()


def test_columns_keep_their_nearest_rows():
    lines = [similarities(seed, 100, ties=True) for seed in range(40)]
    keys, worst = no_keys(100, 4), np.empty(BLOCK, dtype=np.float32)
    for i, line in enumerate(lines):
        worst_distances(keys, 500, 600, 500, 100, worst)
        keep_nearest(line, 100, i, 500, 500, 600, keys, 500, worst, keys)
    indices, distances = unpack_keys(keys)
    for c in range(100):
        expected = sorted((np.float32(1) - line[c], i) for i, line in enumerate(lines) if line[c] > 0)[:4]
        assert list(zip(distances[c], indices[c], strict=True)) == expected


def test_a_row_is_not_its_own_neighbour_and_nan_is_nobodys():
    line, keys = np.full(BLOCK, 1.0, dtype=np.float32), no_keys(1, 3)
    line[7] = np.nan
    keep_nearest(line, 9, 2, 0, 2, 3, keys, 0, NOT_WANTED, keys)
    assert unpack_keys(keys)[0].tolist() == [[0, 1, 3]]


def test_a_similarity_above_one_is_at_distance_zero():
    line, keys = np.full(BLOCK, np.float32(1.0000001)), no_keys(1, 2)
    keep_nearest(line, 2, 9, 0, 9, 10, keys, 0, NOT_WANTED, keys)
    assert unpack_keys(keys)[1].tolist() == [[0.0, 0.0]]
