"""Makes the tiny store of a format version that `tests/data/stores/format-<n>` keeps.

Each was made once, by the code that wrote that format, and is never made again: a later one has to read it.
`PYTHONPATH=tests python -m support.format_stores tests/data/stores/format-1`
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from support.stores import publish

from lloki_atlas.store.arrays import write_arrays
from lloki_atlas.store.catalog import Catalog, commit, create_store
from lloki_atlas.store.records import Change, SliceRecord

N_CELLS, N_GENES, TILE_CELLS = 5, 3, 4
INGEST, EMBED, INTEGRATE, REFERENCE, EMBEDDER = (digit * 32 for digit in "abcde")


def make(root: Path) -> Catalog:
    """Four versions: made, a slice, its embeddings with a model, other settings."""
    catalog = create_store(root, Change(config={"tile": {"tile_cells": 2}}), message="create")
    _publish(catalog, "slices", INGEST, _write_slice)
    record = SliceRecord("one", "SimFISH", "mouse", "1" * 32, N_CELLS, N_GENES, ("cell_type",), {"ingest": INGEST})
    catalog = commit(catalog, Change(slices={"one": record}), message="ingest one")
    _publish(catalog, "references", REFERENCE, lambda folder: _write_arrays(folder, "factors", width=2))
    _publish(catalog, "models", EMBEDDER, _write_embedder)
    _publish(catalog, "embeddings", EMBED, lambda folder: _write_arrays(folder, "X_fp", width=4, dtype="float16"))
    _publish(catalog, "embeddings", INTEGRATE, lambda folder: _write_arrays(folder, "X_lloki", width=2))
    objects = {"ingest": INGEST, "embed": EMBED, "integrate": INTEGRATE}
    record = SliceRecord("one", "SimFISH", "mouse", "1" * 32, N_CELLS, N_GENES, ("cell_type",), objects)
    change = Change(slices={"one": record}, models={"embedder": EMBEDDER}, reference=REFERENCE)
    catalog = commit(catalog, change, message="run: 1 slices")
    return commit(catalog, Change(config={"tile": {"tile_cells": TILE_CELLS}}), message="settings")


def values(width: int, dtype: str = "float32") -> np.ndarray:
    """(N_CELLS, width): what the arrays of the store hold."""
    return (np.arange(N_CELLS * width).reshape(N_CELLS, width) / 8).astype(dtype)


def _publish(catalog: Catalog, kind: str, key: str, write: Callable[[Path], None]) -> None:
    staging = Path(str(catalog.path("staging", key)))
    staging.parent.mkdir(exist_ok=True)
    write(staging)
    publish(staging, catalog.path(kind, key), lineage={"stage": kind})


def _write_arrays(folder: Path, name: str, *, width: int, dtype: str = "float32") -> None:
    write_arrays(folder, {name: values(width, dtype)}, dims={name: ("cell", "dimension")}, attributes={"made": "test"})


def _write_embedder(folder: Path) -> None:
    folder.mkdir()
    (folder / "embedder.json").write_text(json.dumps({"name": "reference", "digest": "0" * 32}))


def _write_slice(folder: Path) -> None:
    import anndata
    import pandas as pd
    import spatialdata
    from scipy import sparse

    table = anndata.AnnData(
        sparse.csr_matrix(values(N_GENES)),
        obs=pd.DataFrame({"cell_type": list("ABABA")}, index=[f"cell-{row}" for row in range(N_CELLS)]),
        var=pd.DataFrame({"symbol": ["Gad1", "Sst", ""]}, index=["Gad1", "Sst", "Blank-1"]),
    )
    table.obsm["spatial"] = values(2)
    bounds = [[0.0, 0.0, 1.0, 1.0]] * -(-N_CELLS // TILE_CELLS)
    table.uns["lloki_atlas"] = json.dumps({"slice_id": "one", "tile_cells": TILE_CELLS, "tile_bounds": bounds})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spatialdata.SpatialData(tables={"table": table}).write(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
