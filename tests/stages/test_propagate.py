"""LLOKI-FP of one slice in memory: what is kept, what is filled in, which graph comes out; and its task."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from parity import textbook
from scipy.sparse import csr_matrix
from support.atlases import CONFIG, N_CELLS, copied

from lloki_atlas.config import PropagationConfig
from lloki_atlas.engine.plan import run_task
from lloki_atlas.kernels.transport import sparsity_histogram
from lloki_atlas.stages import propagate, propagate_tasks, reference, tile
from lloki_atlas.stages.lineage import expected_objects
from lloki_atlas.stages.panels import select_panel
from lloki_atlas.stages.spaces import neighbor_rows
from lloki_atlas.store.arrays import read_arrays

N_GENES = 12
SYMBOLS = tuple(f"G{gene:02d}" for gene in range(N_GENES))
SHARED = SYMBOLS[::2]
SETTINGS = PropagationConfig(n_neighbors=5, n_components=4)
SIGMA = 30.0


def slice_of(n_cells=50, *, seed=0):
    random = np.random.default_rng(seed)
    kinds = random.gamma(0.5, 2.0, (3, N_GENES))
    dense = random.poisson(kinds[random.integers(0, 3, n_cells)]).astype(np.float32)
    if n_cells > 4:
        dense[3] = 0
        dense[4] = dense[2]
    xy = (random.random((n_cells, 2)) * 100).astype(np.float32)
    return dense, xy


def panel_of(dense):
    return select_panel(csr_matrix(dense), SYMBOLS, ["exact"] * N_GENES, SHARED)


def run(dense, xy, *, settings=SETTINGS, filled=6, key=9, **options):
    """LLOKI-FP towards a reference in which every cell has `filled` of the six shared genes."""
    panel = panel_of(dense)
    nonzeros = np.diff(panel.shared_counts.indptr)
    return propagate.run_slice(
        panel,
        xy,
        own_histogram=sparsity_histogram(nonzeros, len(SHARED)),
        reference_histogram=sparsity_histogram(np.full(10, filled), len(SHARED)),
        bandwidth_um=SIGMA,
        settings=settings,
        key=key,
        **options,
    )


def first_graph(dense, xy, *, settings=SETTINGS):
    rows = neighbor_rows(panel_of(dense), settings)
    return propagate.slice_graph(rows, xy, bandwidth_um=SIGMA, settings=settings, key=9)[0]


@pytest.fixture(scope="module")
def case():
    dense, xy = slice_of()
    return dense, xy, run(dense, xy, filled=4)


def test_observed_counts_are_never_changed(case):
    dense, _, result = case
    shared = dense[:, ::2]
    np.testing.assert_array_equal(result.values[shared > 0], shared[shared > 0])


def test_the_budget_is_what_is_missing_to_the_target(case):
    dense, _, result = case
    own = (dense[:, ::2] > 0).sum(axis=1)
    np.testing.assert_array_equal(result.filled.budget, np.maximum(result.filled.target_nonzeros - own, 0))


def test_no_cell_is_filled_beyond_its_budget(case):
    dense, _, result = case
    filled = (result.values > 0).sum(axis=1) - (dense[:, ::2] > 0).sum(axis=1)
    assert (filled <= result.filled.budget).all()
    assert filled.any()


def test_achieved_nonzeros_are_counted_in_the_values(case):
    result = case[2]
    np.testing.assert_array_equal(result.filled.achieved_nonzeros, (result.values != 0).sum(axis=1))


def test_an_exact_search_has_found_everything(case):
    assert case[2].recall == (1.0, 1.0)


def test_both_graphs_have_the_bandwidth_of_the_slice(case):
    assert case[2].bandwidth_um == (SIGMA, SIGMA)


def test_the_published_bandwidth_is_drawn_anew_for_each_graph(case):
    dense, xy, _ = case
    first, second = run(dense, xy, settings=dataclasses.replace(SETTINGS, bandwidth="cross")).bandwidth_um
    assert len({first, second, SIGMA}) == 3


def test_the_second_graph_is_that_of_the_propagated_values(case):
    dense, xy, result = case
    replaced = dense.copy()
    replaced[:, ::2] = result.values
    space = textbook.scaled_components(replaced, SETTINGS.n_components)
    lists = textbook.nearest(textbook.cosine_similarity(space), SETTINGS.n_neighbors)
    expected = textbook.union_graph(lists, xy, SIGMA)
    np.testing.assert_allclose(dense_graph(result.graph), expected, atol=1e-5)


def test_the_first_graph_is_that_of_all_counts_of_the_panel(case):
    dense, xy, _ = case
    space = textbook.scaled_components(dense, SETTINGS.n_components)
    lists = textbook.nearest(textbook.cosine_similarity(space), SETTINGS.n_neighbors)
    expected = textbook.union_graph(lists, xy, SIGMA)
    np.testing.assert_allclose(dense_graph(first_graph(dense, xy)), expected, atol=1e-5)


def test_in_the_published_space_neighbours_are_those_of_shared_counts():
    dense, xy = slice_of(seed=1)
    settings = dataclasses.replace(SETTINGS, graph_space="counts")
    result = run(dense, xy, settings=settings)
    for values, graph in ((dense[:, ::2], first_graph(dense, xy, settings=settings)), (result.values, result.graph)):
        lists = textbook.nearest(textbook.cosine_similarity(values), SETTINGS.n_neighbors)
        np.testing.assert_allclose(dense_graph(graph), textbook.union_graph(lists, xy, SIGMA), atol=1e-5)


def dense_graph(graph):
    return csr_matrix((graph.weights, graph.indices, graph.indptr), shape=(graph.n_cells,) * 2).toarray()


def graph_bytes(graph):
    return [part.tobytes() for part in (graph.indptr, graph.indices, graph.weights)]


@pytest.mark.parametrize("space", ["scaled", "counts"])
def test_with_nothing_to_fill_in_the_second_graph_is_the_first(space):
    settings = dataclasses.replace(SETTINGS, graph_space=space)
    result = run(*slice_of(), settings=settings, filled=0)
    assert graph_bytes(result.graph) == graph_bytes(first_graph(*slice_of(), settings=settings))
    assert not result.filled.budget.any()


def test_with_nothing_to_fill_in_values_are_the_counts():
    dense, xy = slice_of()
    np.testing.assert_array_equal(run(dense, xy, filled=0).values, dense[:, ::2])


@pytest.mark.parametrize(
    "dense",
    [
        np.ones((1, N_GENES)),
        np.zeros((1, N_GENES)),
        np.zeros((4, N_GENES)),
        np.ones((3, N_GENES)),
        np.eye(2, N_GENES),
    ],
    ids=["one cell", "one empty cell", "empty cells", "equal cells", "two strangers"],
)
@pytest.mark.parametrize("space", ["scaled", "counts"])
def test_corner_cases_end_with_finite_values(dense, space):
    xy = np.zeros((len(dense), 2), np.float32)
    result = run(dense.astype(np.float32), xy, settings=dataclasses.replace(SETTINGS, graph_space=space))
    assert np.isfinite(result.values).all()
    assert np.isfinite(result.graph.weights).all()


def test_iterations_end_at_their_limit():
    result = run(*slice_of(), settings=dataclasses.replace(SETTINGS, max_iterations=2, tolerance=1e-9))
    assert result.filled.n_iterations == 2


def test_iterations_end_when_values_no_longer_change():
    result = run(*slice_of(), settings=dataclasses.replace(SETTINGS, max_iterations=500, tolerance=1e-2))
    assert result.filled.n_iterations < 500
    assert result.filled.relative_change < 1e-2


def test_another_seed_keeps_other_genes():
    dense, xy = slice_of()
    first, second = (run(dense, xy, filled=4, key=key) for key in (1, 2))
    assert (first.values > 0).sum() == (second.values > 0).sum()
    assert (first.values > 0).tobytes() != (second.values > 0).tobytes()


def test_a_second_time_the_bytes_are_the_same(case):
    dense, xy, result = case
    again = run(dense, xy, filled=4)
    assert again.values.tobytes() == result.values.tobytes()
    assert again.graph.weights.tobytes() == result.graph.weights.tobytes()


@pytest.fixture(scope="module")
def planned(ingested, tmp_path_factory):
    """The task of a slice whose statistics and panel are on disk."""
    catalog = copied(ingested, tmp_path_factory.mktemp("propagate") / "atlas")
    record = catalog.slice("simmap_1")
    keys = expected_objects(catalog, record)
    for task in (*tile.plan_stage(catalog, record, keys), *reference.plan_stage(catalog, record, keys)):
        run_task(task)
    (task,) = propagate_tasks.plan_stage(catalog, record, keys)
    return task, propagate_tasks.compute(**task.arguments)


def test_a_slice_is_one_task_of_all_its_cells(planned):
    task, _ = planned
    assert (task.name, task.stage, task.n_cells) == ("propagate/simmap_1", "propagate", N_CELLS)


def test_a_task_reports_cells_that_stay_within_their_targets(planned):
    task, made = planned
    own = read_arrays(task.arguments["inputs"]["statistics"], ["nonzeros"])["nonzeros"]
    assert (made["achieved_nonzeros"] >= own).all()
    assert (made["achieved_nonzeros"] <= np.maximum(made["target_nonzeros"], own)).all()
    assert 1 <= made["n_iterations"][0] <= CONFIG.propagation.max_iterations


def test_a_task_writes_the_second_graph_of_every_cell(planned):
    task, made = planned
    run_task(task)
    stored = read_arrays(task.output.path)
    assert set(stored) == set(propagate_tasks.DIMS)
    assert len(stored["indptr"]) == N_CELLS + 1
    assert all(stored[name].tobytes() == made[name].tobytes() for name in propagate_tasks.DIMS)
