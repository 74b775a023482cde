"""Distances along the edges between rows, and how rows pull at each other along them.

Sums over dimensions are cut into the lanes of the machine's registers: their last bits belong to the machine, and are
the same on every call.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray


class Incidence(NamedTuple):
    """The edges at each row: those of row i are at `starts[i]` to `starts[i + 1]` in `others` and `edges`."""

    starts: NDArray[np.int64]
    others: NDArray[np.int32]
    edges: NDArray[np.int32]


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def squared_distance(rows: NDArray[Any], i: int, j: int) -> Any:
    """Squared Euclidean distance of two rows of (n, d) float32 or float64, in their dtype."""
    total = rows[i, 0] * 0
    for c in range(rows.shape[1]):
        total += (rows[i, c] - rows[j, c]) * (rows[i, c] - rows[j, c])
    return total


@njit(nogil=True, cache=True)
def edge_distances(
    rows: NDArray[Any], left: NDArray[np.int64], right: NDArray[np.int64], start: int, stop: int, out: NDArray[Any]
) -> None:
    """Write the distances of rows `left[e]` and `right[e, ...]` for `start` ≤ e < `stop`, in-place; 0 without an end.

    Parameters
    ----------
    rows : (n, d) float32 or float64
    left : (m,) int64
    right : (m, k) int64
        Negative where there is no edge.
    start, stop : int
    out : (m, k), the dtype of `rows`
    """
    for e in range(start, stop):
        for place in range(right.shape[1]):
            out[e, place] = 0
            if right[e, place] >= 0:
                out[e, place] = math.sqrt(squared_distance(rows, left[e], right[e, place]))


def incidence(left: NDArray[np.int64], right: NDArray[np.int64], n: int) -> Incidence:
    """Sort edges by their ends, of which each has two; those without a right end (negative) are left out.

    Parameters
    ----------
    left : (m,) int64
    right : (m, k) int64
        Edge e · k + p ends in `left[e]` and `right[e, p]`.
    n : int
        Number of rows.
    """
    starts = np.zeros(n + 1, dtype=np.int64)
    _count_ends(left, right, starts)
    others, edges = np.empty(starts[-1], dtype=np.int32), np.empty(starts[-1], dtype=np.int32)
    _place_ends(left, right, starts[:-1].copy(), others, edges)
    return Incidence(starts, others, edges)


@njit(nogil=True, cache=True)
def pull(
    rows: NDArray[Any],
    starts: NDArray[np.int64],
    others: NDArray[np.int32],
    edges: NDArray[np.int32],
    weights: NDArray[Any],
    start: int,
    stop: int,
    out: NDArray[Any],
) -> None:
    """Write the sum of weight · (row i − the other end) over the edges at rows i from `start` to `stop`, in-place.

    Parameters
    ----------
    rows : (n, d) float32 or float64
    starts, others, edges
        `Incidence`.
    weights : (n_edges,), the dtype of `rows`
    start, stop : int
    out : (n, d), the dtype of `rows`
    """
    for i in range(start, stop):
        own, sums = rows[i], out[i]
        sums[:] = 0
        for place in range(starts[i], starts[i + 1]):
            weight, other = weights[edges[place]], rows[others[place]]
            if weight != 0:
                for c in range(rows.shape[1]):
                    sums[c] += weight * (own[c] - other[c])


@njit(nogil=True, cache=True)
def _count_ends(left: NDArray[np.int64], right: NDArray[np.int64], starts: NDArray[np.int64]) -> None:
    for e in range(right.shape[0]):
        for place in range(right.shape[1]):
            if right[e, place] >= 0:
                starts[left[e] + 1] += 1
                starts[right[e, place] + 1] += 1
    for i in range(len(starts) - 1):
        starts[i + 1] += starts[i]


@njit(nogil=True, cache=True)
def _place_ends(
    left: NDArray[np.int64],
    right: NDArray[np.int64],
    free: NDArray[np.int64],
    others: NDArray[np.int32],
    edges: NDArray[np.int32],
) -> None:
    for e in range(right.shape[0]):
        i = left[e]
        for place in range(right.shape[1]):
            j = right[e, place]
            if j >= 0:
                others[free[i]], edges[free[i]] = j, e * right.shape[1] + place
                free[i] += 1
                others[free[j]], edges[free[j]] = i, e * right.shape[1] + place
                free[j] += 1
