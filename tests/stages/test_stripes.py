"""Stripes along x, as in the published code: when there are several, which cells they hold, what joins them again."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from lloki_atlas.config import PropagationConfig
from lloki_atlas.kernels.graph import Graph, build_graph
from lloki_atlas.kernels.neighbors import nearest_neighbors
from lloki_atlas.kernels.transport import sparsity_histogram
from lloki_atlas.stages import propagate, stripes
from lloki_atlas.stages.panels import select_panel
from lloki_atlas.stages.stripes import cut_stripes, join_stripes


def places(n, seed=0):
    return (np.random.default_rng(seed).random((n, 2)) * 1000).astype(np.float32)


@pytest.mark.parametrize(
    ("n", "technology", "count"),
    [
        (1, "MERFISH", 1),
        (29_999, "MERFISH", 1),
        (29_999, "Xenium", 1),
        (30_000, "MERFISH", 2),
        (30_000, "", 2),
        (30_000, "Xenium", 4),
        (30_000, "10x xenium v1", 4),
        (30_001, "XENIUM", 4),
    ],
)
def test_large_slices_are_cut_in_two_and_xenium_in_four(n, technology, count):
    assert len(cut_stripes(places(n), technology)) == count


@settings(deadline=None, max_examples=30)
@given(n=st.integers(4, 200), seed=st.integers(0, 99), technology=st.sampled_from(["Xenium", "MERFISH"]))
def test_stripes_are_a_partition_of_the_rows_along_x(n, seed, technology):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stripes, "SPLIT_CELLS", 4)
        xy = places(n, seed)
        parts = cut_stripes(xy, technology)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for left, right in itertools.pairwise(parts):
        assert xy[left, 0].max() <= xy[right, 0].min()
    assert all((np.diff(rows) > 0).all() for rows in parts)


def test_cells_of_one_x_are_cut_by_their_rows(monkeypatch):
    monkeypatch.setattr(stripes, "SPLIT_CELLS", 4)
    assert [rows.tolist() for rows in cut_stripes(np.zeros((5, 2)), "")] == [[0, 1, 2], [3, 4]]


def dense(graph):
    return csr_matrix((graph.weights, graph.indices, graph.indptr), shape=(graph.n_cells,) * 2).toarray()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), count=st.integers(1, 4), loops=st.booleans())
def test_a_joined_graph_has_the_edges_of_each_stripe_and_none_across(seed, count, loops):
    rng, n = np.random.default_rng(seed), 30
    parts = [np.sort(rows) for rows in np.array_split(rng.permutation(n), count)]
    graphs = []
    for rows in parts:
        lists = nearest_neighbors(rng.normal(size=(len(rows), 4)).astype(np.float32), n_neighbors=3)
        graphs.append(build_graph(lists, places(len(rows)), bandwidth_um=300.0, self_loops=loops))
    joined = join_stripes(parts, graphs)
    expected = np.zeros((n, n), np.float32)
    for rows, graph in zip(parts, graphs, strict=True):
        expected[np.ix_(rows, rows)] = dense(graph)
    np.testing.assert_array_equal(dense(joined), expected)
    for i in range(n):
        assert (np.diff(joined.indices[joined.indptr[i] : joined.indptr[i + 1]]) > 0).all()


def test_an_edge_of_weight_zero_stays_an_edge():
    nothing = Graph(np.array([0, 1]), np.zeros(1, np.int32), np.zeros(1, np.float32))
    joined = join_stripes([np.array([1]), np.array([0])], [nothing, nothing])
    assert joined.indptr.tolist() == [0, 1, 2]


N, N_GENES = 90, 14
SYMBOLS = tuple(f"G{gene:02d}" for gene in range(N_GENES))
SETTINGS = PropagationConfig(mode="reference", n_neighbors=6, max_iterations=4)


def make_case(seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.8, (N, N_GENES)).astype(np.float32)
    counts[5] = 0
    return counts, places(N)


def run(counts, xy, *, settings=SETTINGS, technology="Xenium", **options):
    panel = select_panel(csr_matrix(counts), SYMBOLS, ["exact"] * N_GENES, SYMBOLS)
    reference = np.random.default_rng(1).integers(5, 15, 40)
    return propagate.run_slice(
        panel,
        xy,
        own_histogram=sparsity_histogram((counts > 0).sum(axis=1).astype(np.int32), N_GENES),
        reference_histogram=sparsity_histogram(np.minimum(reference, N_GENES).astype(np.int32), N_GENES),
        reference_histogram_all=sparsity_histogram(reference.astype(np.int32) * 2, 40),
        bandwidth_um=100.0,
        settings=settings,
        key=3,
        technology=technology,
        **options,
    )


@pytest.mark.parametrize(("technology", "count"), [("Xenium", 4), ("MERFISH", 2)])
def test_results_of_stripes_are_in_the_order_of_cells(technology, count, monkeypatch):
    monkeypatch.setattr(stripes, "SPLIT_CELLS", 40)
    counts, xy = make_case()
    result = run(counts, xy, technology=technology)
    np.testing.assert_array_equal(result.values[counts > 0], counts[counts > 0])
    filled, own = result.filled, (counts > 0).sum(axis=1)
    np.testing.assert_array_equal(filled.budget, np.maximum(filled.target_nonzeros - own, 0))
    np.testing.assert_array_equal(filled.achieved_nonzeros, (result.values != 0).sum(axis=1))
    assert (filled.achieved_nonzeros <= own + filled.budget).all()
    assert (filled.achieved_nonzeros > own).any()
    stripe = np.empty(N, dtype=int)
    for number, rows in enumerate(np.array_split(np.argsort(xy[:, 0], kind="stable"), count)):
        stripe[rows] = number
    edges = np.repeat(np.arange(N), np.diff(result.graph.indptr))
    assert result.graph.n_cells == N
    assert (stripe[edges] == stripe[result.graph.indices]).all()
    np.testing.assert_array_equal(dense(result.graph), dense(result.graph).T)


def test_each_stripe_is_a_slice_of_its_own(monkeypatch):
    monkeypatch.setattr(stripes, "SPLIT_CELLS", 40)
    settings = PropagationConfig(
        mode="reference", support="largest", n_neighbors=6, max_iterations=4, bandwidth="pairs"
    )
    counts, xy = make_case()
    whole = run(counts, xy, settings=settings, technology="MERFISH")
    monkeypatch.setattr(stripes, "SPLIT_CELLS", 10**6)
    for rows in np.array_split(np.argsort(xy[:, 0], kind="stable"), 2):
        rows = np.sort(rows)
        part = run(counts[rows], xy[rows], settings=settings)  # nothing is drawn, so the key does not matter
        np.testing.assert_array_equal(part.values, whole.values[rows])
        np.testing.assert_array_equal(part.filled.target_nonzeros, whole.filled.target_nonzeros[rows])
        np.testing.assert_array_equal(dense(part.graph), dense(whole.graph)[np.ix_(rows, rows)])


def test_threads_change_no_byte_of_stripes(monkeypatch):
    monkeypatch.setattr(stripes, "SPLIT_CELLS", 40)
    one, two = (run(*make_case(), n_threads=n) for n in (1, 2))
    assert one.values.tobytes() == two.values.tobytes()
    assert one.graph.weights.tobytes() == two.graph.weights.tobytes()


def test_a_small_slice_is_not_cut():
    counts, xy = make_case()
    whole = run(counts, xy)
    plain = run(counts, xy, settings=PropagationConfig(mode="reference", split="none", n_neighbors=6, max_iterations=4))
    assert whole.values.tobytes() == plain.values.tobytes()
