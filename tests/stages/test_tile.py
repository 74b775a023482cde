"""Statistics of a slice against direct counting, also where cells are empty, alone, or at one place."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from support.atlases import N_CELLS, copied

from lloki_atlas.config import PropagationConfig
from lloki_atlas.engine.plan import run_task
from lloki_atlas.kernels.bandwidth import sample_bandwidth
from lloki_atlas.stages import tile
from lloki_atlas.stages.lineage import expected_objects
from lloki_atlas.stages.panels import panel_counts, reference_symbols, select_panel, slice_random_key
from lloki_atlas.store.arrays import read_arrays
from lloki_atlas.store.catalog import open_catalog
from lloki_atlas.store.slices import SliceStore

SETTINGS = PropagationConfig(n_bandwidth_pairs=50)
MAPPING = ("exact", "exact", "unmapped", "control")


def statistics(dense, xy=None):
    dense = np.asarray(dense, dtype=np.float32)
    panel = select_panel(csr_matrix(dense), ("A", "B", "", ""), MAPPING, ("A", "B"))
    xy = np.random.default_rng(0).random((len(dense), 2)).astype(np.float32) if xy is None else xy
    return tile.run_slice(panel, xy, settings=SETTINGS, key=5)


@pytest.fixture(scope="module")
def case():
    dense = np.random.default_rng(1).poisson(0.9, (40, 4)).astype(np.float32)
    dense[3] = 0
    dense[4] = [0, 0, 2, 7]
    return dense, statistics(dense)


def test_totals_are_sums_over_the_panel_without_controls(case):
    dense, found = case
    np.testing.assert_array_equal(found["totals"], dense[:, :3].sum(axis=1))


def test_nonzeros_count_shared_genes_alone(case):
    dense, found = case
    np.testing.assert_array_equal(found["nonzeros"], (dense[:, :2] > 0).sum(axis=1))


def test_the_histogram_counts_cells_by_their_nonzeros(case):
    dense, found = case
    nonzeros = (dense[:, :2] > 0).sum(axis=1)
    np.testing.assert_array_equal(found["histogram"], [(nonzeros == n).sum() for n in range(3)])


def test_the_target_total_is_the_median_of_cells_that_are_not_empty():
    assert statistics([[0, 0, 0, 0], [0, 0, 0, 9], [3, 1, 0, 5], [1, 0, 1, 0]])["target_total"] == [3.0]


def test_moments_are_those_of_log_counts_of_equal_library_size(case):
    dense, found = case
    totals = dense[:, :3].sum(axis=1)
    share = np.divide(dense[:, :2], totals[:, None], out=np.zeros((40, 2)), where=totals[:, None] > 0)
    logged = np.log1p(share * found["target_total"])
    np.testing.assert_allclose(found["mean"], logged.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found["sd"], logged.std(axis=0), atol=1e-6)


def test_the_bandwidth_is_drawn_with_the_key_of_the_slice(case):
    dense, found = case
    xy = np.random.default_rng(0).random((len(dense), 2)).astype(np.float32)
    assert found["bandwidth_um"] == [sample_bandwidth(xy, n_pairs=50, key=5)]


def test_every_array_has_named_axes(case):
    assert set(case[1]) == set(tile.DIMS)


@pytest.mark.parametrize(
    ("dense", "xy"),
    [
        ([[1, 2, 0, 0]], None),
        ([[0, 0, 0, 0]] * 3, None),
        ([[1, 2, 0, 0], [1, 2, 0, 0]], np.ones((2, 2), np.float32)),
        ([[0, 0, 5, 0], [1, 0, 0, 0]], None),
    ],
    ids=["one cell", "empty cells only", "two equal cells at one place", "a cell without shared counts"],
)
def test_statistics_of_corner_cases_are_finite(dense, xy):
    assert all(np.isfinite(values).all() for values in statistics(dense, xy).values())


def test_a_slice_of_empty_cells_has_a_target_total_of_one():
    assert statistics([[0, 0, 0, 0]] * 3)["target_total"] == [1.0]


@pytest.fixture
def planned(ingested):
    catalog = open_catalog(ingested)
    record = catalog.slice("simfish_1")
    return catalog, record, expected_objects(catalog, record)


def test_a_slice_is_one_task_of_all_its_cells(planned):
    (task,) = tile.plan_stage(*planned)
    assert (task.name, task.slice_id, task.n_cells) == ("tile/simfish_1", "simfish_1", N_CELLS)


def test_a_task_computes_the_statistics_of_the_stored_slice(planned):
    (task,) = tile.plan_stage(*planned)
    store = SliceStore(task.arguments["slice_path"])
    panel = panel_counts(store, reference_symbols(task.arguments["reference_path"]))
    config = PropagationConfig(**task.arguments["settings"])
    expected = tile.run_slice(panel, store.coordinates(), settings=config, key=slice_random_key("simfish_1", config))
    found = tile.compute(**task.arguments)
    assert {name: values.tobytes() for name, values in found.items()} == {
        name: values.tobytes() for name, values in expected.items()
    }


def test_stored_statistics_are_the_computed_ones(planned, tmp_path):
    catalog = copied(planned[0].root, tmp_path / "atlas")
    (task,) = tile.plan_stage(catalog, planned[1], planned[2])
    run_task(task)
    stored, computed = read_arrays(task.output.path), tile.compute(**task.arguments)
    assert all(stored[name].tobytes() == computed[name].tobytes() for name in tile.DIMS)
