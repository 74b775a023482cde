"""The graph of a slice: edges between neighbours in expression, weighted by distance in space, normalised."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.checks import array, finite
from lloki_atlas.kernels.neighbors import Neighbors
from lloki_atlas.kernels.threads import over_rows


@dataclass(frozen=True)
class Graph:
    """A square sparse matrix in CSR: `indptr` (n + 1,) int64, `indices` int32 ascending per row, `weights` float32."""

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    weights: NDArray[np.float32]

    def __post_init__(self) -> None:
        types = " ".join(str(part.dtype) for part in (self.indptr, self.indices, self.weights))
        if types != "int64 int32 float32":
            raise InputError(f"types are {types}: give int64, int32 and float32")
        if self.indptr.ndim != 1 or self.indptr.size == 0 or self.indices.shape != self.weights.shape:
            raise InputError("the arrays of a graph do not fit each other: give n + 1 pointers, and a weight per index")
        if self.indptr[0] != 0 or self.indptr[-1] != self.indices.size or (np.diff(self.indptr) < 0).any():
            raise InputError(f"indptr does not run from 0 to {self.indices.size}: give ascending row pointers")
        if self.indices.size and (int(self.indices.min()) < 0 or int(self.indices.max()) >= self.n_cells):
            raise InputError(f"an index lies outside 0 to {self.n_cells - 1}: give rows of the slice")
        if not np.isfinite(self.weights).all():
            raise InputError("a weight is not finite: build the graph from finite coordinates")

    @property
    def n_cells(self) -> int:
        """Number of rows."""
        return int(self.indptr.shape[0]) - 1


def build_graph(
    neighbors: Neighbors | NDArray[np.int32],
    coordinates: ArrayLike,
    *,
    bandwidth_um: float,
    self_loops: bool = True,
    n_threads: int = 1,
) -> Graph:
    """Build A = D^-1/2 W D^-1/2 on the union of the neighbour relation.

    w_ij = exp(−d_ij² / 2σ²) on the distance in space (equation 1), 1 on the diagonal. With a bandwidth of 0 (one
    cell, or all at one place) every weight is 1. Without self loops a cell without neighbours has an empty row.
    Sums are float64 in the order of indices. Memory at the peak: 12 bytes an edge of the union (at most 2 k + 1 a
    cell, about 1.8 k as a rule) and 8 bytes a cell.

    Parameters
    ----------
    neighbors
        `(n_cells, k)` neighbours in expression of every cell of the slice, or their indices alone, −1 for none.
    coordinates
        `(n_cells, 2)`, micrometre.
    bandwidth_um
        σ, micrometre.
    self_loops
        Whether each cell is joined to itself.
    n_threads
        Threads; they change no bit.

    Returns
    -------
    Graph
        Exactly symmetric.

    Raises
    ------
    InputError
        If shapes do not fit, an index is not a cell, or σ or a coordinate is not finite.
    """
    given = neighbors.indices if isinstance(neighbors, Neighbors) else neighbors
    indices = array(given, np.int32, name="indices", shape=(None, None))
    n = indices.shape[0]
    points = finite(array(coordinates, np.float32, name="coordinates", shape=(n, 2)), name="coordinates")
    if not (math.isfinite(bandwidth_um) and bandwidth_um >= 0):
        raise InputError(f"bandwidth_um is {bandwidth_um}: it has to be finite and not negative")
    if indices.size and int(indices.max()) >= n:
        raise InputError(f"a neighbour lies outside 0 to {n - 1}: search among the cells of the slice")
    bounds, entries = _join(indices, bool(self_loops))
    lengths = np.zeros(n + 1, dtype=np.int64)
    over_rows(n, n_threads, partial(_sort_rows, bounds, entries, lengths))
    indptr = np.cumsum(lengths)
    _close_up(bounds, indptr, entries)
    entries.resize(int(indptr[-1]), refcheck=False)  # what stays is in front
    weights, root = np.empty(entries.shape[0], dtype=np.float32), np.empty(n)
    sigma = float(bandwidth_um)
    over_rows(n, n_threads, partial(_degrees, indptr, entries, points, sigma, root))
    over_rows(n, n_threads, partial(_weights, indptr, entries, points, sigma, root, weights))
    return Graph(indptr, entries, weights)


def _join(neighbors: NDArray[Any], self_loops: bool) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return every edge in the rows of both of its cells, unordered, some of them twice."""
    bounds = _count_edges(neighbors, self_loops)
    entries = np.empty(int(bounds[-1]), dtype=np.int32)
    _place_edges(neighbors, self_loops, bounds[:-1].copy(), entries)
    return bounds, entries


