from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import textbook

from lloki_atlas.kernels.support import draw_supports, gene_words, mark_observed

KEY = 77


def make_case(n, n_genes, seed, *, density=0.2):
    rng = np.random.default_rng(seed)
    joined = rng.random((n, n)) < 3 / n
    weights = np.where(joined | joined.T, rng.random((n, n)) + 0.1, 0).astype(np.float32)
    graph = sp.csr_matrix(weights)
    observed = rng.random((n, n_genes)) < density
    return graph, observed, rng.integers(0, n_genes + 1, n).astype(np.int32)


def to_bits(matrix):
    counts = sp.csr_matrix(matrix.astype(np.float32))
    bits = np.zeros((matrix.shape[0], gene_words(matrix.shape[1])), dtype=np.uint64)
    mark_observed(counts.indptr, counts.indices, counts.data, 0, bits)
    return bits


def from_bits(bits, n_genes):
    genes = np.arange(n_genes)
    return (bits[:, genes // 64] >> (genes % 64).astype(np.uint64) & np.uint64(1)).astype(bool)


def draw(graph, observed, budget, *, key=KEY, max_iterations=10, n_threads=1):
    arrays = graph.indptr.astype(np.int64), graph.indices.astype(np.int32), graph.data
    return draw_supports(arrays, to_bits(observed), budget, key=key, max_iterations=max_iterations, n_threads=n_threads)


def plain(graph, observed, budget, *, max_iterations=10):
    """Sets of genes, one cell after the other."""
    n, n_genes = observed.shape
    ranks = textbook.hashes(KEY, n, n_genes)
    known = [set(np.flatnonzero(row).tolist()) for row in observed]
    state, allowed, frozen_at = [set(genes) for genes in known], [set() for _ in known], [0] * n
    for iteration in range(1, max_iterations + 1):
        following = []
        for i in range(n):
            edges = range(graph.indptr[i], graph.indptr[i + 1])
            reached = set().union(*(state[graph.indices[p]] for p in edges if graph.data[p] != 0)) - known[i]
            if not frozen_at[i] and len(reached) > budget[i]:
                frozen_at[i] = iteration
                allowed[i] = set(sorted(reached, key=lambda gene: ranks[i, gene])[: budget[i]])
            following.append(known[i] | (reached & allowed[i] if frozen_at[i] else reached))
        state = following
    return allowed, frozen_at


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 25), n_genes=st.integers(1, 140), seed=st.integers(0, 9999), max_iterations=st.integers(1, 8))
def test_supports_are_those_of_sets(n, n_genes, seed, max_iterations):
    case = make_case(n, n_genes, seed)
    support = draw(*case, max_iterations=max_iterations)
    allowed, frozen_at = plain(*case, max_iterations=max_iterations)
    assert support.frozen_at.tolist() == frozen_at
    assert [set(np.flatnonzero(row).tolist()) for row in from_bits(support.allowed, n_genes)] == allowed


@settings(deadline=None, max_examples=25)
@given(n_genes=st.integers(1, 200), seed=st.integers(0, 9999), key=st.integers(0, 2**64 - 1))
def test_a_full_cell_is_allowed_exactly_its_budget_and_others_have_no_mark(n_genes, seed, key):
    graph, observed, budget = make_case(30, n_genes, seed)
    support = draw(graph, observed, budget, key=key)
    allowed = from_bits(support.allowed, n_genes)
    np.testing.assert_array_equal(allowed.sum(axis=1), np.where(support.frozen_at > 0, budget, 0))
    assert not (allowed & observed).any()
    assert not from_bits(support.allowed, 64 * support.allowed.shape[1])[:, n_genes:].any()


@pytest.mark.parametrize("n_threads", [2, 3, 8])
def test_threads_change_nothing(n_threads):
    case = make_case(100, 130, 1)
    one, other = draw(*case), draw(*case, n_threads=n_threads)
    assert one.allowed.tobytes() == other.allowed.tobytes()
    assert one.frozen_at.tobytes() == other.frozen_at.tobytes()


def chain(weights):
    """A path of cells, the first of which has all of four genes."""
    n = len(weights) + 1
    rows, columns = np.arange(n - 1), np.arange(1, n)
    graph = sp.coo_matrix((np.tile(weights, 2), (np.r_[rows, columns], np.r_[columns, rows])), shape=(n, n)).tocsr()
    observed = np.zeros((n, 4), dtype=bool)
    observed[0] = True
    return graph, observed


def test_genes_go_one_edge_further_in_each_iteration():
    graph, observed = chain(np.ones(4, np.float32))
    support = draw(graph, observed, np.full(5, 3, np.int32))
    assert support.frozen_at.tolist() == [0, 1, 0, 0, 0]  # three genes go on from there: nobody else is too full
    assert from_bits(support.allowed, 4).sum(axis=1).tolist() == [0, 3, 0, 0, 0]
    tight = draw(graph, observed, np.array([4, 4, 3, 2, 1], np.int32))
    assert tight.frozen_at.tolist() == [0, 0, 2, 3, 4]


def test_an_edge_of_weight_zero_carries_nothing():
    graph, observed = chain(np.array([1, 0, 1], np.float32))
    assert graph.nnz == 6
    assert draw(graph, observed, np.zeros(4, np.int32)).frozen_at.tolist() == [0, 1, 0, 0]


def test_cells_that_are_reached_after_the_last_iteration_are_not_drawn():
    graph, observed = chain(np.ones(4, np.float32))
    budget = np.array([4, 4, 4, 4, 1], np.int32)
    assert draw(graph, observed, budget, max_iterations=3).frozen_at.tolist() == [0] * 5
    assert draw(graph, observed, budget, max_iterations=4).frozen_at.tolist() == [0, 0, 0, 0, 4]


def test_a_budget_that_is_met_exactly_draws_nothing():
    graph, observed = chain(np.ones(1, np.float32))
    assert draw(graph, observed, np.array([0, 4], np.int32)).frozen_at.tolist() == [0, 0]
    assert draw(graph, observed, np.array([0, 3], np.int32)).frozen_at.tolist() == [0, 1]


@pytest.mark.parametrize(("n_genes", "words"), [(0, 0), (1, 1), (64, 1), (65, 2), (128, 2), (129, 3)])
def test_a_word_holds_sixty_four_genes(n_genes, words):
    assert gene_words(n_genes) == words


@pytest.mark.parametrize("n_genes", [1, 63, 64, 65, 200])
def test_observed_entries_are_marked_at_their_bits(n_genes):
    observed = np.random.default_rng(n_genes).random((20, n_genes)) < 0.4
    np.testing.assert_array_equal(from_bits(to_bits(observed), n_genes), observed)


def test_stored_zeros_are_not_marked_and_rows_begin_where_they_are_told():
    counts = sp.csr_matrix((np.array([1, 0, 2], np.float32), np.array([0, 1, 2]), np.array([0, 2, 3])), shape=(2, 3))
    bits = np.zeros((5, 1), dtype=np.uint64)
    mark_observed(counts.indptr, counts.indices, counts.data, 3, bits)
    assert bits.ravel().tolist() == [0, 0, 0, 1, 4]
