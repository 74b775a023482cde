"""Distances along edges, the edges at a row, and the pull along them."""

from __future__ import annotations

import numpy as np
import pytest

from lloki_atlas.kernels.edges import edge_distances, incidence, pull, squared_distance


def drawn(seed: int, dtype: type, n: int = 30, d: int = 11, k: int = 4):
    rng = np.random.default_rng(seed)
    left, right = rng.integers(0, n, 25), rng.integers(-1, n, (25, k))
    return rng.normal(size=(n, d)).astype(dtype), left, right, rng.normal(size=25 * k).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("d", [1, 11, 128])
def test_distances_are_those_of_the_rows(dtype: type, d: int):
    rows, left, right, _ = drawn(0, dtype, d=d)
    found = np.full(right.shape, -1, dtype)
    edge_distances(rows, left, right, 0, 10, found)
    edge_distances(rows, left, right, 10, 25, found)
    expected = np.where(right >= 0, np.linalg.norm(rows[left][:, None] - rows[right], axis=2), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-6 if dtype is np.float32 else 1e-14)


def test_the_distance_of_a_row_to_itself_is_zero_and_one_missing_edge_is_too():
    rows, found = drawn(1, np.float32)[0], np.full((1, 2), -1, np.float32)
    edge_distances(rows, np.array([3]), np.array([[3, -1]]), 0, 1, found)
    assert found.tolist() == [[0, 0]]


def test_a_distance_has_the_same_bits_from_both_ends():
    rows = drawn(2, np.float32, d=128)[0]
    assert all(squared_distance(rows, i, j) == squared_distance(rows, j, i) for i in range(30) for j in range(30))


def test_every_edge_is_listed_at_both_of_its_ends():
    _, left, right, _ = drawn(3, np.float32)
    starts, others, edges = incidence(left, right, 30)
    expected = []
    for e, place in zip(*np.nonzero(right >= 0), strict=True):
        number = e * right.shape[1] + place
        expected += [(left[e], right[e, place], number), (right[e, place], left[e], number)]
    rows = np.repeat(np.arange(30), np.diff(starts))
    assert sorted(zip(rows, others, edges, strict=True)) == sorted(expected)


def test_no_edges_leave_every_row_alone():
    starts, others, edges = incidence(np.arange(3), np.full((3, 2), -1), 3)
    assert starts.tolist() == [0, 0, 0, 0]
    assert len(others) == len(edges) == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pull_is_the_weighted_sum_of_differences(dtype: type):
    rows, left, right, weights = drawn(4, dtype)
    found = np.full(rows.shape, np.nan, dtype)
    ends = incidence(left, right, 30)
    pull(rows, *ends, weights, 0, 12, found)
    pull(rows, *ends, weights, 12, 30, found)
    expected = np.zeros(rows.shape)
    for e, place in zip(*np.nonzero(right >= 0), strict=True):
        i, j, weight = left[e], right[e, place], weights[e * right.shape[1] + place]
        expected[i] += weight * (rows[i].astype(np.float64) - rows[j])
        expected[j] += weight * (rows[j].astype(np.float64) - rows[i])
    np.testing.assert_allclose(found, expected, atol=1e-5 if dtype is np.float32 else 1e-13)


def test_an_edge_without_weight_does_not_pull_even_at_an_infinite_row():
    rows = np.array([[1.0, 2.0], [np.inf, 0.0], [0.0, 0.0]])
    found = np.empty_like(rows)
    left, right = np.array([0, 0]), np.array([[1], [2]])
    pull(rows, *incidence(left, right, 3), np.array([0.0, 1.0]), 0, 1, found)
    assert found[0].tolist() == [1, 2]