@njit(nogil=True, cache=True)
def _count_edges(neighbors: NDArray[Any], self_loops: bool) -> NDArray[np.int64]:
    n, k = neighbors.shape
    bounds = np.zeros(n + 1, dtype=np.int64)
    for i in range(n):
        bounds[i + 1] += 1 if self_loops else 0
        for c in range(k):
            j = neighbors[i, c]
            if j >= 0 and j != i:
                bounds[i + 1] += 1
                bounds[j + 1] += 1
    for i in range(n):
        bounds[i + 1] += bounds[i]
    return bounds


@njit(nogil=True, cache=True)
def _place_edges(
    neighbors: NDArray[Any], self_loops: bool, ends: NDArray[np.int64], entries: NDArray[np.int32]
) -> None:
    for i in range(neighbors.shape[0]):
        if self_loops:
            entries[ends[i]] = i
            ends[i] += 1
        for c in range(neighbors.shape[1]):
            j = neighbors[i, c]
            if j >= 0 and j != i:
                entries[ends[i]] = j
                entries[ends[j]] = i
                ends[i] += 1
                ends[j] += 1


@njit(nogil=True, cache=True)
def _sort_rows(
    bounds: NDArray[Any], entries: NDArray[np.int32], lengths: NDArray[np.int64], start: int, stop: int
) -> None:
    # each row in order and without repeats at the front of its place; lengths[i + 1] is its new length
    for i in range(start, stop):
        row = entries[bounds[i] : bounds[i + 1]]
        row.sort()
        kept = 0
        for p in range(row.shape[0]):
            if kept == 0 or row[kept - 1] != row[p]:
                row[kept] = row[p]
                kept += 1
        lengths[i + 1] = kept


@njit(nogil=True, cache=True)
def _close_up(bounds: NDArray[Any], indptr: NDArray[Any], entries: NDArray[np.int32]) -> None:
    # rows move to the front, each behind the one before
    for i in range(indptr.shape[0] - 1):
        for p in range(indptr[i + 1] - indptr[i]):
            entries[indptr[i] + p] = entries[bounds[i] + p]


@njit(nogil=True, cache=True)
def _kernel(points: NDArray[Any], i: int, j: int, bandwidth_um: float) -> float:
    if bandwidth_um <= 0.0:
        return 1.0
    x, y = np.float64(points[i, 0]) - points[j, 0], np.float64(points[i, 1]) - points[j, 1]
    return math.exp(-(x * x + y * y) / (2.0 * bandwidth_um * bandwidth_um))


@njit(nogil=True, cache=True)
def _degrees(
    indptr: NDArray[Any],
    indices: NDArray[Any],
    points: NDArray[Any],
    bandwidth_um: float,
    root: NDArray[np.float64],
    start: int,
    stop: int,
) -> None:
    for i in range(start, stop):
        degree = 0.0
        for p in range(indptr[i], indptr[i + 1]):
            degree += _kernel(points, i, indices[p], bandwidth_um)
        root[i] = math.sqrt(degree)


@njit(nogil=True, cache=True)
def _weights(
    indptr: NDArray[Any],
    indices: NDArray[Any],
    points: NDArray[Any],
    bandwidth_um: float,
    root: NDArray[Any],
    weights: NDArray[np.float32],
    start: int,
    stop: int,
) -> None:
    for i in range(start, stop):
        for p in range(indptr[i], indptr[i + 1]):
            j = indices[p]
            scale = root[i] * root[j]
            weights[p] = _kernel(points, i, j, bandwidth_um) / scale if scale > 0.0 else 0.0
