from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.neighbors import Neighbors, merge_neighbors, nearest_neighbors, nearest_rows, re_rank


def random_rows(n, d=7, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def same_bytes(a: Neighbors, b: Neighbors) -> bool:
    return a.indices.tobytes() == b.indices.tobytes() and a.distances.tobytes() == b.distances.tobytes()


def integer_rows(n, d, seed):
    """Rows of few distinct directions: ties everywhere, exact in float32."""
    return np.random.default_rng(seed).integers(0, 2, size=(n, d)).astype(np.float32)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(("n", "d"), [(30, 1), (300, 4), (700, 7), (257, 21)])
def test_distances_equal_scikit_learns(metric, n, d):
    queries, rows = random_rows(50, d, 1), random_rows(n, d, 2)
    mine = nearest_rows(queries, rows, n_neighbors=9, metric=metric)
    oracle = NearestNeighbors(n_neighbors=9, metric=metric, algorithm="brute").fit(rows.astype(np.float64))
    distances, indices = oracle.kneighbors(queries.astype(np.float64))
    np.testing.assert_allclose(mine.distances, distances, atol=2e-6)
    if d > 1:  # on one axis every cosine is a tie
        np.testing.assert_array_equal(np.sort(mine.indices), np.sort(indices))


@pytest.mark.parametrize("n", [41, 256, 600])
def test_neighbours_among_the_rows_equal_scikit_learns_without_self(n):
    rows = np.abs(random_rows(n, 12))
    mine = nearest_neighbors(rows, n_neighbors=40)
    oracle = NearestNeighbors(n_neighbors=40, metric="cosine", algorithm="brute").fit(rows.astype(np.float64))
    distances, indices = oracle.kneighbors()
    np.testing.assert_allclose(mine.distances, distances, atol=1e-6)
    agreeing = [len(set(a) & set(b)) for a, b in zip(mine.indices, indices, strict=True)]
    assert np.mean(agreeing) > 39.99


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 300), cut=st.integers(0, 300), k=st.integers(1, 12), seed=st.integers(0, 9))
def test_any_split_into_ranges_gives_identical_bytes(n, cut, k, seed):
    rows = random_rows(n, 5, seed)
    cut = min(cut, n)
    whole = nearest_neighbors(rows, n_neighbors=k)
    parts = [nearest_neighbors(rows, n_neighbors=k, start=a, stop=b) for a, b in ((0, cut), (cut, n))]
    assert same_bytes(
        whole,
        Neighbors(np.concatenate([p.indices for p in parts]), np.concatenate([p.distances for p in parts])),
    )


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 290),
    cut=st.integers(0, 290),
    k=st.integers(1, 12),
    metric=st.sampled_from(["cosine", "euclidean"]),
)
def test_merged_partial_searches_have_the_bytes_of_the_whole_one(n, cut, k, metric):
    queries, rows = integer_rows(6, 4, 1), integer_rows(n, 4, 2)
    cut = min(cut, n)
    first = nearest_rows(queries, rows[:cut], n_neighbors=k, metric=metric)
    second = nearest_rows(queries, rows[cut:], n_neighbors=k, metric=metric)
    shifted = Neighbors(np.where(second.indices >= 0, second.indices + cut, -1).astype(np.int32), second.distances)
    whole = nearest_rows(queries, rows, n_neighbors=k, metric=metric)
    assert same_bytes(merge_neighbors(first, shifted, n_neighbors=k), whole)
    assert same_bytes(merge_neighbors(shifted, first, n_neighbors=k), whole)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(2, 300), k=st.integers(1, 20), seed=st.integers(0, 99))
def test_ties_go_to_the_smaller_index(n, k, seed):
    rows = integer_rows(n, 5, seed)
    found = nearest_neighbors(rows, n_neighbors=k)
    for i, (indices, distances) in enumerate(zip(found.indices, found.distances, strict=True)):
        kept = indices[indices >= 0]
        for distance in np.unique(distances[np.isfinite(distances)]):
            assert (np.diff(indices[distances == distance]) > 0).all()
        # a row of the last kept distance that was left out stands behind all that were kept
        if len(kept) == k:
            twins = np.flatnonzero((rows == rows[kept[-1]]).all(axis=1) & (np.arange(n) != i))
            left_out = np.setdiff1d(twins, kept)
            assert left_out.size == 0 or left_out.min() > kept[-1]


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 280), seed=st.integers(0, 99))
def test_permuting_rows_permutes_neighbours(n, seed):
    rows = random_rows(n, 6, 3)
    order = np.random.default_rng(seed).permutation(n)
    whole, moved = nearest_neighbors(rows, n_neighbors=5), nearest_neighbors(rows[order], n_neighbors=5)
    assert moved.distances.tobytes() == whole.distances[order].tobytes()
    named = np.where(moved.indices >= 0, order[moved.indices], -1)
    np.testing.assert_array_equal(named, whole.indices[order])


