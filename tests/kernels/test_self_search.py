"""The search among a matrix's own rows, over several blocks: what must not change a bit, and ties across blocks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lloki_atlas.kernels import self_search
from lloki_atlas.kernels.candidates import unpack_keys
from lloki_atlas.kernels.neighbors import Neighbors, nearest_neighbors, nearest_rows
from lloki_atlas.kernels.products import BLOCK

N_ROWS = 2 * BLOCK + 131


def make_rows(d: int = 9, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(N_ROWS, d)).astype(np.float32)


def rows_with_ties(seed: int = 0) -> np.ndarray:
    """Few distinct directions: ties within and across blocks, exact in float32."""
    return np.random.default_rng(seed).integers(0, 2, size=(N_ROWS, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def whole() -> Neighbors:
    return nearest_neighbors(make_rows(), n_neighbors=15)


def assert_same(found: Neighbors, indices: np.ndarray, distances: np.ndarray) -> None:
    np.testing.assert_array_equal(found.indices, indices)
    assert found.distances.tobytes() == np.ascontiguousarray(distances).tobytes()


@pytest.mark.parametrize("n_threads", [2, 3, 8])
def test_threads_change_no_byte(whole, n_threads):
    assert_same(nearest_neighbors(make_rows(), n_neighbors=15, n_threads=n_threads), whole.indices, whole.distances)


@pytest.mark.parametrize("n_threads", [2, 8])
def test_threads_change_no_tie(n_threads):
    alone = nearest_neighbors(rows_with_ties(), n_neighbors=15)
    assert_same(
        nearest_neighbors(rows_with_ties(), n_neighbors=15, n_threads=n_threads), alone.indices, alone.distances
    )


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (BLOCK - 1, BLOCK + 1), (BLOCK, 2 * BLOCK), (100, N_ROWS - 7), (N_ROWS - 1, N_ROWS)]
)
def test_a_range_across_blocks_has_the_bytes_of_the_whole(whole, start, stop):
    found = nearest_neighbors(make_rows(), n_neighbors=15, start=start, stop=stop)
    assert_same(found, whole.indices[start:stop], whole.distances[start:stop])


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1000))
def test_permuting_rows_across_blocks_permutes_distances_to_the_bit(seed):
    rows = make_rows()
    order = np.random.default_rng(seed).permutation(N_ROWS)
    found, moved = (nearest_neighbors(part, n_neighbors=15) for part in (rows, rows[order]))
    assert_same(moved, np.argsort(order)[found.indices[order]], found.distances[order])


def test_neighbours_are_those_of_the_search_between_two_matrices(whole):
    rows = make_rows()
    other = nearest_rows(rows, rows, n_neighbors=16)
    assert (other.indices[:, 0] == np.arange(N_ROWS)).all()
    assert_same(whole, other.indices[:, 1:], other.distances[:, 1:])


def test_ties_across_blocks_go_to_the_smaller_index():
    rows = rows_with_ties()
    found = nearest_neighbors(rows, n_neighbors=N_ROWS)
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    for i in (0, BLOCK - 1, BLOCK, N_ROWS - 1):
        near = found.indices[i][found.indices[i] >= 0]
        keys = list(zip(found.distances[i][: len(near)], near, strict=True))
        assert keys == sorted(keys)
        assert len(near) == ((unit @ unit[i] > 0) & (np.arange(N_ROWS) != i)).sum()


class Lazy:
    """Rows that are only there when they are sliced."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.shape, self.largest = rows, rows.shape, 0

    def __getitem__(self, part: slice) -> np.ndarray:
        self.largest = max(self.largest, part.stop - part.start)
        return self.rows[part]


@pytest.mark.parametrize("n_threads", [1, 2])
def test_rows_read_slab_by_slab_give_the_same_bytes(whole, n_threads, monkeypatch):
    monkeypatch.setattr(self_search, "SLAB_BYTES", 4 * 9 * BLOCK)
    lazy = Lazy(make_rows())
    assert_same(nearest_neighbors(lazy, n_neighbors=15, n_threads=n_threads), whole.indices, whole.distances)
    assert lazy.largest == BLOCK
    part = nearest_neighbors(lazy, n_neighbors=15, start=70, stop=2 * BLOCK + 3)
    assert_same(part, whole.indices[70 : 2 * BLOCK + 3], whole.distances[70 : 2 * BLOCK + 3])


@pytest.mark.parametrize("cuts", [(0, 300, N_ROWS), (0, 1, BLOCK, 2 * BLOCK, N_ROWS)])
def test_ranges_that_meet_in_pairs_merge_into_the_whole(whole, cuts):
    rows = make_rows()
    ranges = list(pairwise(cuts))
    found: list[list[np.ndarray]] = [[] for _ in ranges]

    def read(start, stop):
        return rows[start:stop]

    for a, mine in enumerate(ranges):
        own = self_search.Lists.empty(*mine, 15)
        self_search.search_within(read, mine, 9, own, n_threads=1)
        for b in range(a + 1, len(ranges)):
            theirs = self_search.Lists.empty(*ranges[b], 15)
            self_search.search_between(read, mine, ranges[b], 9, (own, theirs), n_threads=1)
            found[b].append(theirs.keys)
        found[a].append(own.keys)
    keys = np.concatenate([self_search.merge_keys(parts, 15) for parts in found])
    assert_same(Neighbors(*unpack_keys(keys)), whole.indices, whole.distances)
