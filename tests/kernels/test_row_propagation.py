from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from parity.textbook import splitmix

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.graph import Graph, build_graph
from lloki_atlas.kernels.neighbors import Neighbors, nearest_neighbors
from lloki_atlas.kernels.propagation import propagate
from lloki_atlas.kernels.row_propagation import propagate_rows

SUPPORTS = ("redrawn", "largest")
RULES = st.sampled_from(SUPPORTS)


def make_slice(n=40, n_genes=15, seed=0, density=0.25):
    rng = np.random.default_rng(seed)
    counts = (rng.poisson(3, (n, n_genes)) * (rng.random((n, n_genes)) < density)).astype(np.float32)
    xy = (rng.random((n, 2)) * 200).astype(np.float32)
    graph = build_graph(nearest_neighbors(counts, n_neighbors=5), xy, bandwidth_um=80.0)
    return graph, counts, rng.integers(0, n_genes // 2 + 1, n).astype(np.int32)


def dense(graph):
    return sp.csr_array((graph.weights, graph.indices, graph.indptr), shape=(graph.n_cells,) * 2).toarray()


def run(graph, values, budget, **settings):
    defaults = {"key": 5, "support": "redrawn", "stopping": "relative"}
    return propagate_rows(graph, sp.csr_matrix(values), budget, **{**defaults, **settings})


def textbook(A, X0, budget, *, key, support, stopping, max_iterations=40, tolerance=1e-3, threshold=15.0):
    """X ← (1 − M)∘(A X) + M∘X0, then of each cell's filled-in entries the `budget` best by hash or by value."""
    observed, A = X0 != 0, A.astype(np.float64)
    X = X0.astype(np.float64)
    for iteration in range(max_iterations):
        Y = np.where(observed, X0, A @ X)
        for i in range(len(Y)):
            filled = np.flatnonzero(~observed[i] & (Y[i] != 0))
            if support == "redrawn":
                order = np.argsort(np.array([splitmix(key, iteration, i, int(g)) for g in filled], dtype=np.uint64))
            else:
                order = np.lexsort((filled, -Y[i, filled]))
            Y[i, filled[order[budget[i] :]]] = 0.0
        change, size = np.linalg.norm(Y - X), np.linalg.norm(Y[~observed])
        relative = change / size if size > 0 else 0.0
        X = Y
        if relative < tolerance if stopping == "relative" else change < threshold:
            break
    return X, iteration + 1, relative


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 40),
    n_genes=st.integers(1, 15),
    seed=st.integers(0, 99),
    key=st.integers(0, 2**64 - 1),
    stopping=st.sampled_from(["relative", "absolute"]),
)
def test_a_redrawn_support_equals_the_textbook(n, n_genes, seed, key, stopping):
    graph, counts, budget = make_slice(n, n_genes, seed)
    rules = {"key": key, "support": "redrawn", "stopping": stopping}
    mine = run(graph, counts, budget, **rules)
    expected, n_iterations, relative = textbook(dense(graph), counts, budget, **rules)
    np.testing.assert_array_equal(mine.values != 0, expected != 0)
    np.testing.assert_allclose(mine.values, expected, atol=1e-5)
    assert mine.n_iterations == n_iterations
    # near the end of a converging iteration the change itself is rounding
    assert mine.relative_change == pytest.approx(relative, rel=1e-2, abs=1e-5)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 40), seed=st.integers(0, 99), iterations=st.integers(1, 8))
def test_the_largest_support_equals_the_textbook(n, seed, iterations):
    # continuous values: no two differ by less than float32 can tell, which would be a tie here and none there
    graph, counts, budget = make_slice(n, 15, seed)
    values = (counts * np.random.default_rng(seed).uniform(0.5, 1, counts.shape)).astype(np.float32)
    rules = {"key": 0, "support": "largest", "stopping": "relative", "max_iterations": iterations, "tolerance": 1e-9}
    mine = run(graph, values, budget, **rules)
    expected, _, _ = textbook(dense(graph), values, budget, **rules)
    np.testing.assert_allclose(mine.values, expected, atol=1e-5)


def test_equal_values_are_kept_by_smaller_gene():
    graph = Graph(np.array([0, 2, 4]), np.array([0, 1, 0, 1], np.int32), np.full(4, 0.5, np.float32))
    counts = np.array([[1, 0, 0, 0, 0, 0], [0, 2, 4, 2, 2, 4]], np.float32)
    values = run(graph, counts, [4, 0], support="largest", max_iterations=1).values
    assert values[0].tolist() == [1, 1, 2, 1, 0, 2]


