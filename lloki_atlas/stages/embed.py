"""Diffusion and embedding of one tile: X_denoised = α A_imp T(X⁰) + (1 − α) T(X⁰) (equation 5) → 512 numbers a cell.

T is the embedder's own input scale (the identity for scGPT). The denoised rows live only inside the task.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from lloki_atlas.config import EmbedderConfig, PropagationConfig, to_dict
from lloki_atlas.engine.plan import Output, Task
from lloki_atlas.errors import CheckpointError
from lloki_atlas.kernels.diffusion import diffuse
from lloki_atlas.kernels.graph import Graph
from lloki_atlas.models.embedders import EMBEDDING_SIZE, Embedder, embedder_factory
from lloki_atlas.stages.lineage import atlas_config
from lloki_atlas.stages.panels import PanelCounts, panel_counts, reference_symbols, task_memory
from lloki_atlas.store.arrays import ArraySpec, read_arrays
from lloki_atlas.store.catalog import Catalog
from lloki_atlas.store.records import SliceRecord
from lloki_atlas.store.slices import SliceStore


def run_tile(
    panel: PanelCounts,
    graph: Graph,
    totals: np.ndarray,
    embedder: Embedder,
    *,
    start: int,
    stop: int,
    settings: PropagationConfig,
) -> np.ndarray:
    """Embed the cells of rows `start` to `stop`.

    Parameters
    ----------
    panel
        Counts of the whole slice: neighbours lie anywhere in it.
    graph
        The second graph of the slice.
    totals
        (n_cells,) float32, counts over the whole panel.
    embedder
        Ready for this panel and slice.
    start, stop
        Rows of the tile.
    settings
        α and whether observed values are kept.

    Returns
    -------
    (stop - start, 512) float16 unit vectors; NaN where a cell has no count in a shared gene.
    """
    counts = panel.shared_counts
    values, baseline = embedder.transform(counts, totals)
    rows = diffuse(
        graph,
        values,
        start=start,
        stop=stop,
        alpha=settings.alpha,
        keep_observed=settings.keep_observed,
        baseline=baseline,
    )
    embedding = embedder.embed(rows).astype(np.float16)
    embedding[np.diff(counts.indptr)[start:stop] == 0] = np.nan
    return embedding


def compute(
    slice_path: str,
    reference_path: str,
    statistics_path: str,
    panel_path: str,
    graph_path: str,
    start: int,
    stop: int,
    settings: dict[str, Any],
    embedder: dict[str, Any],
    embedder_digest: str,
) -> dict[str, np.ndarray]:
    """Task body: read a slice and its graph, embed one tile."""
    panel = panel_counts(SliceStore(slice_path), reference_symbols(reference_path))
    statistics = read_arrays(statistics_path)
    graph = read_arrays(graph_path, ["indptr", "indices", "weights"])
    config = EmbedderConfig(**embedder)
    factory = embedder_factory(config.name)
    if factory.digest(config) != embedder_digest:
        raise CheckpointError(
            f"the checkpoint in {config.checkpoint} is not the one that this atlas was created with: "
            "put the original files back, or create an atlas for the new ones"
        )
    embedding = run_tile(
        panel,
        Graph(graph["indptr"], graph["indices"], graph["weights"]),
        statistics["totals"],
        factory.open(config, panel.symbols, read_arrays(panel_path), statistics),
        start=start,
        stop=stop,
        settings=PropagationConfig(**settings),
    )
    return {"X_fp": embedding}


def plan_stage(catalog: Catalog, record: SliceRecord, keys: dict[str, str], *, embedder_digest: str) -> list[Task]:
    """One task per tile, and one that publishes the slice's embedding when all tiles are there."""
    config = atlas_config(catalog)
    store = SliceStore(catalog.path("slices", keys["ingest"]))
    arguments = {
        "slice_path": str(catalog.path("slices", keys["ingest"])),
        "reference_path": str(catalog.path("references", str(catalog.state.reference))),
        "statistics_path": str(catalog.path("statistics", keys["tile"])),
        "panel_path": str(catalog.path("panels", keys["reference"])),
        "graph_path": str(catalog.path("graphs", keys["propagate"])),
        "settings": to_dict(config.propagation),
        "embedder": to_dict(config.embedder),
        "embedder_digest": embedder_digest,
    }
    return tile_tasks(
        catalog,
        record,
        stage="embed",
        key=keys["embed"],
        function="lloki_atlas.stages.embed:compute",
        arguments=arguments,
        array=("X_fp", EMBEDDING_SIZE, "float16"),
        lineage={"stage": "embed", "graph": keys["propagate"], "panel": keys["reference"], "embedder": embedder_digest},
        memory=lambda cells: (
            task_memory(store, dense_cells=cells, matrices=3)
            + record.n_cells * (2 * config.propagation.n_neighbors + 1) * 8
            + cells * EMBEDDING_SIZE * 12
        ),
    )


def tile_tasks(
    catalog: Catalog,
    record: SliceRecord,
    *,
    stage: str,
    key: str,
    function: str,
    arguments: dict[str, Any],
    array: tuple[str, int, str],
    lineage: dict[str, Any],
    memory: Any,
) -> list[Task]:
    """Tasks that fill one (n_cells, size) array of a slice tile by tile, and the one that publishes it."""
    name, size, dtype = array
    tile_cells = SliceStore(catalog.path("slices", record.objects["ingest"])).tile_cells
    output = Output(
        path=str(catalog.path("embeddings", key)),
        staging=str(catalog.path("staging", key)),
        lineage=lineage,
        attributes={"slice_id": record.slice_id},
        specs={
            name: ArraySpec(
                shape=(record.n_cells, size),
                dtype=dtype,
                chunk_rows=min(tile_cells, record.n_cells),
                dims=("cell", f"{name}_dimension"),
                attributes={},
            )
        },
    )
    tiles = [
        Task(
            name=f"{stage}/{record.slice_id}/{start}",
            stage=stage,
            function=function,
            arguments={**arguments, "start": start, "stop": min(start + tile_cells, record.n_cells)},
            output=replace(output, rows=start),
            n_cells=min(tile_cells, record.n_cells - start),
            projected_memory=memory(min(tile_cells, record.n_cells)),
            slice_id=record.slice_id,
        )
        for start in range(0, record.n_cells, tile_cells)
    ]
    publish = Task(
        name=f"{stage}/{record.slice_id}/publish",
        stage=stage,
        function="",
        arguments={},
        output=output,
        requires=tuple(tile.name for tile in tiles),
        slice_id=record.slice_id,
    )
    return [*tiles, publish]
