from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import textbook

from lloki_atlas.errors import InputError
from lloki_atlas.kernels import diffusion
from lloki_atlas.kernels.diffusion import diffuse
from lloki_atlas.kernels.graph import Graph, build_graph
from lloki_atlas.kernels.neighbors import Neighbors, nearest_neighbors
from lloki_atlas.kernels.rows import Rows


def make_slice(n=40, n_genes=15, seed=0):
    rng = np.random.default_rng(seed)
    counts = (rng.poisson(3, (n, n_genes)) * (rng.random((n, n_genes)) < 0.3)).astype(np.float32)
    xy = (rng.random((n, 2)) * 200).astype(np.float32)
    return build_graph(nearest_neighbors(counts, n_neighbors=5), xy, bandwidth_um=80.0), counts


def dense(graph):
    shape = (graph.n_cells,) * 2
    return sp.csr_array((graph.weights, graph.indices, graph.indptr), shape=shape).toarray().astype(np.float64)


def run(graph, values, **settings):
    return diffuse(graph, sp.csr_matrix(values), **{"start": 0, "stop": graph.n_cells, **settings})


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 40), n_genes=st.integers(1, 15), seed=st.integers(0, 99), alpha=st.floats(0, 1))
def test_rows_equal_the_textbook(n, n_genes, seed, alpha):
    graph, counts = make_slice(n, n_genes, seed)
    np.testing.assert_allclose(
        run(graph, counts, alpha=alpha), textbook.diffuse(dense(graph), counts, alpha=alpha), atol=1e-5
    )


@settings(deadline=None, max_examples=25)
@given(cut=st.integers(0, 40), alpha=st.sampled_from([0.3, 1.0]), keep=st.booleans())
def test_any_split_into_ranges_gives_identical_bytes(cut, alpha, keep):
    graph, counts = make_slice()
    settings = {"alpha": alpha, "keep_observed": keep, "baseline": np.linspace(-1, 1, 15)}
    whole = run(graph, counts, **settings)
    parts = [run(graph, counts, start=a, stop=b, **settings) for a, b in ((0, cut), (cut, 40))]
    assert np.vstack(parts).tobytes() == whole.tobytes()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 99))
def test_a_baseline_is_added_to_every_cell_before_diffusion(seed):
    graph, counts = make_slice(seed=seed)
    baseline = np.random.default_rng(seed).normal(size=15)
    expected = textbook.diffuse(dense(graph), counts + baseline, alpha=0.6)
    np.testing.assert_allclose(run(graph, counts, alpha=0.6, baseline=baseline), expected, atol=1e-5)


def test_alpha_zero_returns_the_values():
    graph, counts = make_slice()
    np.testing.assert_array_equal(run(graph, counts, alpha=0.0), counts)


def test_kept_observed_values_are_exact_and_the_others_are_diffused():
    graph, counts = make_slice()
    kept, plain = run(graph, counts, keep_observed=True), run(graph, counts)
    np.testing.assert_array_equal(kept[counts != 0], counts[counts != 0])
    np.testing.assert_array_equal(kept[counts == 0], plain[counts == 0])


def test_kept_observed_values_stand_on_their_baseline():
    graph, counts = make_slice()
    baseline = np.full(15, -0.5)
    kept = run(graph, counts, keep_observed=True, baseline=baseline)
    np.testing.assert_array_equal(kept[counts != 0], counts[counts != 0] - np.float32(0.5))


def test_negative_values_are_diffused():
    graph, counts = make_slice()
    np.testing.assert_array_equal(run(graph, -counts), -run(graph, counts))


@pytest.mark.parametrize("loops", [True, False])
def test_a_cell_without_neighbours_keeps_its_values_only_by_its_loop(loops):
    nobody = Neighbors(np.full((2, 1), -1, np.int32), np.full((2, 1), np.inf, np.float32))
    graph = build_graph(nobody, np.zeros((2, 2)), bandwidth_um=0.0, self_loops=loops)
    values = np.array([[1, 0], [0, 2]], np.float32)
    np.testing.assert_array_equal(run(graph, values, baseline=np.ones(2)), values + 1 if loops else 0 * values)


def test_an_empty_range_has_no_rows():
    graph, counts = make_slice()
    assert run(graph, counts, start=7, stop=7).shape == (0, 15)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"start": -1}, "range"),
        ({"stop": 41}, "range"),
        ({"start": 9, "stop": 8}, "range"),
        ({"alpha": 1.5}, "alpha"),
        ({"alpha": np.nan}, "alpha"),
        ({"baseline": np.zeros(14)}, "baseline"),
        ({"baseline": np.full(15, np.nan)}, "baseline"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(InputError, match=message):
        run(*make_slice(), **setting)


def test_values_of_another_slice_are_refused():
    graph, counts = make_slice()
    with pytest.raises(InputError, match="one slice"):
        diffuse(graph, sp.csr_matrix(counts[:-1]), start=0, stop=5)


SETTINGS = [
    {},
    {"alpha": 0.3},
    {"alpha": 0.0},
    {"keep_observed": True},
    {"alpha": 0.6, "baseline": np.linspace(-1, 1, 15)},
    {"alpha": 0.6, "keep_observed": True, "baseline": np.linspace(-1, 1, 15)},
]


@pytest.mark.parametrize("given_settings", SETTINGS, ids=str)
@pytest.mark.parametrize("n_threads", [1, 3])
def test_values_that_are_read_in_pieces_give_the_same_bytes(given_settings, n_threads, monkeypatch):
    monkeypatch.setattr(diffusion, "READ_ROWS", 7)
    graph, counts = make_slice()
    matrix, asked = sp.csr_matrix(counts), []

    def read(start, stop):
        asked.append(stop - start)
        return matrix[start:stop]

    for start, stop in ((0, 40), (3, 17), (39, 40), (8, 8)):
        part = {"start": start, "stop": stop, **given_settings}
        lazy = diffuse(graph, Rows(matrix.shape, read), n_threads=n_threads, **part)
        assert lazy.tobytes() == run(graph, counts, **part).tobytes()
        assert all(length <= max(7, stop - start) for length in asked)
        asked.clear()


@pytest.mark.parametrize("given_settings", SETTINGS, ids=str)
@pytest.mark.parametrize("n_threads", [2, 3, 8])
def test_threads_change_no_byte(given_settings, n_threads):
    graph, counts = make_slice(n=200)
    one, more = (run(graph, counts, n_threads=threads, **given_settings) for threads in (1, n_threads))
    assert one.tobytes() == more.tobytes()


def test_a_graph_of_the_rows_asked_for_is_enough():
    """What a tile reads: edges of its own rows, none of the others."""
    graph, counts = make_slice()
    first, last = graph.indptr[10], graph.indptr[25]
    own = Graph(np.clip(graph.indptr, first, last) - first, graph.indices[first:last], graph.weights[first:last])
    whole = run(graph, counts, start=10, stop=25)
    assert run(own, counts, start=10, stop=25).tobytes() == whole.tobytes()


def test_values_of_another_slice_are_refused_when_they_are_read_in_pieces():
    graph, counts = make_slice()
    rows = Rows((39, 15), lambda start, stop: sp.csr_matrix(counts)[start:stop])
    with pytest.raises(InputError, match="one slice"):
        diffuse(graph, rows, start=0, stop=5)
