from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import textbook

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.graph import Graph, build_graph
from lloki_atlas.kernels.neighbors import Neighbors, nearest_neighbors
from lloki_atlas.kernels.propagation import Propagated, propagate


def make_slice(n=40, n_genes=15, seed=0, density=0.25):
    rng = np.random.default_rng(seed)
    counts = (rng.poisson(3, (n, n_genes)) * (rng.random((n, n_genes)) < density)).astype(np.float32)
    xy = (rng.random((n, 2)) * 200).astype(np.float32)
    graph = build_graph(nearest_neighbors(counts, n_neighbors=5), xy, bandwidth_um=80.0)
    return graph, counts, rng.integers(0, n_genes // 2 + 1, n).astype(np.int32)


def dense(graph):
    return sp.csr_array((graph.weights, graph.indices, graph.indptr), shape=(graph.n_cells,) * 2).toarray()


def run(graph, counts, budget, **settings):
    return propagate(graph, sp.csr_matrix(counts), budget, **{"key": 5, **settings})


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 40), n_genes=st.integers(1, 15), seed=st.integers(0, 99), key=st.integers(0, 2**64 - 1))
def test_values_and_iterations_equal_the_textbook(n, n_genes, seed, key):
    graph, counts, budget = make_slice(n, n_genes, seed)
    mine = run(graph, counts, budget, key=key)
    ranks = textbook.hashes(key, n, n_genes)
    expected, n_iterations = textbook.propagate(
        dense(graph).astype(np.float64), counts, budget, ranks, max_iterations=40, tolerance=1e-3
    )
    np.testing.assert_array_equal(mine.values != 0, expected != 0)
    np.testing.assert_allclose(mine.values, expected, atol=1e-5)
    assert mine.n_iterations == n_iterations


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 99), iterations=st.integers(1, 6))
def test_observed_values_are_restored_exactly(seed, iterations):
    graph, counts, budget = make_slice(seed=seed)
    values = run(graph, counts, budget, max_iterations=iterations).values
    assert values[counts != 0].tobytes() == counts[counts != 0].tobytes()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 99), iterations=st.integers(1, 6))
def test_no_cell_has_more_values_than_observed_and_budget(seed, iterations):
    graph, counts, budget = make_slice(seed=seed)
    values = run(graph, counts, budget, max_iterations=iterations).values
    assert ((values != 0).sum(axis=1) <= (counts != 0).sum(axis=1) + budget).all()


def test_the_support_is_the_budget_of_smallest_hashes_among_what_was_filled_in():
    graph, counts, budget = make_slice()
    first = dense(graph).astype(np.float64) @ counts
    values = run(graph, counts, budget, max_iterations=1).values
    ranks = textbook.hashes(5, *counts.shape)
    exceeded = 0
    for i in range(len(counts)):
        filled = np.flatnonzero((counts[i] == 0) & (first[i] != 0))
        exceeded += filled.size > budget[i]
        expected = filled[np.argsort(ranks[i, filled])][: budget[i]]
        np.testing.assert_array_equal(np.flatnonzero((values[i] != 0) & (counts[i] == 0)), np.sort(expected))
    assert exceeded > 20, "the case was not put to the test"


def test_a_support_once_drawn_stays():
    graph, counts, budget = make_slice()
    full = (dense(graph) @ counts != 0).sum(axis=1) > (counts != 0).sum(axis=1) + budget
    early = run(graph, counts, budget, max_iterations=1).values[full] != 0
    late = run(graph, counts, budget, max_iterations=30, tolerance=1e-9).values[full] != 0
    assert not (late & ~early).any()


def test_a_cells_support_does_not_depend_on_the_cells_stored_after_it():
    graph, counts, budget = make_slice()
    n = len(counts)
    extra = 3
    longer = Graph(
        np.concatenate([graph.indptr, graph.indptr[-1] + np.arange(1, extra + 1)]),
        np.concatenate([graph.indices, np.arange(n, n + extra, dtype=np.int32)]),
        np.concatenate([graph.weights, np.ones(extra, np.float32)]),
    )
    short = run(graph, counts, budget, max_iterations=3, tolerance=1e-9).values
    more = np.vstack([counts, np.ones((extra, counts.shape[1]), np.float32)])
    long = run(longer, more, np.append(budget, [0] * extra), max_iterations=3, tolerance=1e-9).values
    assert short.tobytes() == long[:n].tobytes()


def test_another_key_keeps_other_entries():
    graph, counts, budget = make_slice()
    assert (run(graph, counts, budget, key=1).values != 0).tobytes() != (
        run(graph, counts, budget, key=2).values != 0
    ).tobytes()


def test_a_budget_of_zero_leaves_the_counts_and_stops_at_once():
    graph, counts, budget = make_slice()
    result = run(graph, counts, np.zeros_like(budget))
    np.testing.assert_array_equal(result.values, counts)
    assert result.n_iterations == 1
    assert result.relative_change == 0.0


