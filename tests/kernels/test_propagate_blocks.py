"""Propagation by blocks of genes: no byte depends on how wide they are, where they lie, or who computes them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import textbook

from lloki_atlas.errors import InputError
from lloki_atlas.kernels import blocks, propagation
from lloki_atlas.kernels.graph import Graph, build_graph
from lloki_atlas.kernels.neighbors import nearest_neighbors
from lloki_atlas.kernels.propagation import projected_bytes, propagate, propagate_blocks
from lloki_atlas.kernels.rows import Rows
from lloki_atlas.store.scratch import ScratchBlocks

N = 60
WIDTHS = (64, 32, 16)
GENES = (1, 15, 16, 17, 64, 65, 130)


def make_slice(n=N, n_genes=70, seed=0, *, bandwidth_um=80.0):
    rng = np.random.default_rng(seed)
    counts = (rng.poisson(3, (n, n_genes)) * (rng.random((n, n_genes)) < 0.15)).astype(np.float32)
    if n > 8:
        counts[3] = 0
    xy = (rng.random((n, 2)) * 200).astype(np.float32)
    graph = build_graph(nearest_neighbors(counts, n_neighbors=5), xy, bandwidth_um=bandwidth_um)
    return graph, counts, rng.integers(0, n_genes // 2 + 1, n).astype(np.int32)


def dense(graph):
    return sp.csr_array((graph.weights, graph.indices, graph.indptr), shape=(graph.n_cells,) * 2).toarray()


def run(graph, counts, budget, **settings):
    given = counts if isinstance(counts, Rows) else sp.csr_matrix(counts)
    return propagate_blocks(graph, given, budget, **{"key": 5, "max_iterations": 12, **settings})


def outcome(found):
    return found.toarray().tobytes(), found.n_iterations, found.relative_change


def narrow(monkeypatch, width, *, n=N, size=4):
    """Make blocks of that many genes."""
    monkeypatch.setattr(blocks, "CACHE_BYTES", n * width * size)
    assert blocks.block_width(n, "float32" if size == 4 else "float16") == width


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("n_genes", GENES)
def test_the_width_of_blocks_changes_no_value(n_genes, storage, monkeypatch):
    case, size = make_slice(n_genes=n_genes), {"float32": 4, "float16": 2}[storage]
    found = []
    for width in WIDTHS:
        narrow(monkeypatch, width, size=size)
        found.append(outcome(run(*case, storage=storage)))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("n_threads", [2, 3])
def test_threads_change_no_byte(n_threads, storage, monkeypatch):
    monkeypatch.setattr(propagation, "ROWS", 16)
    case = make_slice()
    assert outcome(run(*case, storage=storage, n_threads=n_threads)) == outcome(run(*case, storage=storage))


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("width", WIDTHS)
def test_blocks_on_disk_have_the_bytes_of_blocks_in_memory(width, storage, monkeypatch, tmp_path):
    narrow(monkeypatch, width, size={"float32": 4, "float16": 2}[storage])
    case = make_slice(n_genes=130)
    made = []

    def on_disk(*form):
        made.append(ScratchBlocks(tmp_path, *form))
        return made[-1]

    assert outcome(run(*case, storage=storage, make_blocks=on_disk)) == outcome(run(*case, storage=storage))
    assert len(made) == 1
    assert len(list(tmp_path.iterdir())) == -(-130 // width)


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_counts_that_are_read_when_sliced_give_the_same_bytes(storage, monkeypatch):
    monkeypatch.setattr(propagation, "ROWS", 16)
    graph, counts, budget = make_slice()
    matrix = sp.csr_matrix(counts)
    asked = []

    def read(start, stop):
        asked.append(stop - start)
        return matrix[start:stop]

    found = outcome(run(graph, Rows(matrix.shape, read), budget, storage=storage))
    assert found == outcome(run(graph, counts, budget, storage=storage))
    reads = [length for length in asked if length != N]  # toarray asks for all
    assert max(reads) == 16


def test_rows_are_sliced_like_a_matrix():
    found = run(*make_slice(n_genes=130))
    whole = found.toarray()
    assert found.shape == whole.shape == (N, 130)
    for part in (slice(0, 7), slice(7, 60), slice(59, None), slice(4, 4)):
        np.testing.assert_array_equal(found[part], whole[part])


def test_nonzeros_are_counted_in_pieces(monkeypatch):
    found = run(*make_slice())
    monkeypatch.setattr(propagation, "ROWS", 7)
    assert found.count_nonzeros().dtype == np.int32
    np.testing.assert_array_equal(found.count_nonzeros(), np.count_nonzero(found.toarray(), axis=1))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n_genes", [17, 65, 130])
def test_values_and_iterations_equal_the_textbook(n_genes, width, monkeypatch):
    narrow(monkeypatch, width)
    graph, counts, budget = make_slice(n_genes=n_genes)
    found = run(graph, counts, budget, max_iterations=40, tolerance=1e-3)
    expected, n_iterations = textbook.propagate(
        dense(graph).astype(np.float64),
        counts,
        budget,
        textbook.hashes(5, N, n_genes),
        max_iterations=40,
        tolerance=1e-3,
    )
    np.testing.assert_array_equal(found.toarray() != 0, expected != 0)
    np.testing.assert_allclose(found.toarray(), expected, rtol=1e-4, atol=1e-5)
    assert found.n_iterations == n_iterations


def test_all_values_at_once_are_those_of_the_blocks():
    graph, counts, budget = make_slice()
    whole = propagate(graph, sp.csr_matrix(counts), budget, key=5, max_iterations=12)
    assert (whole.values.tobytes(), whole.n_iterations, whole.relative_change) == outcome(run(graph, counts, budget))


def both_storages(case, **settings):
    return (run(*case, storage=storage, **settings) for storage in ("float32", "float16"))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), n=st.integers(1, 50), n_genes=st.integers(1, 80), limit=st.integers(1, 3))
def test_half_precision_keeps_the_support_of_values_that_it_can_tell_from_zero(seed, n, n_genes, limit):
    case = make_slice(n, n_genes, seed, bandwidth_um=1000.0)  # no weight is much smaller than others
    single, half = both_storages(case, max_iterations=limit, tolerance=1e-12)
    values, counts = half.toarray(), case[1]
    np.testing.assert_array_equal(values != 0, single.toarray() != 0)
    np.testing.assert_allclose(values, single.toarray(), rtol=2e-3)
    assert values[counts != 0].tobytes() == counts[counts != 0].tobytes()
    np.testing.assert_array_equal(half.count_nonzeros(), single.count_nonzeros())


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), limit=st.integers(1, 40), largest=st.sampled_from([1, 200]))
def test_half_precision_keeps_every_entry_that_is_not_zero(seed, limit, largest):
    graph, counts, budget = make_slice(50, 40, seed, bandwidth_um=30.0)  # weights of very different sizes
    counts[seed % 50] *= largest
    single, half = both_storages((graph, counts, budget), max_iterations=limit, tolerance=1e-12)
    np.testing.assert_array_equal(half.toarray() != 0, single.toarray() != 0)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 999))
def test_half_precision_keeps_three_digits_of_values_that_are_not_small(seed):
    case = make_slice(50, 40, seed)
    single, half = (found.toarray() for found in both_storages(case, max_iterations=12, tolerance=1e-12))
    large = single > 1e-3 * case[1].max()
    np.testing.assert_allclose(half[large], single[large], rtol=3e-3)


@pytest.mark.parametrize("largest", [1.0, 3.0, 4097.0, 1e6])
def test_observed_counts_that_half_precision_cannot_hold_are_exact(largest):
    graph, counts, budget = make_slice()
    counts = counts * np.float32(largest) / counts.max()
    values = run(graph, counts, budget, storage="float16").toarray()
    assert values[counts != 0].tobytes() == counts[counts != 0].tobytes()
    assert np.isfinite(values).all()


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 999),
    n=st.integers(1, 50),
    n_genes=st.integers(1, 140),
    limit=st.integers(1, 10),
    storage=st.sampled_from(["float32", "float16"]),
)
def test_observed_counts_stay_and_no_cell_is_filled_beyond_its_budget(seed, n, n_genes, limit, storage):
    graph, counts, budget = make_slice(n, n_genes, seed)
    values = run(graph, counts, budget, storage=storage, max_iterations=limit).toarray()
    observed = counts != 0
    assert values[observed].tobytes() == counts[observed].tobytes()
    assert ((values != 0).sum(axis=1) - observed.sum(axis=1) <= budget).all()
    assert (values >= 0).all()


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 999), limit=st.integers(1, 8))
def test_with_no_limit_of_genes_permuting_cells_permutes_values(seed, limit):
    graph, counts, _ = make_slice(40, 30, seed)
    order = np.random.default_rng(seed).permutation(40)
    A = sp.csr_matrix(dense(graph)[np.ix_(order, order)])
    A.sort_indices()
    moved = Graph(A.indptr.astype(np.int64), A.indices.astype(np.int32), A.data)
    budget = np.full(40, 30, dtype=np.int32)
    settings = {"max_iterations": limit, "tolerance": 1e-9}
    whole = run(graph, counts, budget, **settings).toarray()
    # a sum in another order is another float32
    np.testing.assert_allclose(run(moved, counts[order], budget, **settings).toarray(), whole[order], rtol=1e-4)


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_a_budget_of_zero_leaves_the_counts(storage):
    graph, counts, budget = make_slice()
    found = run(graph, counts, np.zeros_like(budget), storage=storage)
    np.testing.assert_array_equal(found.toarray(), counts)
    assert (found.n_iterations, found.relative_change) == (1, 0.0)


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_one_cell_keeps_its_counts(storage):
    graph, counts, _ = make_slice(1, 70)
    np.testing.assert_array_equal(run(graph, counts, [70], storage=storage).toarray(), counts)


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_cells_without_counts_stay_empty(storage):
    graph, counts, budget = make_slice()
    found = run(graph, np.zeros_like(counts), budget + 1, storage=storage)
    assert not found.toarray().any()
    assert found.relative_change == 0.0


def test_counts_without_genes_are_no_error():
    graph, _, budget = make_slice()
    assert run(graph, np.zeros((N, 0), np.float32), budget).toarray().shape == (N, 0)


def test_a_stored_zero_is_not_observed():
    graph, counts, budget = make_slice()
    stored = sp.csr_matrix(counts)
    stored.data[::5] = 0.0
    plain = sp.csr_matrix(stored.toarray())
    assert plain.nnz < stored.nnz
    assert outcome(propagate_blocks(graph, stored, budget, key=5)) == outcome(
        propagate_blocks(graph, plain, budget, key=5)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": np.full(N, -1)}, "negative"),
        ({"budget": np.zeros(N - 1, int)}, "budget"),
        ({"counts": np.ones((N - 1, 3), np.float32)}, "one slice"),
        ({"counts": -np.ones((N, 3), np.float32)}, "counts"),
        ({"max_iterations": 0}, "positive"),
        ({"tolerance": 0.0}, "positive"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    graph, counts, budget = make_slice()
    given = {"counts": counts, "budget": budget, **change}
    with pytest.raises(InputError, match=message):
        run(graph, **given)


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_blocks_on_disk_are_projected_to_need_less_memory(storage):
    inside, outside = (projected_bytes(500_000, 500, storage=storage, in_memory=where) for where in (True, False))
    values = 500_000 * 500 * {"float32": 4, "float16": 2}[storage]
    assert inside > values
    assert outside < inside - values / 2
