"""Diffusion and embedding of one tile: X_denoised = α A_imp T(X⁰) + (1 − α) T(X⁰) (equation 5) → 512 numbers a cell.

T is the embedder's own input scale (the identity for scGPT). The denoised rows live only inside the task. A task takes
one tile, or streams several through a device (`lloki_atlas.stages.streaming`); the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from lloki_atlas.config import EmbedderConfig, PropagationConfig
from lloki_atlas.errors import CheckpointError
from lloki_atlas.kernels.cap import cap_rows
from lloki_atlas.kernels.diffusion import diffuse
from lloki_atlas.kernels.graph import Graph
from lloki_atlas.kernels.rows import Rows
from lloki_atlas.models.embedders import EMBEDDING_SIZE, Embedder, embedder_factory
from lloki_atlas.stages import streaming
from lloki_atlas.stages.panels import PanelCounts, panel_counts, reference_symbols
from lloki_atlas.store.arrays import read_arrays, read_rows
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
    return _embedded(_plain_rows(counts, totals[start:stop], embedder), counts, embedder)


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


def _plain_rows(counts: csr_matrix, totals: np.ndarray, embedder: Embedder) -> np.ndarray:
    values, baseline = embedder.transform(counts, totals)
    return (values.toarray() + baseline[None, :]).astype(np.float32)


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


def compute_plain_tiles(
    inputs: dict[str, str], starts: list[int], embedder: dict[str, Any], embedder_digest: str, in_memory: bool,
    depth: int,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:  # fmt: skip
    """Task body: stream tiles through the embedder without diffusion; arguments as for `compute_tiles`."""
    panel, totals, ready = _open(inputs, embedder, embedder_digest, in_memory=in_memory)
    tile_cells = SliceStore(inputs["slice"]).tile_cells

    def prepare(start: int) -> tuple[int, np.ndarray, Any]:
        stop = min(start + tile_cells, panel.n_cells)
        counts = panel.shared_counts[start:stop]
        rows = _plain_rows(counts, totals[start:stop], ready)
        return start, _without_counts(counts), streaming.prepare_rows(ready, rows)

    def finish(tile: tuple[int, np.ndarray, Any]) -> tuple[int, dict[str, np.ndarray]]:
        start, empty, prepared = tile
        values = streaming.finish_rows(ready, prepared)
        values[empty] = np.nan
        return start, {"plain": values}

    return streaming.stream(starts, prepare, finish, depth=depth)


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