def test_a_budget_of_every_gene_is_plain_propagation():
    graph, counts, budget = make_slice()
    result = run(graph, counts, np.full_like(budget, 15), max_iterations=3, tolerance=1e-9)
    A, expected = dense(graph).astype(np.float64), counts.astype(np.float64)
    for _ in range(3):
        expected = np.where(counts != 0, counts, A @ expected)
    np.testing.assert_allclose(result.values, expected, atol=1e-5)


def test_a_slice_without_zeros_converges_at_once():
    graph, _, budget = make_slice()
    counts = np.ones((40, 15), np.float32)
    result = run(graph, counts, budget)
    assert result.n_iterations == 1
    np.testing.assert_array_equal(result.values, counts)


def test_iterations_end_at_the_limit():
    graph, counts, budget = make_slice()
    result = run(graph, counts, budget, max_iterations=2, tolerance=1e-12)
    assert result.n_iterations == 2
    assert result.relative_change > 1e-12


def test_the_iteration_converges_to_a_fixed_point():
    graph, counts, budget = make_slice()
    result = run(graph, counts, budget, max_iterations=500, tolerance=1e-6)
    assert result.n_iterations < 500
    assert result.relative_change < 1e-6
    following = dense(graph) @ result.values
    filled = (counts == 0) & (result.values != 0)
    np.testing.assert_allclose(result.values[filled], following[filled], rtol=1e-4, atol=1e-5)


def test_a_slice_of_one_cell_stays_as_it_is():
    nobody = Neighbors(np.full((1, 3), -1, np.int32), np.full((1, 3), np.inf, np.float32))
    graph = build_graph(nobody, np.zeros((1, 2)), bandwidth_um=0.0)
    counts = np.array([[0, 2, 0]], np.float32)
    np.testing.assert_array_equal(run(graph, counts, np.array([2])).values, counts)


@pytest.mark.parametrize("loops", [True, False])
def test_an_isolated_cell_keeps_its_counts_and_gets_nothing(loops):
    indices = np.array([[1], [0], [-1]], np.int32)
    neighbors = Neighbors(indices, np.where(indices < 0, np.inf, 0.1).astype(np.float32))
    graph = build_graph(neighbors, np.zeros((3, 2)), bandwidth_um=0.0, self_loops=loops)
    counts = np.array([[1, 0], [0, 1], [3, 0]], np.float32)
    values = run(graph, counts, np.array([2, 2, 2])).values
    np.testing.assert_array_equal(values[2], counts[2])
    assert (values[:2] > 0).all()


def test_a_slice_without_counts_stays_empty():
    graph, counts, budget = make_slice()
    result = run(graph, np.zeros_like(counts), budget)
    assert not result.values.any()
    assert result.relative_change == 0.0


def test_a_stored_zero_is_not_observed():
    graph, counts, budget = make_slice()
    stored = sp.csr_matrix(counts)
    row, gene = 0, int(np.flatnonzero(counts[0])[0])
    stored[row, gene] = 0.0
    counts[row, gene] = 0.0
    assert stored.nnz == sp.csr_matrix(counts).nnz + 1
    mine, plain = propagate(graph, stored, budget, key=5), run(graph, counts, budget)
    assert mine.values.tobytes() == plain.values.tobytes()


def test_the_callers_counts_and_budget_stay_as_they_were():
    graph, counts, budget = make_slice()
    matrix = sp.csr_matrix(counts)
    before = (matrix.data.copy(), budget.copy())
    propagate(graph, matrix, budget, key=1)
    np.testing.assert_array_equal(matrix.data, before[0])
    np.testing.assert_array_equal(budget, before[1])
    assert matrix.data.flags.writeable


@pytest.mark.parametrize("budget", [np.full(40, -1), np.zeros(39, int), np.zeros(40), np.full(40, 2**40)])
def test_a_budget_that_does_not_fit_is_refused(budget):
    graph, counts, _ = make_slice()
    with pytest.raises(InputError, match="budget"):
        run(graph, counts, budget)


def test_counts_of_another_slice_are_refused():
    graph, counts, budget = make_slice()
    with pytest.raises(InputError, match="one slice"):
        run(graph, counts[:-1], budget)


@pytest.mark.parametrize("setting", [{"max_iterations": 0}, {"tolerance": 0.0}, {"tolerance": np.nan}])
def test_settings_that_are_not_positive_are_refused(setting):
    with pytest.raises(InputError, match="positive"):
        run(*make_slice(), **setting)


def test_a_result_checks_itself():
    with pytest.raises(InputError):
        Propagated(np.zeros(3, np.float32), 1, 0.0)
    with pytest.raises(InputError):
        Propagated(np.zeros((1, 1), np.float32), 1, np.nan)
