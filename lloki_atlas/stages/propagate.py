"""LLOKI-FP of one slice: neighbours → graph → budget → propagation → the second graph, which diffusion walks.

The propagated matrix only chooses the neighbours of the second graph (equation 5 mixes counts, not propagated
values), so the graph is what is stored: about 75 entries a cell.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from lloki_atlas.config import PropagationConfig
from lloki_atlas.errors import InputError
from lloki_atlas.kernels.bandwidth import cross_bandwidth
from lloki_atlas.kernels.blocks import MemoryBlocks
from lloki_atlas.kernels.graph import Graph, build_graph
from lloki_atlas.kernels.hashing import mix
from lloki_atlas.kernels.propagation import MakeBlocks, propagate_blocks
from lloki_atlas.kernels.row_propagation import propagate_rows
from lloki_atlas.kernels.rows import Rows
from lloki_atlas.kernels.transport import sparsity_histogram
from lloki_atlas.stages.panels import PanelCounts
from lloki_atlas.stages.search import find_neighbors
from lloki_atlas.stages.spaces import neighbor_rows
from lloki_atlas.stages.sparsity import sparsity_targets
from lloki_atlas.stages.stripes import cut_stripes, join_stripes

FIRST, SECOND = 1, 2  # the graphs, as words of their random streams
_TINY = np.float32(1e-8)  # what the published code adds to the maximum that it divides by


@dataclass(frozen=True)
class Sparsities:
    """What decides the budgets of a slice.

    Parameters
    ----------
    own_histogram, reference_histogram
        (n_shared + 1,) int64, cells by number of non-zero shared genes.
    reference_histogram_all
        (n_reference_genes + 1,) int64 over all genes of the reference; only the published form asks for it.
    """

    own_histogram: np.ndarray
    reference_histogram: np.ndarray
    reference_histogram_all: np.ndarray | None = None


@dataclass(frozen=True)
class Filled:
    """Propagated values of a slice.

    Parameters
    ----------
    rows
        (n_cells, n_shared) float32, sliced like a matrix: observed values and at most `budget` filled in per cell.
    budget
        (n_cells,) int32, how many unknown genes a cell may fill in.
    target_nonzeros, achieved_nonzeros
        (n_cells,) int32, non-zero genes that optimal transport assigns to the cell, and that it has.
    n_iterations, relative_change
        How propagation ended.
    """

    rows: Any
    budget: np.ndarray
    target_nonzeros: np.ndarray
    achieved_nonzeros: np.ndarray
    n_iterations: int
    relative_change: float


@dataclass(frozen=True)
class PropagatedSlice:
    """What LLOKI-FP makes of one slice.

    Parameters
    ----------
    graph
        The second graph, A_imp of equation 5.
    filled
        Propagated values and how they came about.
    recall
        recall@k of the searches for the first and the second graph, 1 for exact ones.
    bandwidth_um
        σ of the two graphs.
    """

    graph: Graph
    filled: Filled
    recall: tuple[float, float]
    bandwidth_um: tuple[float, float]

    @property
    def values(self) -> np.ndarray:
        """(n_cells, n_shared) float32, all propagated values as one array."""
        return np.asarray(self.filled.rows[0 : self.graph.n_cells])


def run_slice(
    panel: PanelCounts,
    coordinates: np.ndarray,
    *,
    own_histogram: np.ndarray,
    reference_histogram: np.ndarray,
    bandwidth_um: float,
    settings: PropagationConfig,
    key: int,
    reference_histogram_all: np.ndarray | None = None,
    technology: str = "",
    n_threads: int = 1,
    make_blocks: MakeBlocks = MemoryBlocks,
) -> PropagatedSlice:
    """Run equations 1 to 4 on one slice.

    Parameters
    ----------
    panel
        Counts of the slice.
    coordinates
        (n_cells, 2) float32, µm.
    own_histogram, reference_histogram, reference_histogram_all
        See `Sparsities`.
    bandwidth_um
        σ of equation 1.
    settings
        Graph, budget and stopping rule.
    key
        Key of the slice's random stream, which draws the support of over-full cells.
    technology
        Of the slice: the published code cuts some into more stripes.
    n_threads
        Threads; they change no bit.
    make_blocks
        Where propagated values are kept, see `propagate_blocks`.

    Returns
    -------
    PropagatedSlice
        Cells in the order of the counts.
    """
    stripes = cut_stripes(coordinates, technology) if settings.split == "stripes" else []
    if len(stripes) > 1:
        parts = []
        for stripe, rows in enumerate(stripes):
            piece = PanelCounts(csr_matrix(panel.counts[0 : panel.n_cells])[rows], panel.shared, panel.symbols)
            part = run_slice(
                piece,
                coordinates[rows],
                own_histogram=sparsity_histogram(piece.row_sums()[1], len(panel.symbols)),
                reference_histogram=reference_histogram,
                reference_histogram_all=reference_histogram_all,
                bandwidth_um=bandwidth_um,
                settings=replace(settings, split="none"),
                key=mix(key, stripe),
                n_threads=n_threads,
            )
            parts.append(part)
        return _join(stripes, parts)
    sparsities = Sparsities(own_histogram, reference_histogram, reference_histogram_all)
    first, first_bandwidth, first_recall = slice_graph(
        neighbor_rows(panel, settings, n_threads=n_threads),
        coordinates,
        bandwidth_um=bandwidth_um,
        settings=settings,
        key=mix(key, FIRST),
        n_threads=n_threads,
    )
    filled = fill(
        first, panel, sparsities=sparsities, settings=settings, key=key, n_threads=n_threads, make_blocks=make_blocks
    )
    if not filled.budget.any():  # nothing filled in: the second graph would be the first again
        return PropagatedSlice(first, filled, (first_recall, first_recall), (first_bandwidth, first_bandwidth))
    del first
    second, second_bandwidth, second_recall = slice_graph(
        neighbor_rows(panel, settings, propagated=filled.rows, n_threads=n_threads),
        coordinates,
        bandwidth_um=bandwidth_um,
        settings=settings,
        key=mix(key, SECOND),
        n_threads=n_threads,
    )
    return PropagatedSlice(second, filled, (first_recall, second_recall), (first_bandwidth, second_bandwidth))


def slice_graph(
    rows: Any,
    coordinates: np.ndarray,
    *,
    bandwidth_um: float,
    settings: PropagationConfig,
    key: int,
    n_threads: int = 1,
) -> tuple[Graph, float, float]:
    """Search neighbours among `rows` and join them. Returns the graph, its σ and the recall of the search."""
    neighbors, recall = find_neighbors(rows, settings, key=key, n_threads=n_threads)
    indices = neighbors.indices
    del neighbors  # the distances are not needed
    graph, sigma = joined_graph(
        indices, coordinates, bandwidth_um=bandwidth_um, settings=settings, key=key, n_threads=n_threads
    )
    return graph, sigma, recall


def joined_graph(
    indices: np.ndarray,
    coordinates: np.ndarray,
    *,
    bandwidth_um: float,
    settings: PropagationConfig,
    key: int,
    n_threads: int = 1,
) -> tuple[Graph, float]:
    """Join neighbours (n_cells, k) to the graph of a slice. Returns it and its σ."""
    sigma = cross_bandwidth(coordinates, key=key) if settings.bandwidth == "cross" else bandwidth_um
    graph = build_graph(indices, coordinates, bandwidth_um=sigma, self_loops=settings.self_loops, n_threads=n_threads)
    return graph, sigma


def fill(
    graph: Graph,
    panel: PanelCounts,
    *,
    sparsities: Sparsities,
    settings: PropagationConfig,
    key: int,
    n_threads: int = 1,
    make_blocks: MakeBlocks = MemoryBlocks,
) -> Filled:
    """Propagate the counts of a slice over its first graph, within the budgets that its sparsity asks for."""
    _, nonzeros = panel.row_sums()
    targets = sparsity_targets(
        nonzeros,
        own_histogram=sparsities.own_histogram,
        reference_histogram=sparsities.reference_histogram,
        reference_histogram_all=sparsities.reference_histogram_all,
        settings=settings,
    )
    budget = np.maximum(targets - nonzeros, 0).astype(np.int32)
    if settings.support == "frozen":
        rows = propagate_blocks(
            graph,
            panel.shared_counts,
            budget,
            key=key,
            max_iterations=settings.max_iterations,
            tolerance=settings.tolerance,
            storage=settings.storage,
            n_threads=n_threads,
            make_blocks=make_blocks,
        )
        return Filled(rows, budget, targets, rows.count_nonzeros(), rows.n_iterations, rows.relative_change)
    if isinstance(panel.counts, Rows):
        raise InputError(
            f"a slice of {panel.n_cells:,} cells is streamed, and a {settings.support} support needs it in memory: "
            "raise slice_memory_mb and search_cells, or use support='frozen'"
        )
    counts = csr_matrix(panel.shared_counts, copy=True)
    scale = counts.data.max() + _TINY if settings.stopping == "absolute" and counts.nnz else np.float32(1)
    counts.data /= scale
    found = propagate_rows(
        graph,
        counts,
        budget,
        key=key,
        support=settings.support,  # type: ignore[arg-type]
        stopping=settings.stopping,  # type: ignore[arg-type]
        max_iterations=settings.max_iterations,
        tolerance=settings.tolerance,
        n_threads=n_threads,
    )
    values = found.values * scale
    achieved = np.count_nonzero(values, axis=1).astype(np.int32)
    return Filled(values, budget, targets, achieved, found.n_iterations, found.relative_change)


def _join(stripes: list[np.ndarray], parts: list[PropagatedSlice]) -> PropagatedSlice:
    """Put the stripes of a slice together again, in the order of its cells."""
    n = sum(len(rows) for rows in stripes)

    def gather(values: list[np.ndarray]) -> np.ndarray:
        out = np.empty((n, *values[0].shape[1:]), dtype=values[0].dtype)
        for rows, part in zip(stripes, values, strict=True):
            out[rows] = part
        return out

    return PropagatedSlice(
        graph=join_stripes(stripes, [part.graph for part in parts]),
        filled=Filled(
            rows=gather([part.values for part in parts]),
            budget=gather([part.filled.budget for part in parts]),
            target_nonzeros=gather([part.filled.target_nonzeros for part in parts]),
            achieved_nonzeros=gather([part.filled.achieved_nonzeros for part in parts]),
            n_iterations=max(part.filled.n_iterations for part in parts),
            relative_change=max(part.filled.relative_change for part in parts),
        ),
        recall=(min(part.recall[0] for part in parts), min(part.recall[1] for part in parts)),
        bandwidth_um=(
            float(np.mean([part.bandwidth_um[0] for part in parts])),
            float(np.mean([part.bandwidth_um[1] for part in parts])),
        ),
    )
