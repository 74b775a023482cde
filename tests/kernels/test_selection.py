"""The largest numbers of rows and columns, and the nearest rows, against sorting everything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lloki_atlas.kernels.selection import (
    largest_of_each,
    mutual_entries,
    nearest_others,
    nearest_unlike,
    row_floors,
)

# few different numbers: ties are the rule
numbers = st.one_of(
    st.sampled_from([-1.0, -0.0, 0.0, 1e-30, 0.25, 0.5, 1.0]),
    st.floats(-1, 1, width=32, allow_subnormal=False),
)


def matrices(n_rows: st.SearchStrategy[int], n_columns: st.SearchStrategy[int]) -> st.SearchStrategy[np.ndarray]:
    shapes = st.tuples(n_rows, n_columns)
    return shapes.flatmap(lambda shape: arrays.arrays(np.float32, shape, elements=numbers))


def keys(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float32).view(np.int32)


def among_largest(values: np.ndarray, k: int) -> np.ndarray:
    """Positive, and not smaller than the k-th largest of the row."""
    last = np.sort(values, axis=1)[:, ::-1][:, min(k, values.shape[1]) - 1]
    return (values >= last[:, None]) & (values > 0)


@settings(deadline=None)
@given(values=matrices(st.integers(1, 6), st.integers(1, 50)), k=st.integers(1, 60))
def test_the_k_largest_positive_numbers_reach_the_floor_and_no_other_does(values: np.ndarray, k: int):
    floors = np.empty(len(values), np.int32)
    row_floors(keys(values), k, floors)
    np.testing.assert_array_equal(keys(values) >= floors[:, None], among_largest(values, k))


def test_a_floor_is_found_among_numbers_that_differ_by_their_last_bit():
    values = np.float32(0.9) + np.arange(200, dtype=np.float32) * np.float32(2**-24)
    floors = np.empty(1, np.int32)
    row_floors(keys(values[None]), 17, floors)
    np.testing.assert_array_equal(keys(values) >= floors[0], among_largest(values[None], 17)[0])


@settings(deadline=None)
@given(values=matrices(st.integers(1, 40), st.integers(1, 70)), k=st.integers(1, 8), share=st.floats(0, 1))
def test_mutual_entries_are_among_the_largest_of_their_row_and_of_their_column(
    values: np.ndarray, k: int, share: float
):
    floors = np.empty(len(values), np.int32)
    row_floors(keys(values), k, floors)
    n = values.shape[1]
    cut = int(share * n)
    found = [mutual_entries(keys(values), floors, k, start, stop) for start, stop in ((0, cut), (cut, n))]
    rows, columns = (np.concatenate(parts) for parts in zip(*found, strict=True))
    expected = among_largest(values, k) & among_largest(values.T, k).T
    np.testing.assert_array_equal(np.stack([columns, rows]), np.stack(np.nonzero(expected.T)))


def test_ties_beyond_what_was_reserved_are_all_listed():
    values = np.ones((50, 90), np.float32)
    floors = np.empty(50, np.int32)
    row_floors(keys(values), 1, floors)
    rows, columns = mutual_entries(keys(values), floors, 1, 0, 90)
    np.testing.assert_array_equal(rows, np.tile(np.arange(50), 90))
    np.testing.assert_array_equal(columns, np.repeat(np.arange(90), 50))


def test_the_first_of_equally_large_values_is_taken():
    owners, values = np.array([2, 0, 2, 2, 0]), np.array([0.5, 0.1, 0.75, 0.75, 0.05], np.float32)
    assert largest_of_each(owners, values, 4).tolist() == [1, -1, 2, -1]


@pytest.mark.parametrize("k", [1, 7, 39])
@pytest.mark.parametrize("seed", range(3))
def test_nearest_others_are_those_of_a_sort(seed: int, k: int):
    rows = np.random.default_rng(seed).normal(size=(40, 16)).astype(np.float32)
    nearest, distances = np.empty((25, k), np.int64), np.empty((25, k), np.float32)
    nearest_others(rows, rows[10:35] @ rows.T, np.square(rows).sum(axis=1), 10, nearest, distances)
    for i, own in enumerate(rows[10:35]):
        exact = np.linalg.norm(rows.astype(np.float64) - own, axis=1)
        assert set(nearest[i]) == set(np.argsort(exact)[1 : k + 1])
        np.testing.assert_allclose(distances[i], exact[nearest[i]], atol=1e-6)


def test_equally_near_rows_are_taken_from_the_first_on():
    rows = np.ones((9, 4), np.float32)
    nearest, distances = np.empty((9, 3), np.int64), np.empty((9, 3), np.float32)
    nearest_others(rows, rows @ rows.T, np.full(9, 4, np.float32), 0, nearest, distances)
    assert nearest[0].tolist() == [1, 2, 3]
    assert nearest[8].tolist() == [0, 1, 2]
    assert (distances == 0).all()


@settings(deadline=None)
@given(seed=st.integers(0, 1000))
def test_nearest_unlike_is_the_nearest_of_another_label(seed: int):
    rng = np.random.default_rng(seed)
    rows, labels = rng.normal(size=(20, 5)).astype(np.float32), rng.integers(0, rng.integers(1, 4), 20)
    nearest = np.empty(20, np.int64)
    nearest_unlike(rows @ rows.T, np.square(rows).sum(axis=1), labels, labels, nearest)
    distances = np.linalg.norm(rows[:, None].astype(np.float64) - rows, axis=2)
    distances[labels[:, None] == labels] = np.inf
    expected = np.where(np.isfinite(distances).any(axis=1), distances.argmin(axis=1), -1)
    np.testing.assert_array_equal(nearest, expected)