@settings(deadline=None, max_examples=25)
@given(support=RULES, seed=st.integers(0, 99), iterations=st.integers(1, 6))
def test_observed_values_are_restored_exactly(support, seed, iterations):
    graph, counts, budget = make_slice(seed=seed)
    values = run(graph, counts, budget, support=support, max_iterations=iterations).values
    assert values[counts != 0].tobytes() == counts[counts != 0].tobytes()


@settings(deadline=None, max_examples=25)
@given(support=RULES, seed=st.integers(0, 99), iterations=st.integers(1, 6))
def test_a_cell_over_its_budget_is_filled_up_to_it_exactly(support, seed, iterations):
    graph, counts, budget = make_slice(seed=seed)
    values = run(graph, counts, budget, support=support, max_iterations=iterations, tolerance=1e-9).values
    filled = ((values != 0) & (counts == 0)).sum(axis=1)
    assert (filled <= budget).all()
    exceeded = ((dense(graph) @ counts != 0) & (counts == 0)).sum(axis=1) > budget
    assert exceeded.any()
    np.testing.assert_array_equal(filled[exceeded], budget[exceeded])


@settings(deadline=None, max_examples=25)
@given(support=RULES, n=st.integers(1, 40), seed=st.integers(0, 99), n_threads=st.integers(2, 50))
def test_threads_change_no_bit(support, n, seed, n_threads):
    graph, counts, budget = make_slice(n, seed=seed)
    one = run(graph, counts, budget, support=support, max_iterations=5)
    many = run(graph, counts, budget, support=support, max_iterations=5, n_threads=n_threads)
    assert one.values.tobytes() == many.values.tobytes()
    assert (one.n_iterations, one.relative_change) == (many.n_iterations, many.relative_change)


def star(n_leaves, n_genes):
    """Cells without counts that all see one full cell: each can be filled with any gene."""
    indptr = np.arange(n_leaves + 2)
    counts = np.zeros((n_leaves + 1, n_genes), np.float32)
    counts[0] = 1
    return Graph(indptr, np.zeros(n_leaves + 1, np.int32), np.ones(n_leaves + 1, np.float32)), counts


def test_a_redrawn_support_is_uniform_over_genes_and_pairs_of_them():
    n_leaves, n_genes, budget = 20000, 12, 5
    graph, counts = star(n_leaves, n_genes)
    kept = run(graph, counts, np.full(n_leaves + 1, budget), key=3, max_iterations=1).values[1:] != 0
    share = budget / n_genes
    genes = kept.sum(axis=0) - n_leaves * share
    # a cell keeps a fixed number of genes, which leaves G − 1 degrees of freedom
    chi_square = (genes**2).sum() / (n_leaves * share * (1 - share)) * (n_genes - 1) / n_genes
    assert 2.0 < chi_square < 28.0  # 0.2 % and 99.7 % of chi-square with 11 degrees of freedom
    pairs = (kept.T.astype(float) @ kept)[np.triu_indices(n_genes, 1)] / n_leaves
    expected = share * (budget - 1) / (n_genes - 1)
    np.testing.assert_allclose(pairs, expected, atol=4.5 * np.sqrt(expected * (1 - expected) / n_leaves))


def test_a_redrawn_support_is_independent_from_one_iteration_to_the_next():
    n_leaves, n_genes, budget = 5000, 12, 5
    graph, counts = star(n_leaves, n_genes)
    first, second = (
        run(graph, counts, np.full(n_leaves + 1, budget), max_iterations=n, tolerance=1e-9).values[1:] != 0
        for n in (1, 2)
    )
    overlap = (first & second).sum() / first.sum()
    assert overlap == pytest.approx(budget / n_genes, abs=0.015)


def test_a_redrawn_support_never_settles_and_the_largest_does():
    graph, counts, budget = make_slice()
    redrawn, largest = (run(graph, counts, budget, support=support) for support in SUPPORTS)
    assert redrawn.n_iterations == 40
    assert redrawn.relative_change > 0.1
    assert largest.n_iterations < 40
    assert largest.relative_change < 1e-3