def test_a_row_is_not_its_own_neighbour_but_its_twin_is():
    rows = np.array([[1, 2], [1, 2], [2, 1]], np.float32)
    assert nearest_neighbors(rows, n_neighbors=2).indices.tolist() == [[1, 2], [0, 2], [0, 1]]


def test_rows_at_a_right_angle_or_beyond_are_nobodys_neighbours():
    rows = np.array([[1, 0], [0, 1], [-1, 0]], np.float32)
    found = nearest_neighbors(rows, n_neighbors=2)
    assert (found.indices == -1).all()
    assert np.isinf(found.distances).all()


def test_between_queries_and_rows_opposite_directions_are_kept_at_distance_two():
    found = nearest_rows(np.array([[1, 0]], np.float32), np.array([[-3, 0], [0, 2]], np.float32), n_neighbors=2)
    assert found.indices.tolist() == [[1, 0]]
    assert found.distances.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_row_without_direction_has_no_neighbours_and_is_nobodys(bad):
    rows = np.abs(random_rows(9, 3)) + 1
    rows[4] = bad
    found = nearest_neighbors(rows, n_neighbors=20)
    assert (found.indices[4] == -1).all()
    assert not (found.indices == 4).any()
    assert ((found.indices >= 0).sum(axis=1)[np.arange(9) != 4] == 7).all()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_rows_with_nan_are_nobodys_neighbours_by_either_metric(metric):
    rows = random_rows(5, 3)
    rows[2, 1] = np.nan
    found = nearest_rows(rows, rows, n_neighbors=9, metric=metric)
    assert (found.indices[2] == -1).all()
    assert not (found.indices == 2).any()


def test_an_all_zero_row_is_a_place_in_euclidean_space():
    found = nearest_rows(
        np.zeros((1, 2), np.float32), np.array([[3, 4], [0, 0]], np.float32), n_neighbors=2, metric="euclidean"
    )
    assert found.indices.tolist() == [[1, 0]]
    assert found.distances.tolist() == [[0.0, 5.0]]


@pytest.mark.parametrize("n", [1, 3])
def test_fewer_rows_than_neighbours_leaves_the_rest_missing(n):
    found = nearest_neighbors(np.ones((n, 2), np.float32), n_neighbors=5)
    assert found.indices.shape == (n, 5)
    assert ((found.indices >= 0).sum(axis=1) == n - 1).all()


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
def test_no_rows_or_no_queries_is_no_error(n, m):
    found = nearest_rows(np.ones((m, 2), np.float32), np.ones((n, 2), np.float32), n_neighbors=2)
    assert found.indices.shape == (m, 2)
    assert (found.indices == -1).all()


def test_all_rows_identical_gives_the_smallest_indices():
    found = nearest_neighbors(np.ones((600, 3), np.float32), n_neighbors=3)
    assert found.indices[0].tolist() == [1, 2, 3]
    assert found.indices[599].tolist() == [0, 1, 2]


def test_scaling_a_row_by_a_power_of_two_changes_no_bit():
    rows = random_rows(50, 4)
    scaled = rows * (2.0 ** np.arange(-10, 40)).astype(np.float32)[:, None]
    assert same_bytes(nearest_neighbors(rows, n_neighbors=5), nearest_neighbors(scaled, n_neighbors=5))


def test_layout_type_and_read_only_flag_change_no_bit():
    rows = random_rows(50, 4)
    frozen = rows.copy()
    frozen.flags.writeable = False
    expected = nearest_neighbors(rows, n_neighbors=5)
    for variant in (np.asfortranarray(rows), rows.astype(np.float64), frozen):
        assert same_bytes(nearest_neighbors(variant, n_neighbors=5), expected)


def test_the_callers_rows_stay_writeable_and_unchanged():
    rows = random_rows(20, 4)
    before = rows.copy()
    nearest_rows(rows, rows, n_neighbors=2, metric="euclidean")
    assert rows.flags.writeable
    np.testing.assert_array_equal(rows, before)


