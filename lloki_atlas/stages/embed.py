"""Diffusion and embedding of one tile: X_denoised = α A_imp T(X⁰) + (1 − α) T(X⁰) (equation 5) → 512 numbers a cell.

T is the embedder's own input scale (the identity for scGPT). The denoised rows live only inside the task.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from lloki_atlas.config import EmbedderConfig, PropagationConfig, to_dict
from lloki_atlas.engine.plan import Output, Task
from lloki_atlas.errors import CheckpointError
from lloki_atlas.kernels.cap import cap_rows
from lloki_atlas.kernels.diffusion import READ_ROWS, diffuse
from lloki_atlas.kernels.graph import Graph
from lloki_atlas.kernels.rows import Rows
from lloki_atlas.models.embedders import EMBEDDING_SIZE, Embedder, embedder_factory
from lloki_atlas.stages.lineage import atlas_config
from lloki_atlas.stages.panels import PanelCounts, panel_counts, reference_symbols, streamed_memory
from lloki_atlas.store.arrays import ArraySpec, read_arrays, read_rows
from lloki_atlas.store.catalog import Catalog
from lloki_atlas.store.objects import is_complete
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
    targets: np.ndarray | None = None,
) -> np.ndarray:
    """Embed the cells of rows `start` to `stop`.

    Parameters
    ----------
    panel
        Counts of the whole slice: neighbours lie anywhere in it.
    graph
        The second graph of the slice; only the rows of the tile have to be there.
    totals
        (n_cells,) float32, counts over the whole panel.
    embedder
        Ready for this panel and slice.
    start, stop
        Rows of the tile.
    settings
        α, whether observed values are kept, and whether rows are cut back to `targets`.
    targets
        (stop - start,) int32, non-zero genes that a cell may keep; asked for by `cap_final` alone.

    Returns
    -------
    (stop - start, 512) float16 unit vectors; NaN where a cell has no count in a shared gene.
    """
    counts = panel.shared_counts
    values, baseline = _transformed(counts, totals, embedder)
    rows = diffuse(
        graph,
        values,
        start=start,
        stop=stop,
        alpha=settings.alpha,
        keep_observed=settings.keep_observed,
        baseline=baseline,
    )
    if settings.cap_final and targets is not None:
        share = settings.alpha * _row_sums(graph, start, stop) + (1.0 - settings.alpha)
        rows = cap_rows(rows, share[:, None] * baseline[None, :], targets)
    return _embedded(rows, counts[start:stop], embedder).astype(np.float16)


def run_plain(panel: PanelCounts, totals: np.ndarray, embedder: Embedder, *, start: int, stop: int) -> np.ndarray:
    """Embed the cells of a tile without diffusion: (stop - start, 512) float32, NaN as for `run_tile`."""
    counts = panel.shared_counts[start:stop]
    values, baseline = embedder.transform(counts, totals[start:stop])
    rows = (values.toarray() + baseline[None, :]).astype(np.float32)
    return _embedded(rows, counts, embedder)


def diffuse_embedding(graph: Graph, plain: Any, *, start: int, stop: int, settings: PropagationConfig) -> np.ndarray:
    """Diffuse embeddings instead of counts: α A_imp Z + (1 − α) Z, of length 1 again.

    Parameters
    ----------
    graph
        The second graph; only the rows of the tile have to be there.
    plain
        (n_cells, 512) float32, embeddings of single cells, sliced like a matrix. NaN rows add nothing and stay NaN.
    start, stop
        Rows of the tile.
    settings
        α.
    """
    rows = Rows(plain.shape, lambda a, b: csr_matrix(np.nan_to_num(np.asarray(plain[a:b]))))
    diffused = diffuse(graph, rows, start=start, stop=stop, alpha=settings.alpha)
    length = np.linalg.norm(diffused, axis=1, keepdims=True)
    embedding = np.divide(diffused, length, out=np.full_like(diffused, np.nan), where=length > 0)
    embedding[np.isnan(np.asarray(plain[start:stop])).any(axis=1)] = np.nan
    return embedding.astype(np.float16)


def _transformed(counts: Any, totals: np.ndarray, embedder: Embedder) -> tuple[Any, np.ndarray]:
    """Counts on the embedder's scale, which is row by row, so that rows may be made when they are needed."""
    if not isinstance(counts, Rows):
        return embedder.transform(counts, totals)
    baseline = embedder.transform(counts[0:1], totals[0:1])[1]
    return Rows(counts.shape, lambda a, b: embedder.transform(counts[a:b], totals[a:b])[0]), baseline


