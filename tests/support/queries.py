"""A small atlas with embeddings to ask questions: four simulated slices of 75 cells, in tiles of 24."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

from lloki_atlas.config import AtlasConfig, AutoencoderConfig, TileConfig
from lloki_atlas.simulation import simulate
from lloki_atlas.stages.create import create_catalog
from lloki_atlas.stages.ingest import ingest
from lloki_atlas.stages.pipeline import run
from lloki_atlas.store.catalog import open_catalog

# slice id, technology, label columns: each slice has some that the others lack
SLICES = (
    ("simfish_1", "SimFISH", ("cell_type_coarse", "cell_type")),
    ("simfish_plus_1", "SimFISH-plus", ("cell_type_coarse", "depth")),
    ("simish_1", "SimISH", ("cell_type_coarse", "age", "kept", "note")),
    ("simmap_1", "SimMAP", ("cell_type_coarse",)),
)
IDS = tuple(slice_id for slice_id, _, _ in SLICES)
N_CELLS = 75
CONFIG = AtlasConfig(tile=TileConfig(tile_cells=24), autoencoder=AutoencoderConfig(n_epochs=2, chunk_cells=128))
# of this slice one cell has no count at all, and some cells lack an age, a verdict, a note or a type
GAPPY = "simish_1"
EMPTY_ROW = 5


@contextmanager
def inner_client() -> Iterator[Any]:
    """A Dask client whose one worker lives in this process."""
    from distributed import Client

    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as client:
        yield client


def build_once(folder: Path) -> Path:
    """Build the atlas in `folder` unless it is there; its sources stay beside it. Do not change it: copy it."""
    root = folder / "atlas"
    if root.exists():
        return root
    sources = simulate(folder / "sources", n_cells=4 * N_CELLS, n_slices=4).parent
    for slice_id in IDS:
        _rewrite(sources / f"{slice_id}.h5ad", gaps=slice_id == GAPPY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        catalog = create_catalog(root, reference=sources / "reference.h5ad", organism="mouse", config=CONFIG)
        for slice_id, technology, labels in SLICES:
            catalog = ingest(
                catalog,
                sources / f"{slice_id}.h5ad",
                slice_id=slice_id,
                technology=technology,
                organism="mouse",
                coordinate_unit="micrometer",
                label_key=labels,
                empty_cells="keep",
            )
        with inner_client() as client:
            run(catalog, client=client, progress=False)
    return root


def source_of(root: Path, slice_id: str) -> anndata.AnnData:
    """The source that a slice was made of."""
    return anndata.read_h5ad(root.parent / "sources" / f"{slice_id}.h5ad")


def embeddings(root: Path, name: str = "X_lloki") -> tuple[np.ndarray, pd.DataFrame]:
    """All vectors and the table of all cells, read through the store's own arrays rather than a selection."""
    from lloki_atlas.store.arrays import read_arrays
    from lloki_atlas.store.slices import SliceStore

    catalog = open_catalog(root)
    stage = {"X_fp": "embed", "X_lloki": "integrate"}[name]
    vectors, tables = [], []
    for slice_id in sorted(catalog.state.slices):
        record = catalog.slice(slice_id)
        store = SliceStore(catalog.path("slices", record.objects["ingest"]))
        vectors.append(read_arrays(catalog.path("embeddings", record.objects[stage]), [name])[name])
        xy = store.coordinates()
        table = store.obs(list(record.label_columns))
        table = table.assign(cell=table.index, slice_id=slice_id, technology=record.technology, x=xy[:, 0], y=xy[:, 1])
        tables.append(table.astype(object))
    return np.concatenate(vectors).astype(np.float32), pd.concat(tables, ignore_index=True)


def _rewrite(path: Path, *, gaps: bool) -> None:
    """Let the positions begin at (0, 0); make a slice gappy."""
    adata = anndata.read_h5ad(path)
    adata.obsm["spatial"] = adata.obsm["spatial"] - adata.obsm["spatial"].min(axis=0)
    if gaps:
        _make_gaps(adata)
    adata.write_h5ad(path)


def _make_gaps(adata: anndata.AnnData) -> None:
    counts = adata.X.tolil()
    counts[EMPTY_ROW] = 0
    adata.X = counts.tocsr()
    rows = np.arange(adata.n_obs)
    adata.obs["age"] = pd.array([None if row % 7 == 0 else int(row) for row in rows], dtype="Int64")
    adata.obs["kept"] = pd.array([None if row % 5 == 0 else bool(row % 2) for row in rows], dtype="boolean")
    adata.obs["note"] = pd.Series([None if row % 3 == 0 else f"note {row}" for row in rows], dtype=object).to_numpy()
    adata.obs["cell_type_coarse"] = adata.obs["cell_type_coarse"].where(rows % 11 != 0)
