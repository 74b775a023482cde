"""Diffusion and embedding of one tile: X_denoised = α A_imp T(X⁰) + (1 − α) T(X⁰) (equation 5) → 512 numbers a cell.

T is the embedder's own input scale (the identity for scGPT). The denoised rows live only inside the task. A task takes
one tile, or streams several through a device (`lloki_atlas.stages.streaming`); the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from lloki_atlas.stages import streaming
from lloki_atlas.stages.filling import device_tasks, tile_tasks, tiled_output
from lloki_atlas.stages.lineage import atlas_config
from lloki_atlas.stages.panels import (
    CELL_BYTES,
    ENTRY_BYTES,
    PanelCounts,
    panel_counts,
    read_entries,
    reference_symbols,
    streamed_memory,
)
from lloki_atlas.store.arrays import read_arrays, read_rows
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
    scaled = _transformed(counts, totals, embedder)
    rows = mixed_rows(graph, scaled, start=start, stop=stop, settings=settings, targets=targets)
    return _embedded(rows, counts[start:stop], embedder).astype(np.float16)


def mixed_rows(
    graph: Graph,
    scaled: tuple[Any, np.ndarray],
    *,
    start: int,
    stop: int,
    settings: PropagationConfig,
    targets: np.ndarray | None,
) -> np.ndarray:
    """Rows `start` to `stop` of X_denoised, (stop - start, n_genes) float32.

    Parameters
    ----------
    graph, start, stop, settings, targets
        As for `run_tile`.
    scaled
        Counts of the whole slice on the embedder's scale, and the baseline: what its `transform` returns.
    """
    values, baseline = scaled
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
    return rows


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
    embedding[_without_counts(counts)] = np.nan
    return embedding


def _without_counts(counts: csr_matrix) -> np.ndarray:
    return np.diff(counts.indptr) == 0


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
    targets, graph = _targets(inputs["graph"], start, stop, config), _tile_graph(inputs["graph"], start, stop)
    return {"X_fp": run_tile(panel, graph, totals, ready, start=start, stop=stop, settings=config, targets=targets)}


def compute_tiles(
    inputs: dict[str, str], starts: list[int], settings: dict[str, Any], embedder: dict[str, Any],
    embedder_digest: str, in_memory: bool, depth: int, encoding: dict[str, str] | None,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:  # fmt: skip
    """Task body: stream tiles through the embedder, and through the frozen encoder with an `encoding`.

    `in_memory` counts are read once for all tiles, others once for each. At most `depth` tiles are prepared ahead.
    """
    config = PropagationConfig(**settings)
    panel, totals, ready = _open(inputs, embedder, embedder_digest, in_memory=in_memory)
    tile_cells = SliceStore(inputs["slice"]).tile_cells
    counts = panel.shared_counts
    scaled = _transformed(counts, totals, ready)
    encoder = streaming.frozen_encoder(encoding["model_path"]) if encoding else None

    def prepare(start: int) -> tuple[int, np.ndarray, Any]:
        stop = min(start + tile_cells, panel.n_cells)
        targets, graph = _targets(inputs["graph"], start, stop, config), _tile_graph(inputs["graph"], start, stop)
        rows = mixed_rows(graph, scaled, start=start, stop=stop, settings=config, targets=targets)
        return start, _without_counts(counts[start:stop]), streaming.prepare_rows(ready, rows)

    def finish(tile: tuple[int, np.ndarray, Any]) -> tuple[int, dict[str, np.ndarray]]:
        start, empty, prepared = tile
        if encoding is None or encoder is None:
            arrays = {"X_fp": streaming.finish_rows(ready, prepared)}
        else:
            embedding, latents = streaming.finish_encoded(ready, prepared, encoder, encoding["platform"])
            arrays = {"X_fp": embedding, "X_lloki": latents}
        for values in arrays.values():
            values[empty] = np.nan
        return start, {**arrays, "X_fp": arrays["X_fp"].astype(np.float16)}

    return streaming.stream(starts, prepare, finish, depth=depth)


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


def _open(
    inputs: dict[str, str], embedder: dict[str, Any], digest: str, *, in_memory: bool = False
) -> tuple[PanelCounts, np.ndarray, Embedder]:
    panel = panel_counts(SliceStore(inputs["slice"]), reference_symbols(inputs["reference"]), in_memory=in_memory)
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


def _targets(graph_path: str, start: int, stop: int, config: PropagationConfig) -> np.ndarray | None:
    return read_rows(graph_path, "target_nonzeros", start, stop) if config.cap_final else None


def _tile_graph(path: str, start: int, stop: int) -> Graph:
    """The graph with the edges of rows `start` to `stop` alone."""
    indptr = read_arrays(path, ["indptr"])["indptr"]
    first, last = int(indptr[start]), int(indptr[stop])
    return Graph(
        np.clip(indptr, first, last) - first,
        read_rows(path, "indices", first, last),
        read_rows(path, "weights", first, last),
    )


def plan_stage(
    catalog: Catalog,
    record: SliceRecord,
    keys: dict[str, str],
    *,
    embedder_digest: str,
    device_memory_mb: int | None = None,
    encoding: tuple[dict[str, str], Output] | None = None,
) -> list[Task]:
    """Tasks of one tile, or of several for a device, and one that publishes the slice's embedding.

    Parameters
    ----------
    catalog, record, keys
        The slice and the keys of its stages.
    embedder_digest
        Of the embedder that the catalog was created with.
    device_memory_mb
        Most that may be taken of a GPU, in 2^20 bytes; what the settings say when None.
    encoding
        Of an embedder that uses a device: what the tasks need to encode the tiles as well, and where that goes.
    """
    config = atlas_config(catalog)
    store = SliceStore(catalog.path("slices", keys["ingest"]))
    inputs = {
        "slice": str(catalog.path("slices", keys["ingest"])),
        "reference": str(catalog.path("references", str(catalog.state.reference))),
        "statistics": str(catalog.path("statistics", keys["tile"])),
        "panel": str(catalog.path("panels", keys["reference"])),
        "graph": str(catalog.path("graphs", keys["propagate"])),
    }
    embedder = config.embedder
    if device_memory_mb is not None:
        embedder = replace(embedder, device_memory_mb=device_memory_mb)
    settings = {"settings": to_dict(config.propagation)}
    ready = {"embedder": to_dict(embedder), "embedder_digest": embedder_digest}
    lineage = {"stage": "embed", "graph": keys["propagate"], "panel": keys["reference"], "embedder": embedder_digest}
    output = tiled_output(catalog, record, keys["embed"], array=("X_fp", EMBEDDING_SIZE, "float16"), lineage=lineage)
    if config.propagation.diffuse == "embedding":
        return _plan_embedding_first(catalog, record, output, inputs=inputs, settings=settings, ready=ready)
    if not streaming.uses_device(embedder):
        return tile_tasks(
            record,
            output,
            stage="embed",
            function="lloki_atlas.stages.embed:compute",
            arguments={"inputs": inputs, **settings, **ready},
            memory=lambda cells: streamed_memory(store) + _tile_memory(store, cells, config.propagation),
        )
    in_memory = store.n_counts * ENTRY_BYTES <= config.tile.slice_memory_mb * 2**20
    cells = min(store.tile_cells, record.n_cells)
    held = store.n_counts if in_memory else read_entries(store.n_cells, store.n_genes, store.n_counts)
    once, each = (held, 0) if in_memory else (0, held)
    tile_bytes = _tile_memory(store, cells, config.propagation) + each * ENTRY_BYTES
    shared = once * ENTRY_BYTES + record.n_cells * CELL_BYTES + 64 * 2**20
    return device_tasks(
        record,
        output,
        stage="embed",
        function="lloki_atlas.stages.embed:compute_tiles",
        arguments={
            "inputs": inputs,
            **settings,
            **ready,
            "in_memory": in_memory,
            "depth": streaming.queue_depth(tile_bytes),
            "encoding": encoding[0] if encoding else None,
        },
        memory=lambda n_tiles: shared + streaming.queue_bytes(n_tiles, tile_bytes),
        tiles_per_task=streaming.TILES_PER_TASK,
        also=(encoding[1],) if encoding else (),
    )


def _plan_embedding_first(
    catalog: Catalog,
    record: SliceRecord,
    output: Output,
    *,
    inputs: dict[str, str],
    settings: dict[str, Any],
    ready: dict[str, Any],
) -> list[Task]:
    """Tasks that embed single cells, and tasks that diffuse what those made."""
    if is_complete(output.path):  # embeddings without diffusion are no longer there
        return []
    config, store = PropagationConfig(**settings["settings"]), SliceStore(inputs["slice"])
    plain = f"{output.staging}.plain"

    def memory(cells: int) -> int:
        return streamed_memory(store) + _tile_memory(store, cells, config)

    read = READ_ROWS * EMBEDDING_SIZE * 20  # dense embeddings as sparse rows
    first = tile_tasks(
        record,
        tiled_output(
            catalog, record, "", array=("plain", EMBEDDING_SIZE, "float32"), lineage=dict(output.lineage), path=plain
        ),
        stage="embed",
        function="lloki_atlas.stages.embed:compute_plain",
        arguments={"inputs": inputs, **ready},
        memory=memory,
        until=output.path,
        step="plain",
    )
    second = tile_tasks(
        record,
        output,
        stage="embed",
        function="lloki_atlas.stages.embed:compute_diffused",
        arguments={"inputs": inputs, **settings, "plain": plain},
        memory=lambda cells: memory(cells) + read,
    )
    return [*first, *second]


def _tile_memory(store: SliceStore, cells: int, settings: PropagationConfig) -> int:
    """Bytes of one tile between reading and writing: rows, sums, vectors, its part of the graph."""
    sums = cells * max(store.n_genes, EMBEDDING_SIZE) * 12
    edges = cells * (2 * settings.n_neighbors + 1) * 8 * 2 + store.n_cells * 24
    return cells * store.n_genes * 12 + sums + cells * EMBEDDING_SIZE * 12 + edges
