"""Tiny sources for ingest: AnnData, h5ad files, SpatialData; and a catalog to put them in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from lloki_atlas.store.catalog import Catalog, create_store
from lloki_atlas.store.records import Change

GENES = ("Gad1", "Gad2", "Ctgf", "Car4", "Slc17a7", "Blank-1")
SYMBOLS = ("GAD1", "GAD2", "CCN2", "CA4", "SLC17A7")


def make_adata(n_cells: int = 30, genes: tuple[str, ...] = GENES, *, seed: int = 0) -> AnnData:
    """Counts (CSR), positions, and `obs` columns of several kinds; no cell is empty."""
    random = np.random.default_rng(seed)
    counts = random.poisson(0.6, (n_cells, len(genes))).astype(np.float32)
    counts[:, 0] += 1
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(np.array(["Astro", "Neuron", "Micro"])[np.arange(n_cells) % 3]),
            "section": np.array(["one", "two"])[np.arange(n_cells) % 2],
            "volume": random.random(n_cells),
            "cluster": np.arange(n_cells) % 4,
        },
        index=[f"cell{row}" for row in range(n_cells)],
    )
    adata = AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=list(genes)))
    adata.obsm["spatial"] = random.random((n_cells, 2)) * 1000
    return adata


def with_matrix(adata: AnnData, form: str) -> AnnData:
    """The same AnnData with counts as `csr`, `csc` or `dense`."""
    changed = adata.copy()
    forms = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": lambda counts: counts.toarray()}
    changed.X = forms[form](sparse.csr_matrix(adata.X))
    return changed


def write_h5ad(path: Path, adata: AnnData, **settings: Any) -> Path:
    """Write an h5ad file."""
    adata.write_h5ad(path, **settings)
    return path


def make_spatial_data(adata: AnnData, *, spatial: bool = True, to_global: float = 1.0) -> Any:
    """A table that annotates circles, transcripts, and an image; one unit of the circles is `to_global` global ones."""
    import geopandas
    import spatialdata
    from shapely import Point
    from spatialdata.models import Image2DModel, PointsModel, ShapesModel, TableModel
    from spatialdata.transformations import Identity, Scale

    positions = np.asarray(adata.obsm["spatial"])
    scale = Scale([to_global, to_global], axes=("x", "y"))
    circles = geopandas.GeoDataFrame(
        {"radius": np.full(len(positions), 5.0)},
        geometry=[Point(xy) for xy in positions],
        index=np.arange(len(positions)) + 100,
    )
    transcripts = pd.DataFrame({"x": positions[:, 0], "y": positions[:, 1], "gene": "Gad1"})
    table = adata.copy()
    if not spatial:
        del table.obsm["spatial"]
    table.obs["region"] = pd.Categorical(["cells"] * table.n_obs)
    table.obs["instance"] = circles.index.to_numpy()
    return spatialdata.SpatialData(
        tables={"table": TableModel.parse(table, region="cells", region_key="region", instance_key="instance")},
        shapes={"cells": ShapesModel.parse(circles, transformations={"global": scale})},
        points={"transcripts": PointsModel.parse(transcripts, transformations={"global": scale})},
        images={
            "dapi": Image2DModel.parse(
                np.arange(64, dtype=np.uint8).reshape(1, 8, 8), transformations={"global": Identity()}
            )
        },
    )


def make_catalog(root: Path, *, tile_cells: int = 8) -> Catalog:
    """A catalog without slices and without a reference, open for commits."""
    return create_store(root, Change(config={"tile": {"tile_cells": tile_cells}}), message="made for a test")
