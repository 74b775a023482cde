"""Tiny catalogs, objects and slice stores for tests."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from lloki_atlas.config import digest
from lloki_atlas.store.catalog import Catalog, commit, create_store, open_catalog
from lloki_atlas.store.durable import create_exclusive
from lloki_atlas.store.objects import receipt_path
from lloki_atlas.store.places import Place
from lloki_atlas.store.publishing import own_staging, publish
from lloki_atlas.store.records import STAGE_KINDS, Change, SliceRecord


def tiny_catalog(root: str | Place) -> Catalog:
    """Make a catalog without slices, open for commits."""
    return create_store(root, Change(config={"tile": {"tile_cells": 4}}), message="made for a test")


def publish_object(catalog: Catalog, kind: str, content: str, *, finished: bool = True) -> str:
    """Publish an object with two files made of `content`; its key."""
    key = digest([kind, content])
    final = catalog.path(kind, key)
    with own_staging(catalog.path("staging", key)) as staging:
        (staging / "part").mkdir(parents=True)
        (staging / "zarr.json").write_text(json.dumps({"content": content}))
        (staging / "part" / "0").write_bytes(content.encode() * 50)
        publish(staging, final, lineage={"content": content})
    if not finished:
        receipt_path(final).unlink()
    return key


def slice_record(catalog: Catalog, slice_id: str, *, content: str = "first", **parts: Any) -> SliceRecord:
    """Record of a slice whose ingest and embed objects are published."""
    objects = {stage: publish_object(catalog, STAGE_KINDS[stage], slice_id + content) for stage in ("ingest", "embed")}
    values = {"technology": "merfish", "organism": "human", "panel": "0" * 32, "n_cells": 11, "n_genes": 4, **parts}
    return SliceRecord(slice_id=slice_id, label_columns=("cell_type",), objects=objects, **values)


def commit_slice(catalog: Catalog, slice_id: str, *, content: str = "first") -> Catalog:
    """Commit one slice."""
    record = slice_record(catalog, slice_id, content=content)
    return commit(catalog, Change(slices={slice_id: record}), message=f"slice {slice_id}")


def create_in_process(folder: Path, token: int, start: Any, results: Any) -> None:
    """Create 20 files exclusively; puts for each whether this process made it."""
    start.wait()
    results.put([create_exclusive(folder / str(number), b"%d" % token) for number in range(20)])


def commit_in_process(root: Path | str, writer: int, start: Any, results: Any, commits: int = 10) -> None:
    """Commit so many slices, each from the catalog as it was before the start; puts the versions made."""
    catalog = open_catalog(root, mode="r+")
    start.wait()
    results.put([commit_slice(catalog, f"w{writer}-{step}").version for step in range(commits)])


def tiny_slice(n_cells: int = 11, n_genes: int = 4, *, seed: int = 0) -> Any:
    """AnnData of a slice as ingest writes it, with a column of each kind in `obs`."""
    import anndata
    import pandas as pd
    from scipy import sparse

    random = np.random.default_rng(seed)
    counts = sparse.csr_matrix(random.poisson(0.7, (n_cells, n_genes)).astype(np.float32))
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical([None if row == 1 else "TB"[row % 2] for row in range(n_cells)]),
            "note": [f"é{row}" for row in range(n_cells)],
            "volume": random.random(n_cells),
            "field": np.arange(n_cells, dtype=np.int32),
            "inside": np.arange(n_cells) % 3 == 0,
            "age": pd.array([None if row == 2 else row for row in range(n_cells)], dtype="Int64"),
            "kept": pd.array([None if row == 3 else row > 4 for row in range(n_cells)], dtype="boolean"),
        },
        index=[f"cell-{row}" for row in range(n_cells)],
    )
    var = pd.DataFrame(
        {
            "symbol": ["" if gene == 1 else f"GENE{gene}" for gene in range(n_genes)],
            "mapping": pd.Categorical(["control" if gene == 1 else "symbol" for gene in range(n_genes)]),
        },
        index=[f"Gene{gene}" for gene in range(n_genes)],
    )
    data = anndata.AnnData(counts, obs=obs, var=var)
    data.obsm["spatial"] = (random.random((n_cells, 2)) * 100).astype(np.float32)
    return data


def write_slice(path: str | Path, data: Any, *, tile_cells: int = 4, **metadata: Any) -> Path:
    """Write an AnnData as a slice store, with spatialdata."""
    import spatialdata
    from spatialdata.models import TableModel

    data = data.copy()
    xy = data.obsm["spatial"]
    tiles = [xy[start : start + tile_cells] for start in range(0, data.n_obs, tile_cells)]
    content = {
        "slice_id": "tiny",
        "tile_cells": tile_cells,
        "tile_bounds": [[*map(float, tile.min(axis=0)), *map(float, tile.max(axis=0))] for tile in tiles],
        **metadata,
    }
    data.uns["lloki_atlas"] = json.dumps(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spatialdata.SpatialData(tables={"table": TableModel.parse(data)}).write(path)
    return Path(path)
