"""The largest real slice at hand, very sparse, with cells of one gene and of none, from end to end."""

from __future__ import annotations

import anndata
import numpy as np
import pytest

from lloki_atlas.config import AtlasConfig, TileConfig
from lloki_atlas.stages.create import create_catalog
from lloki_atlas.stages.ingest import ingest
from lloki_atlas.stages.pipeline import run
from lloki_atlas.stages.reference import fit_reference
from lloki_atlas.stages.reports import propagation_report
from lloki_atlas.store.arrays import read_arrays

pytestmark = pytest.mark.slow
TILES = {"one task in memory": TileConfig(7000, 4096, 100_000), "a chain from disk": TileConfig(1000, 0, 20_000)}


@pytest.fixture(scope="module")
def slice_with_empty_cells(data_folder):
    adata = anndata.read_h5ad(data_folder / "iss_coronal_half_qian2020.h5ad")
    counts = adata.X.tocsr()
    for row in range(0, adata.n_obs, 3500):
        counts.data[counts.indptr[row] : counts.indptr[row + 1]] = 0
    counts.eliminate_zeros()
    adata.X = counts
    return adata


@pytest.fixture(scope="module")
def results(slice_with_empty_cells, data_folder, tmp_path_factory):
    profile = fit_reference(data_folder / "ref_hypothalamus_romanov2017.h5ad", organism="mouse")
    found = {}
    for n_workers, (name, tile) in enumerate(TILES.items(), start=1):
        catalog = create_catalog(
            tmp_path_factory.mktemp("iss") / "atlas", reference=profile, config=AtlasConfig(tile=tile)
        )
        catalog = ingest(
            catalog, slice_with_empty_cells, slice_id="iss", technology="ISS", organism="mouse",
            coordinate_unit="micrometer", empty_cells="keep",
        )  # fmt: skip
        catalog = run(catalog, until="embed", n_workers=n_workers, progress=False)
        objects = catalog.slice("iss").objects
        arrays = read_arrays(catalog.path("graphs", objects["propagate"]))
        arrays |= read_arrays(catalog.path("embeddings", objects["embed"]))
        arrays |= read_arrays(catalog.path("statistics", objects["tile"]), ["nonzeros"])
        found[name] = arrays, propagation_report(catalog)[0]
    return found


def test_tasks_tiles_workers_and_disk_change_no_byte(results):
    one, other = (arrays for arrays, _ in results.values())
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].tobytes() == other[name].tobytes(), name


def test_every_cell_with_a_shared_gene_has_a_finite_vector_and_no_other(results):
    arrays, _ = results["one task in memory"]
    empty = arrays["nonzeros"] == 0
    assert empty.sum() >= 20
    assert (arrays["nonzeros"] == 1).sum() > 10_000
    np.testing.assert_array_equal(np.isnan(arrays["X_fp"]).any(axis=1), empty)


def test_propagation_ends_early_and_cells_are_sent_where_they_belong(results):
    _, report = results["one task in memory"]
    assert report["n_iterations"] <= 12
    assert report["sparsity"]["target_correlation"] >= 0.97
    assert report["recall"] == [1.0, 1.0]
