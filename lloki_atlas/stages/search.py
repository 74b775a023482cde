"""Which search finds the neighbours of a slice, and how much of the exact answer it finds."""

from __future__ import annotations

from typing import Any

import numpy as np

from lloki_atlas.config import PropagationConfig
from lloki_atlas.kernels.approximate import descent_neighbors, measured_recall
from lloki_atlas.kernels.neighbors import Neighbors, nearest_neighbors


def is_approximate(n_cells: int, settings: PropagationConfig) -> bool:
    """Whether a slice of that size is searched approximately."""
    return settings.search == "approximate" or 0 < settings.approximate_from <= n_cells


def find_neighbors(rows: Any, settings: PropagationConfig, *, key: int, n_threads: int = 1) -> tuple[Neighbors, float]:
    """Find the nearest other rows by cosine.

    Parameters
    ----------
    rows
        (n_cells, d) float32, an array or anything that is sliced like one.
    settings
        Number of neighbours and the search.
    key
        Key of the slice's random stream, for a search that draws.
    n_threads
        Threads; they change no bit.

    Returns
    -------
    The neighbours, and recall@k: 1 for the exact search, else the share of the exact neighbours that were found,
    measured on a keyed sample of cells.
    """
    k, n = settings.n_neighbors, rows.shape[0]
    if not is_approximate(n, settings):
        return nearest_neighbors(rows, n_neighbors=k, n_threads=n_threads), 1.0
    found = descent_neighbors(np.asarray(rows[0:n]), n_neighbors=k, key=key)
    return found, measured_recall(found, rows, key=key)
