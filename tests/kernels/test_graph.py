from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from parity.textbook import splitmix, union_graph

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.bandwidth import sample_bandwidth
from lloki_atlas.kernels.graph import Graph, build_graph
from lloki_atlas.kernels.neighbors import Neighbors, nearest_neighbors


def make_cells(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 4)).astype(np.float32), (rng.random((n, 2)) * 300).astype(np.float32)


def make_graph(n, *, k=5, seed=0, **settings):
    rows, xy = make_cells(n, seed)
    return build_graph(nearest_neighbors(rows, n_neighbors=k), xy, **{"bandwidth_um": 100.0, **settings})


def dense(graph):
    return sp.csr_array((graph.weights, graph.indices, graph.indptr), shape=(graph.n_cells,) * 2).toarray()


def no_neighbors(n):
    return Neighbors(np.full((n, 2), -1, np.int32), np.full((n, 2), np.inf, np.float32))


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 60), k=st.integers(1, 8), seed=st.integers(0, 99), loops=st.booleans())
def test_graph_equals_dense_products(n, k, seed, loops):
    rows, xy = make_cells(n, seed)
    neighbors = nearest_neighbors(rows, n_neighbors=k)
    graph = build_graph(neighbors, xy, bandwidth_um=80.0, self_loops=loops)
    lists = [row[row >= 0].tolist() for row in neighbors.indices]
    np.testing.assert_allclose(dense(graph), union_graph(lists, xy, 80.0, self_loops=loops), atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 60), seed=st.integers(0, 99))
def test_permuting_cells_permutes_weights(n, seed):
    rows, xy = make_cells(n)
    order = np.random.default_rng(seed).permutation(n)
    whole = dense(build_graph(nearest_neighbors(rows, n_neighbors=4), xy, bandwidth_um=90.0))
    moved = dense(build_graph(nearest_neighbors(rows[order], n_neighbors=4), xy[order], bandwidth_um=90.0))
    np.testing.assert_allclose(moved, whole[np.ix_(order, order)], atol=1e-6)


def test_graph_is_symmetric_to_the_last_bit():
    matrix = dense(make_graph(80))
    assert matrix.tobytes() == matrix.T.copy().tobytes()


def test_indices_ascend_in_every_row_without_repeats():
    graph = make_graph(80)
    for i in range(80):
        assert (np.diff(graph.indices[graph.indptr[i] : graph.indptr[i + 1]]) > 0).all()


def test_largest_eigenvalue_of_the_normalised_graph_is_one():
    assert np.linalg.eigvalsh(dense(make_graph(60)).astype(np.float64)).max() == pytest.approx(1.0, abs=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 50),
    seed=st.integers(0, 999),
    sigma=st.sampled_from([0.0, 1.0, 60.0, 1e4]),
    n_places=st.integers(1, 40),
    loops=st.booleans(),
)
def test_a_graph_is_symmetric_and_never_enlarges(n, k, seed, sigma, n_places, loops):
    """Also with cells at one place, and with more neighbours asked for than there are cells."""
    rng = np.random.default_rng(seed)
    rows, places = rng.normal(size=(n, 3)).astype(np.float32), (rng.random((n_places, 2)) * 300).astype(np.float32)
    xy = places[rng.integers(0, n_places, n)]
    neighbors = nearest_neighbors(rows, n_neighbors=k)
    matrix = dense(build_graph(neighbors, xy, bandwidth_um=sigma, self_loops=loops))
    assert matrix.tobytes() == matrix.T.copy().tobytes()
    assert (matrix >= 0).all()
    assert np.abs(np.linalg.eigvalsh(matrix.astype(np.float64))).max() <= 1 + 1e-6
    lists = [row[row >= 0].tolist() for row in neighbors.indices]
    np.testing.assert_allclose(matrix, union_graph(lists, xy, sigma, self_loops=loops), atol=1e-6)


def graph_bytes(graph):
    return [part.tobytes() for part in (graph.indptr, graph.indices, graph.weights)]


@pytest.mark.parametrize("n_threads", [2, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 5, 200])
def test_threads_change_no_byte(n, n_threads):
    assert graph_bytes(make_graph(n, n_threads=n_threads)) == graph_bytes(make_graph(n))


def test_indices_alone_are_enough():
    rows, xy = make_cells(60)
    neighbors = nearest_neighbors(rows, n_neighbors=5)
    whole = build_graph(neighbors, xy, bandwidth_um=100.0)
    assert graph_bytes(build_graph(neighbors.indices, xy, bandwidth_um=100.0)) == graph_bytes(whole)


def test_neighbours_in_any_order_and_named_twice_give_the_same_bytes():
    rows, xy = make_cells(60)
    indices = nearest_neighbors(rows, n_neighbors=5).indices
    mixed = np.random.default_rng(1).permuted(np.hstack([indices, indices[:, :3]]), axis=1)
    one, other = (build_graph(given, xy, bandwidth_um=100.0) for given in (indices, mixed))
    assert graph_bytes(one) == graph_bytes(other)


def test_no_cells_are_an_empty_graph():
    graph = build_graph(np.zeros((0, 4), np.int32), np.zeros((0, 2)), bandwidth_um=1.0)
    assert (graph.n_cells, graph.indices.size) == (0, 0)


def test_one_way_neighbours_are_joined_both_ways():
    neighbors = Neighbors(np.array([[1], [2], [-1]], np.int32), np.array([[0.1], [0.1], [np.inf]], np.float32))
    matrix = dense(build_graph(neighbors, np.zeros((3, 2)), bandwidth_um=1.0, self_loops=False))
    np.testing.assert_array_equal(matrix > 0, [[0, 1, 0], [1, 0, 1], [0, 1, 0]])


