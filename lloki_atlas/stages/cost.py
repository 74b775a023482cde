"""Bytes that the tasks of a run write, projected before it: at most, as if nothing were compressed.

Tiles need no projection: what they hold follows from their arrays. Here is what is written whole.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from lloki_atlas.config import AtlasConfig
from lloki_atlas.engine.plan import Task
from lloki_atlas.store.arrays import open_rows
from lloki_atlas.store.catalog import Catalog
from lloki_atlas.store.records import SliceRecord

# of every object: metadata of its arrays, markers of its tiles, its receipt
OBJECT_BYTES = 32 * 2**10
# weights (372,000 float32), description and loss curves of an autoencoder; its shapes are not settings
AUTOENCODER_BYTES = 2 * 2**20
TOKEN_BYTES = 64 * 2**10
_SYMBOL = 24


def with_writes(catalog: Catalog, config: AtlasConfig, task: Task) -> Task:
    """Return a task of `plan` that knows what it will write."""
    record = catalog.state.slices.get(task.slice_id) if task.slice_id else None
    if task.output.tiles:
        return task
    if task.stage == "reference":
        return replace(task, writes=OBJECT_BYTES + _panel(catalog, config, task))
    if task.stage == "train":
        return replace(task, writes=AUTOENCODER_BYTES)
    if task.stage == "adapt":
        return replace(task, writes=TOKEN_BYTES)
    if record is None or not task.function:
        return replace(task, writes=OBJECT_BYTES)
    return replace(task, writes=OBJECT_BYTES + _of_slice(config, task, record))


def _of_slice(config: AtlasConfig, task: Task, record: SliceRecord) -> int:
    n, genes, k = record.n_cells, record.n_genes, config.propagation.n_neighbors
    width = config.propagation.n_components if config.propagation.graph_space == "scaled" else genes
    filled, space = 12 * n, 4 * n * width
    step = task.function.rpartition(":")[2]
    if task.stage == "tile":  # totals, numbers of genes; histogram and moments a gene
        return 8 * n + 24 * (genes + 1)
    if step == "compute_space":
        return space
    if step == "compute_search":  # lists of a range and of those it is searched against
        ranges = task.arguments["ranges"]
        size = max(stop - start for start, stop in ranges)
        return 8 * k * size * (1 + len(ranges) // 2)
    if step == "compute_fill":
        return filled + space
    # the graph: a cell's neighbours and those that it is one of, 2 k + 1 a cell with itself
    return 8 * (n + 1) + 8 * n * (2 * k + 1) + filled


def _panel(catalog: Catalog, config: AtlasConfig, task: Task) -> int:
    n_all = _n_symbols(str(catalog.path("references", str(catalog.state.reference))))
    panel = task.output.lineage["panel"]
    genes = min(n_all, next(part.n_genes for part in catalog.state.slices.values() if part.panel == panel))
    return genes * (_SYMBOL + 8 + 4 * config.embedder.n_factors) + 8 * (n_all + 1)


@cache
def _n_symbols(reference_path: str) -> int:
    return int(open_rows(reference_path, "symbols").array.shape[0])
