"""The graph of a slice: edges between neighbours in expression, weighted by distance in space, normalised."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.checks import array, finite
from lloki_atlas.kernels.hashing import absorb, mix, uniform
from lloki_atlas.kernels.neighbors import Neighbors


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


def sample_bandwidth(coordinates: ArrayLike, *, n_pairs: int, key: int) -> float:
    """Return the mean distance of keyed random pairs of distinct cells, the σ of equation 1.

    Pair p is drawn from hashes of (key, p), with replacement between pairs.

    Parameters
    ----------
    coordinates
        `(n_cells, 2)`, micrometre.
    n_pairs
        Number of pairs.
    key
        Key of the slice.

    Returns
    -------
    float
        Micrometre; 0 with a single cell, or if all cells lie at one place.

    Raises
    ------
    InputError
        If there are no cells or pairs, or a coordinate is not finite.
    """
    points = finite(array(coordinates, np.float32, name="coordinates", shape=(None, 2)), name="coordinates")
    if points.shape[0] == 0 or n_pairs < 1:
        raise InputError(f"{points.shape[0]} cells and {n_pairs} pairs: a bandwidth needs at least one of each")
    return float(_mean_distance(points, n_pairs, np.uint64(mix(key)))) if points.shape[0] > 1 else 0.0


def build_graph(neighbors: Neighbors, coordinates: ArrayLike, *, bandwidth_um: float, self_loops: bool = True) -> Graph:
    """Build A = D^-1/2 W D^-1/2 on the union of the neighbour relation.

    w_ij = exp(−d_ij² / 2σ²) on the distance in space (equation 1), 1 on the diagonal. With a bandwidth of 0 (one
    cell, or all at one place) every weight is 1. Without self loops a cell without neighbours has an empty row.
    Sums are float64 in the order of indices.

    Parameters
    ----------
    neighbors
        `(n_cells, k)` neighbours in expression of every cell of the slice.
    coordinates
        `(n_cells, 2)`, micrometre.
    bandwidth_um
        σ, micrometre.
    self_loops
        Whether each cell is joined to itself.

    Returns
    -------
    Graph
        Exactly symmetric.

    Raises
    ------
    InputError
        If shapes do not fit, an index is not a cell, or σ or a coordinate is not finite.
    """
    n = neighbors.indices.shape[0]
    points = finite(array(coordinates, np.float32, name="coordinates", shape=(n, 2)), name="coordinates")
    if not (math.isfinite(bandwidth_um) and bandwidth_um >= 0):
        raise InputError(f"bandwidth_um is {bandwidth_um}: it has to be finite and not negative")
    if neighbors.indices.size and int(neighbors.indices.max()) >= n:
        raise InputError(f"a neighbour lies outside 0 to {n - 1}: search among the cells of the slice")
    indptr, indices = _union(array(neighbors.indices, np.int32, name="indices", shape=(n, None)), bool(self_loops))
    return Graph(indptr, indices, _weights(indptr, indices, points, float(bandwidth_um)))


@njit(nogil=True, cache=True)
def _mean_distance(points: NDArray[Any], n_pairs: int, seed: np.uint64) -> float:
    n = points.shape[0]
    total = 0.0
    for pair in range(n_pairs):
        state = absorb(seed, np.uint64(pair))
        i = int(uniform(absorb(state, np.uint64(0))) * n)
        j = int(uniform(absorb(state, np.uint64(1))) * (n - 1))
        j += j >= i
        x, y = np.float64(points[i, 0]) - points[j, 0], np.float64(points[i, 1]) - points[j, 1]
        total += math.sqrt(x * x + y * y)
    return total / n_pairs


@njit(nogil=True, cache=True)
def _union(neighbors: NDArray[Any], self_loops: bool) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    n, k = neighbors.shape
    offsets = np.zeros(n + 1, dtype=np.int64)
    for i in range(n):
        offsets[i + 1] += 1 if self_loops else 0
        for c in range(k):
            j = neighbors[i, c]
            if j >= 0 and j != i:
                offsets[i + 1] += 1
                offsets[j + 1] += 1
    for i in range(n):
        offsets[i + 1] += offsets[i]
    found = np.empty(offsets[n], dtype=np.int32)
    filled = offsets[:-1].copy()
    for i in range(n):
        if self_loops:
            found[filled[i]] = i
            filled[i] += 1
        for c in range(k):
            j = neighbors[i, c]
            if j >= 0 and j != i:
                found[filled[i]] = j
                found[filled[j]] = i
                filled[i] += 1
                filled[j] += 1
    return _sorted_rows(offsets, found)


@njit(nogil=True, cache=True)
def _sorted_rows(offsets: NDArray[np.int64], found: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    # the relation is symmetric, so writing each i into the rows that it names sorts every row; repeats come together
    n = offsets.shape[0] - 1
    rows = np.empty(found.shape[0], dtype=np.int32)
    ends = offsets[:-1].copy()
    for i in range(n):
        for p in range(offsets[i], offsets[i + 1]):
            j = found[p]
            if ends[j] == offsets[j] or rows[ends[j] - 1] != i:
                rows[ends[j]] = i
                ends[j] += 1
    indptr = np.zeros(n + 1, dtype=np.int64)
    for i in range(n):
        indptr[i + 1] = indptr[i] + ends[i] - offsets[i]
    indices = np.empty(indptr[n], dtype=np.int32)
    for i in range(n):
        for p in range(indptr[i], indptr[i + 1]):
            indices[p] = rows[offsets[i] + p - indptr[i]]
    return indptr, indices


@njit(nogil=True, cache=True)
def _weights(
    indptr: NDArray[Any], indices: NDArray[Any], points: NDArray[Any], bandwidth_um: float
) -> NDArray[np.float32]:
    n = indptr.shape[0] - 1
    kernel, root = np.ones(indices.shape[0]), np.zeros(n)
    for i in range(n):
        degree = 0.0
        for p in range(indptr[i], indptr[i + 1]):
            if bandwidth_um > 0.0:
                j = indices[p]
                x, y = np.float64(points[i, 0]) - points[j, 0], np.float64(points[i, 1]) - points[j, 1]
                kernel[p] = math.exp(-(x * x + y * y) / (2.0 * bandwidth_um * bandwidth_um))
            degree += kernel[p]
        root[i] = math.sqrt(degree)
    weights = np.zeros(indices.shape[0], dtype=np.float32)
    for i in range(n):
        for p in range(indptr[i], indptr[i + 1]):
            scale = root[i] * root[indices[p]]
            if scale > 0.0:
                weights[p] = kernel[p] / scale
    return weights
