"""Where expression neighbours are searched: the rows whose cosines are compared, before and after propagation."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from lloki_atlas.config import PropagationConfig
from lloki_atlas.kernels.rows import Rows, dense_rows
from lloki_atlas.kernels.scaling import scaled_components
from lloki_atlas.stages.panels import READ_ROWS, PanelCounts


def neighbor_rows(
    panel: PanelCounts, settings: PropagationConfig, *, propagated: Any = None, n_threads: int = 1
) -> Any:
    """Rows of the space of the neighbour search.

    Parameters
    ----------
    panel
        Counts of the slice.
    settings
        `graph_space` and `n_components`.
    propagated
        (n_cells, n_shared) float32 rows that take the place of the shared counts; None before propagation.
    n_threads
        Threads; they change no bit.

    Returns
    -------
    (n_cells, d) float32: an array for the scaled space, rows that are made when they are sliced for counts.
    """
    if settings.graph_space == "counts":
        return dense_rows(panel.shared_counts) if propagated is None else propagated
    if propagated is None:
        return scaled_components(panel.counts, n_components=settings.n_components, n_threads=n_threads)
    merged = _merged(panel, propagated)
    totals = _library_sizes(merged, panel.row_sums()[0])
    return scaled_components(merged, n_components=settings.n_components, totals=totals, n_threads=n_threads)


def _library_sizes(merged: Rows, observed: np.ndarray) -> np.ndarray:
    """Row sums (n_cells,) float64, none below the smallest library that was observed.

    What reaches a cell without counts may add up to a hundredth of a count: scaled up like a library, such cells would
    stretch every gene's spread.
    """
    n = merged.shape[0]
    sums = np.empty(n)
    for start in range(0, n, READ_ROWS):
        part = merged[start : min(start + READ_ROWS, n)]
        sums[start : start + READ_ROWS] = np.asarray(part.sum(axis=1, dtype=np.float64)).ravel()
    filled = observed[observed > 0]
    return np.maximum(sums, float(filled.min())) if len(filled) else sums


def _merged(panel: PanelCounts, propagated: Any) -> Rows:
    """Counts with the shared genes' columns taken from propagation; unshared genes help to find neighbours."""
    unshared = np.ones(panel.counts.shape[1], dtype=bool)
    unshared[panel.shared] = False

    def read(start: int, stop: int) -> csr_matrix:
        rest, other = panel.counts[start:stop].tocoo(), csr_matrix(propagated[start:stop]).tocoo()
        kept = unshared[rest.col]
        rows = np.concatenate([rest.row[kept], other.row])
        columns = np.concatenate([rest.col[kept], panel.shared[other.col]])
        data = np.concatenate([rest.data[kept], other.data]).astype(np.float32)
        merged = csr_matrix((data, (rows, columns)), shape=(stop - start, panel.counts.shape[1]))
        merged.sort_indices()
        return merged

    return Rows(panel.counts.shape, read)