@pytest.mark.parametrize("loops", [True, False])
def test_a_neighbour_that_is_the_cell_itself_adds_no_second_loop(loops):
    neighbors = Neighbors(np.array([[0, 1], [-1, -1]], np.int32), np.array([[0, 1], [np.inf, np.inf]], np.float32))
    graph = build_graph(neighbors, np.zeros((2, 2)), bandwidth_um=1.0, self_loops=loops)
    np.testing.assert_array_equal(np.diff(graph.indptr), [2, 2] if loops else [1, 1])


def test_bandwidth_zero_makes_every_weight_before_normalisation_one():
    rows, _ = make_cells(30)
    neighbors = nearest_neighbors(rows, n_neighbors=4)
    lists = [row[row >= 0].tolist() for row in neighbors.indices]
    mine = dense(build_graph(neighbors, np.full((30, 2), 7.0), bandwidth_um=0.0))
    np.testing.assert_allclose(mine, union_graph(lists, np.zeros((30, 2)), 0.0), atol=1e-6)


@pytest.mark.parametrize("n", [1, 3])
def test_cells_without_neighbours_keep_themselves(n):
    np.testing.assert_array_equal(dense(build_graph(no_neighbors(n), np.zeros((n, 2)), bandwidth_um=0.0)), np.eye(n))


def test_without_self_loops_a_cell_without_neighbours_has_an_empty_row():
    graph = build_graph(no_neighbors(3), np.zeros((3, 2)), bandwidth_um=0.0, self_loops=False)
    assert graph.indptr.tolist() == [0, 0, 0, 0]


def test_weights_that_vanish_leave_zeros_and_no_nan():
    neighbors = Neighbors(np.array([[1], [0]], np.int32), np.array([[0.1], [0.1]], np.float32))
    graph = build_graph(neighbors, np.array([[0, 0], [1e6, 0]]), bandwidth_um=1e-3, self_loops=False)
    assert graph.weights.tolist() == [0.0, 0.0]


def test_bandwidth_is_the_mean_distance_of_the_keyed_pairs():
    _, xy = make_cells(20)

    def draw(pair, which, n):
        return int((splitmix(9, pair, which) >> 11) * 2.0**-53 * n)

    distances = []
    for pair in range(50):
        i, j = draw(pair, 0, 20), draw(pair, 1, 19)
        distances.append(np.linalg.norm(xy[i].astype(float) - xy[j + (j >= i)].astype(float)))
    assert sample_bandwidth(xy, n_pairs=50, key=9) == pytest.approx(np.mean(distances), rel=1e-12)


def test_bandwidth_comes_near_the_mean_over_all_pairs():
    _, xy = make_cells(100)
    full = np.linalg.norm(xy[:, None].astype(float) - xy[None].astype(float), axis=2)
    assert sample_bandwidth(xy, n_pairs=20_000, key=1) == pytest.approx(full.sum() / (100 * 99), rel=0.02)


def test_bandwidth_of_two_cells_is_their_distance():
    assert sample_bandwidth(np.array([[0, 0], [3, 4]]), n_pairs=7, key=0) == 5.0


def test_bandwidth_depends_on_the_key():
    _, xy = make_cells(50)
    assert sample_bandwidth(xy, n_pairs=10, key=1) != sample_bandwidth(xy, n_pairs=10, key=2)


@pytest.mark.parametrize("xy", [np.zeros((1, 2)), np.full((5, 2), 3.0)])
def test_bandwidth_of_one_place_is_zero(xy):
    assert sample_bandwidth(xy, n_pairs=10, key=1) == 0.0


@pytest.mark.parametrize(("n", "pairs"), [(0, 5), (3, 0)])
def test_bandwidth_without_cells_or_pairs_is_refused(n, pairs):
    with pytest.raises(InputError, match="at least one"):
        sample_bandwidth(np.zeros((n, 2)), n_pairs=pairs, key=1)


@pytest.mark.parametrize("bandwidth", [-1.0, np.nan, np.inf])
def test_a_bandwidth_that_is_no_length_is_refused(bandwidth):
    with pytest.raises(InputError, match="bandwidth_um"):
        build_graph(no_neighbors(2), np.zeros((2, 2)), bandwidth_um=bandwidth)


def test_a_neighbour_that_is_no_cell_is_refused():
    neighbors = Neighbors(np.array([[5]], np.int32), np.array([[0.1]], np.float32))
    with pytest.raises(InputError, match="outside"):
        build_graph(neighbors, np.zeros((1, 2)), bandwidth_um=1.0)


def test_coordinates_of_other_cells_are_refused():
    with pytest.raises(InputError, match="coordinates"):
        build_graph(no_neighbors(2), np.zeros((3, 2)), bandwidth_um=1.0)


@pytest.mark.parametrize(
    ("indptr", "indices", "weights"),
    [
        ([0, 2], [0], [1.0]),
        ([1, 1], [0], [1.0]),
        ([0, 2, 1], [0], [1.0]),
        ([0, 1], [1], [1.0]),
        ([0, 1], [-1], [1.0]),
        ([0, 1], [0], [np.nan]),
        ([0, 1], [0], [1.0, 2.0]),
        ([], [], []),
    ],
)
def test_a_graph_checks_itself(indptr, indices, weights):
    with pytest.raises(InputError):
        Graph(np.array(indptr, np.int64), np.array(indices, np.int32), np.array(weights, np.float32))


def test_a_graph_of_other_types_is_refused():
    with pytest.raises(InputError, match="int64"):
        Graph(np.zeros(1, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