def test_another_key_redraws_others_and_does_not_touch_the_largest():
    graph, counts, budget = make_slice()
    for support, same in (("redrawn", False), ("largest", True)):
        a, b = (run(graph, counts, budget, support=support, key=key).values.tobytes() for key in (1, 2))
        assert (a == b) is same


@pytest.mark.parametrize("support", SUPPORTS)
def test_a_budget_of_every_gene_is_plain_propagation(support):
    graph, counts, budget = make_slice()
    room = np.full_like(budget, 15)
    mine = run(graph, counts, room, support=support)
    other = propagate(graph, sp.csr_matrix(counts), room, key=5)
    np.testing.assert_allclose(mine.values, other.values, atol=1e-6)
    assert mine.n_iterations == other.n_iterations


@pytest.mark.parametrize("support", SUPPORTS)
def test_a_budget_of_zero_leaves_the_counts_and_stops_at_once(support):
    graph, counts, budget = make_slice()
    result = run(graph, counts, np.zeros_like(budget), support=support)
    np.testing.assert_array_equal(result.values, counts)
    assert (result.n_iterations, result.relative_change) == (1, 0.0)


def test_an_absolute_threshold_stops_where_the_change_of_the_whole_matrix_falls_below_it():
    graph, counts, budget = make_slice()
    first = run(graph, counts, budget, max_iterations=1).values
    change = float(np.linalg.norm(first.astype(np.float64) - counts))
    for factor, n_iterations in ((1.0001, 1), (0.9999, 2)):
        setting = {"stopping": "absolute", "absolute_threshold": change * factor, "max_iterations": 2}
        assert run(graph, counts, budget, **setting).n_iterations == n_iterations


def test_a_slice_of_one_cell_and_one_without_counts_stay_as_they_are():
    nobody = Neighbors(np.full((1, 3), -1, np.int32), np.full((1, 3), np.inf, np.float32))
    graph = build_graph(nobody, np.zeros((1, 2)), bandwidth_um=0.0)
    counts = np.array([[0, 2, 0]], np.float32)
    np.testing.assert_array_equal(run(graph, counts, [2], n_threads=3).values, counts)
    graph, counts, budget = make_slice()
    empty = run(graph, np.zeros_like(counts), budget)
    assert not empty.values.any()
    assert empty.relative_change == 0.0


def test_a_stored_zero_is_not_observed():
    graph, counts, budget = make_slice()
    stored = sp.csr_matrix(counts)
    row = int(np.flatnonzero(counts.any(axis=1))[0])
    gene = int(np.flatnonzero(counts[row])[0])
    stored[row, gene] = counts[row, gene] = 0.0
    assert stored.nnz == sp.csr_matrix(counts).nnz + 1
    mine = propagate_rows(graph, stored, budget, key=5, support="largest", stopping="relative")
    assert mine.values.tobytes() == run(graph, counts, budget, support="largest").values.tobytes()


def test_the_callers_values_stay_as_they_were():
    graph, counts, budget = make_slice()
    matrix = sp.csr_matrix(counts)
    before = matrix.data.copy()
    propagate_rows(graph, matrix, budget, key=1, support="largest", stopping="relative")
    np.testing.assert_array_equal(matrix.data, before)


@pytest.mark.parametrize("budget", [np.full(40, -1), np.zeros(39, int), np.zeros(40)])
def test_a_budget_that_does_not_fit_is_refused(budget):
    graph, counts, _ = make_slice()
    with pytest.raises(InputError, match="budget"):
        run(graph, counts, budget)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"support": "smallest"}, "support"),
        ({"stopping": "never"}, "stopping"),
        ({"max_iterations": 0}, "positive"),
        ({"tolerance": 0.0}, "positive"),
        ({"absolute_threshold": np.nan}, "positive"),
        ({"n_threads": 0}, "positive"),
    ],
)
def test_a_setting_out_of_bounds_is_refused(setting, message):
    graph, counts, budget = make_slice()
    with pytest.raises(InputError, match=message):
        run(graph, counts, budget, **setting)


def test_another_slices_or_negative_values_and_negative_weights_are_refused():
    graph, counts, budget = make_slice()
    with pytest.raises(InputError, match="one slice"):
        run(graph, counts[:-1], budget)
    with pytest.raises(InputError, match="negative"):
        run(graph, -counts, budget)
    with pytest.raises(InputError, match="weight"):
        run(Graph(graph.indptr, graph.indices, -graph.weights), counts, budget)