def _embedded(rows: np.ndarray, counts: csr_matrix, embedder: Embedder) -> np.ndarray:
    embedding = embedder.embed(rows)
    embedding[np.diff(counts.indptr) == 0] = np.nan
    return embedding


def _row_sums(graph: Graph, start: int, stop: int) -> np.ndarray:
    weights = graph.weights[graph.indptr[start] : graph.indptr[stop]].astype(np.float64)
    bounds = graph.indptr[start:stop] - graph.indptr[start]
    sums = np.add.reduceat(np.append(weights, 0.0), bounds)
    return np.where(np.diff(graph.indptr[start : stop + 1]) > 0, sums, 0.0)


def compute(inputs: dict[str, str], start: int, stop: int, settings: dict[str, Any], embedder: dict[str, Any],
            embedder_digest: str) -> dict[str, np.ndarray]:  # fmt: skip
    """Task body: read a slice and its graph, embed one tile."""
    config = PropagationConfig(**settings)
    panel, totals, ready = _open(inputs, embedder, embedder_digest)
    targets = read_rows(inputs["graph"], "target_nonzeros", start, stop) if config.cap_final else None
    graph = _tile_graph(inputs["graph"], start, stop)
    return {"X_fp": run_tile(panel, graph, totals, ready, start=start, stop=stop, settings=config, targets=targets)}


def compute_plain(inputs: dict[str, str], start: int, stop: int, embedder: dict[str, Any], embedder_digest: str
                  ) -> dict[str, np.ndarray]:  # fmt: skip
    """Task body: embed one tile without diffusion."""
    panel, totals, ready = _open(inputs, embedder, embedder_digest)
    return {"plain": run_plain(panel, totals, ready, start=start, stop=stop)}


def compute_diffused(inputs: dict[str, str], plain: str, start: int, stop: int, settings: dict[str, Any]
                     ) -> dict[str, np.ndarray]:  # fmt: skip
    """Task body: diffuse the embeddings of one tile."""
    n = SliceStore(inputs["slice"]).n_cells
    rows = Rows((n, EMBEDDING_SIZE), lambda a, b: read_rows(plain, "plain", a, b))
    graph = _tile_graph(inputs["graph"], start, stop)
    return {"X_fp": diffuse_embedding(graph, rows, start=start, stop=stop, settings=PropagationConfig(**settings))}


def _open(inputs: dict[str, str], embedder: dict[str, Any], digest: str) -> tuple[PanelCounts, np.ndarray, Embedder]:
    panel = panel_counts(SliceStore(inputs["slice"]), reference_symbols(inputs["reference"]), in_memory=False)
    statistics = read_arrays(inputs["statistics"])
    config = EmbedderConfig(**embedder)
    factory = embedder_factory(config.name)
    if factory.digest(config) != digest:
        raise CheckpointError(
            f"the checkpoint in {config.checkpoint} is not the one that this atlas was created with: "
            "put the original files back, or create an atlas for the new ones"
        )
    ready = factory.open(config, panel.symbols, read_arrays(inputs["panel"]), statistics)
    return panel, statistics["totals"], ready


def _tile_graph(path: str, start: int, stop: int) -> Graph:
    """The graph with the edges of rows `start` to `stop` alone."""
    indptr = read_arrays(path, ["indptr"])["indptr"]
    first, last = int(indptr[start]), int(indptr[stop])
    return Graph(
        np.clip(indptr, first, last) - first,
        read_rows(path, "indices", first, last),
        read_rows(path, "weights", first, last),
    )


