"""What the steps of LLOKI-FP need of memory, stated before they run: bytes above what the process holds already."""

from __future__ import annotations

from lloki_atlas.config import PropagationConfig
from lloki_atlas.kernels import scaling, self_search
from lloki_atlas.kernels.propagation import projected_bytes
from lloki_atlas.stages.panels import ENTRY_BYTES, read_entries
from lloki_atlas.stages.search import is_approximate

KEY_BYTES = 8  # of a neighbour in the list of a row
_BASE = 96 * 2**20  # compiled kernels, and what the allocator keeps
_TRAIL = 1.05  # what the allocator does not give back between steps


def search_memory(rows_searched: int, rows_held: int, n_dimensions: int, settings: PropagationConfig) -> int:
    """Lists of the rows searched, as keys and unpacked, the rows in memory, and the slabs that meet."""
    lists = rows_searched * settings.n_neighbors * KEY_BYTES * 2
    slab = min(self_search.SLAB_BYTES, max(rows_held, rows_searched, 256) * n_dimensions * 4)
    return lists + rows_held * n_dimensions * 4 + 3 * slab


def graph_memory(n_cells: int, settings: PropagationConfig) -> int:
    """Neighbours, the edges of their union (at most 2 k + 1 a cell) and their weights."""
    k = settings.n_neighbors
    return n_cells * (4 * k + 8 * (2 * k + 1) + 40)


def space_memory(n_cells: int, n_genes: int, settings: PropagationConfig, *, n_threads: int = 1) -> int:
    """Components of every cell, and products of genes and one piece of the counts a thread."""
    if settings.graph_space == "counts":
        return 0
    piece = scaling.PIECE * n_genes * 28  # counts and propagated values of a piece, merged
    return n_cells * (settings.n_components * 4 + 16) + (n_threads + 2) * n_genes**2 * 8 + n_threads * piece


def slice_memory(
    n_cells: int,
    n_genes: int,
    n_counts: int,
    settings: PropagationConfig,
    *,
    in_memory: bool = True,
    n_threads: int = 1,
) -> int:
    """Peak of LLOKI-FP on a slice in one step.

    Parameters
    ----------
    n_cells, n_genes, n_counts
        Size of the slice: cells, genes of its panel, counts that are not zero.
    settings
        Graph space, neighbours, storage.
    in_memory
        Whether counts and propagated values are held in memory, or read and kept on disk.
    n_threads
        Threads of the step.
    """
    k = settings.n_neighbors
    counts = ENTRY_BYTES * (n_counts if in_memory else read_entries(n_cells, n_genes, n_counts))
    values = projected_bytes(n_cells, n_genes, storage=settings.storage, in_memory=in_memory)
    held = values if in_memory else 0
    edges = n_cells * (2 * k + 1) * 8
    n_dimensions = n_genes if settings.graph_space == "counts" else settings.n_components
    rows = 0 if settings.graph_space == "counts" else n_cells
    search = search_memory(n_cells, rows, n_dimensions, settings)
    if is_approximate(n_cells, settings):  # dense rows, their copy in the index, and its own lists of candidates
        search += n_cells * (2 * n_dimensions * 4 + 40 * k)
    row_wise = 0 if settings.support == "frozen" else n_cells * n_genes * 13
    steps = (
        space_memory(n_cells, n_genes, settings, n_threads=n_threads) + held,
        search + held,
        graph_memory(n_cells, settings) + held,
        edges + values + row_wise,
    )
    per_cell = n_cells * 64  # coordinates, budgets, targets, totals
    return int(_TRAIL * (counts + per_cell + max(steps))) + _BASE