def test_merging_keeps_a_row_found_twice_once():
    part = nearest_rows(random_rows(3, 2), random_rows(9, 2, 1), n_neighbors=4)
    assert same_bytes(merge_neighbors(part, part, n_neighbors=4), part)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_neighbors": 0}, "n_neighbors"),
        ({"n_neighbors": 1, "start": 3, "stop": 2}, "range"),
        ({"n_neighbors": 1, "stop": 6}, "range"),
        ({"n_neighbors": 1, "start": -1}, "range"),
        ({"n_neighbors": 1, "n_threads": 0}, "n_threads"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        nearest_neighbors(random_rows(5), **arguments)


@pytest.mark.parametrize("rows", [np.ones(3), np.ones((2, 2), complex), np.array([["a"]])])
def test_rows_of_another_shape_or_type_are_refused(rows):
    with pytest.raises(InputError, match="rows"):
        nearest_neighbors(rows, n_neighbors=1)


def test_queries_of_another_width_are_refused():
    with pytest.raises(InputError, match="queries"):
        nearest_rows(random_rows(2, 3), random_rows(2, 4), n_neighbors=1)


def test_an_unknown_metric_is_refused_by_name():
    with pytest.raises(InputError, match="manhattan"):
        nearest_rows(random_rows(2), random_rows(2), n_neighbors=1, metric="manhattan")


@pytest.mark.parametrize(
    ("indices", "distances"),
    [
        ([[0, 1]], [[1.0]]),
        ([[-1]], [[1.0]]),
        ([[0]], [[np.inf]]),
        ([[-2]], [[np.inf]]),
        ([[0, 1]], [[2.0, 1.0]]),
        ([[0]], [[np.nan]]),
    ],
)
def test_neighbors_check_themselves(indices, distances):
    with pytest.raises(InputError):
        Neighbors(np.array(indices, np.int32), np.array(distances, np.float32))


def test_neighbors_of_other_types_are_refused():
    with pytest.raises(InputError, match="int32"):
        Neighbors(np.zeros((1, 1), np.int64), np.zeros((1, 1), np.float32))


def test_merging_searches_of_different_queries_is_refused():
    rows = random_rows(4)
    with pytest.raises(InputError, match="same queries"):
        merge_neighbors(
            nearest_rows(rows, rows, n_neighbors=1), nearest_rows(rows[:2], rows, n_neighbors=1), n_neighbors=1
        )


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize(("n", "k"), [(2, 3), (40, 7), (300, 12)])
def test_candidates_that_hold_the_neighbours_are_ranked_with_the_bits_of_the_search(n, k, n_threads):
    rows, rng = random_rows(n, 21), np.random.default_rng(n)
    exact = nearest_neighbors(rows, n_neighbors=k)
    more = rng.integers(-1, n, (n, 30)).astype(np.int32)
    candidates = rng.permuted(np.hstack([exact.indices, more]), axis=1)
    assert same_bytes(re_rank(rows, candidates, n_neighbors=k, n_threads=n_threads), exact)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 60), k=st.integers(1, 10), m=st.integers(0, 25), seed=st.integers(0, 99))
def test_ranked_candidates_are_the_nearest_of_them_each_once(n, k, m, seed):
    rows = integer_rows(n, 5, seed)
    candidates = np.random.default_rng(seed).integers(-1, n, (n, m)).astype(np.int32)
    whole, found = nearest_neighbors(rows, n_neighbors=n), re_rank(rows, candidates, n_neighbors=k)
    for i in range(n):
        expected = [j for j in whole.indices[i] if j >= 0 and j in candidates[i]][:k]
        assert found.indices[i, : len(expected)].tolist() == expected
        assert (found.indices[i, len(expected) :] == -1).all()


def test_a_candidate_named_twice_is_kept_once():
    found = re_rank(np.ones((3, 2)), np.array([[1, 1, 1], [2, 0, 2], [-1, -1, -1]]), n_neighbors=3)
    assert found.indices.tolist() == [[1, -1, -1], [0, 2, -1], [-1, -1, -1]]


def test_a_row_among_its_own_candidates_is_passed_over():
    found = re_rank(np.ones((2, 2)), np.array([[0, 1], [1, 1]]), n_neighbors=2)
    assert found.indices.tolist() == [[1, -1], [-1, -1]]


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_candidates_without_direction_are_nobodys_neighbours(bad):
    rows = np.ones((3, 2), np.float32)
    rows[1] = bad
    found = re_rank(rows, np.tile(np.arange(3), (3, 1)), n_neighbors=2)
    assert found.indices.tolist() == [[2, -1], [-1, -1], [0, -1]]


def test_candidates_at_a_right_angle_or_beyond_are_nobodys_neighbours():
    rows = np.array([[1, 0], [0, 1], [-1, 0], [1, 1]], np.float32)
    assert re_rank(rows, [[1, 2, 3]] * 4, n_neighbors=3).indices[0].tolist() == [3, -1, -1]


@pytest.mark.parametrize(
    ("candidates", "k", "message"),
    [
        (np.full((3, 1), 3), 1, "outside 0 to 2"),
        (np.zeros((2, 1), int), 1, "candidates"),
        (np.zeros((3, 1)), 1, "integers"),
        (np.zeros((3, 1), int), 0, "n_neighbors"),
    ],
)
def test_candidates_that_do_not_fit_are_refused(candidates, k, message):
    with pytest.raises(InputError, match=message):
        re_rank(np.ones((3, 2)), candidates, n_neighbors=k)