def plan_stage(catalog: Catalog, record: SliceRecord, keys: dict[str, str], *, embedder_digest: str) -> list[Task]:
    """One task per tile, and one that publishes the slice's embedding when all tiles are there."""
    config = atlas_config(catalog)
    store = SliceStore(catalog.path("slices", keys["ingest"]))
    inputs = {
        "slice": str(catalog.path("slices", keys["ingest"])),
        "reference": str(catalog.path("references", str(catalog.state.reference))),
        "statistics": str(catalog.path("statistics", keys["tile"])),
        "panel": str(catalog.path("panels", keys["reference"])),
        "graph": str(catalog.path("graphs", keys["propagate"])),
    }
    final = str(catalog.path("embeddings", keys["embed"]))
    settings = {"settings": to_dict(config.propagation)}
    ready = {"embedder": to_dict(config.embedder), "embedder_digest": embedder_digest}
    lineage = {"stage": "embed", "graph": keys["propagate"], "panel": keys["reference"], "embedder": embedder_digest}
    edges = config.tile.tile_cells * (2 * config.propagation.n_neighbors + 1) * 8 * 2 + record.n_cells * 24

    def memory(cells: int) -> int:
        sums = cells * max(store.n_genes, EMBEDDING_SIZE) * 12
        return streamed_memory(store) + cells * store.n_genes * 12 + sums + cells * EMBEDDING_SIZE * 12 + edges

    def tiles(function: str, arguments: dict[str, Any], array: tuple[str, int, str], **place: str) -> list[Task]:
        return tile_tasks(
            catalog,
            record,
            stage="embed",
            key=keys["embed"],
            function=f"lloki_atlas.stages.embed:{function}",
            arguments={"inputs": inputs, **arguments},
            array=array,
            lineage=lineage,
            memory=memory,
            **place,
        )

    if config.propagation.diffuse == "counts":
        return tiles("compute", {**settings, **ready}, ("X_fp", EMBEDDING_SIZE, "float16"))
    if is_complete(final):  # embeddings without diffusion are no longer there
        return []
    plain = str(catalog.path("staging", f"{keys['embed']}.plain"))
    read = READ_ROWS * EMBEDDING_SIZE * 20  # dense embeddings as sparse rows
    first = tiles("compute_plain", ready, ("plain", EMBEDDING_SIZE, "float32"), path=plain, until=final, step="plain")
    second = tiles("compute_diffused", {**settings, "plain": plain}, ("X_fp", EMBEDDING_SIZE, "float16"))
    return [*first, *(replace(task, projected_memory=task.projected_memory + read) for task in second)]


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
    path: str = "",
    until: str = "",
    step: str = "",
) -> list[Task]:
    """Tasks that fill one (n_cells, size) array of a slice tile by tile, and the one that publishes it.

    The array is a stage's own output, or one on the way to it: then at `path`, superfluous once `until` is there, and
    with `step` in the names of its tasks.
    """
    name, size, dtype = array
    prefix = f"{stage}/{record.slice_id}" + (f"/{step}" if step else "")
    tile_cells = SliceStore(catalog.path("slices", record.objects["ingest"])).tile_cells
    output = Output(
        path=path or str(catalog.path("embeddings", key)),
        staging=f"{path}.new" if path else str(catalog.path("staging", key)),
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
            name=f"{prefix}/{start}",
            stage=stage,
            function=function,
            arguments={**arguments, "start": start, "stop": min(start + tile_cells, record.n_cells)},
            output=replace(output, rows=start),
            n_cells=0 if step else min(tile_cells, record.n_cells - start),
            projected_memory=memory(min(tile_cells, record.n_cells)),
            slice_id=record.slice_id,
            until=until,
        )
        for start in range(0, record.n_cells, tile_cells)
    ]
    publish = Task(
        name=f"{prefix}/publish",
        stage=stage,
        function="",
        arguments={},
        output=output,
        requires=tuple(tile.name for tile in tiles),
        slice_id=record.slice_id,
        until=until,
    )
    return [*tiles, publish]
