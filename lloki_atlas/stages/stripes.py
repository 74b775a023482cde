"""Cutting a slice into stripes along x, as the published code does with large ones: its own form of approximation."""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_matrix

from lloki_atlas.kernels.graph import Graph

SPLIT_CELLS = 30_000


def cut_stripes(coordinates: np.ndarray, technology: str) -> list[np.ndarray]:
    """Rows of each stripe: one below 30,000 cells, else two of equal size along x, or four for Xenium."""
    n = len(coordinates)
    count = 1 if n < SPLIT_CELLS else 4 if "xenium" in technology.lower() else 2
    return [np.sort(rows) for rows in np.array_split(np.argsort(coordinates[:, 0], kind="stable"), count)]


def join_stripes(stripes: list[np.ndarray], graphs: list[Graph]) -> Graph:
    """One graph over the slice; cells of different stripes are not joined."""
    n = sum(len(rows) for rows in stripes)
    rows = [np.repeat(cells, np.diff(graph.indptr)) for cells, graph in zip(stripes, graphs, strict=True)]
    columns = [cells[graph.indices] for cells, graph in zip(stripes, graphs, strict=True)]
    weights = np.concatenate([graph.weights for graph in graphs])
    joined = coo_matrix((weights, (np.concatenate(rows), np.concatenate(columns))), shape=(n, n)).tocsr()
    joined.sort_indices()
    return Graph(joined.indptr.astype(np.int64), joined.indices.astype(np.int32), joined.data.astype(np.float32))
