"""Feature propagation: unknown entries are filled in from neighbours, observed ones stay, within a budget per cell."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numba import njit
from numpy.typing import ArrayLike, NDArray

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.checks import array, csr_arrays
from lloki_atlas.kernels.graph import Graph
from lloki_atlas.kernels.hashing import absorb, mix

_UNKNOWN, _OBSERVED, _CLOSED = np.uint8(0), np.uint8(1), np.uint8(2)


@dataclass(frozen=True)
class Propagated:
    """`values` (n_cells, n_genes) float32, the iterations run, and the last relative change of the unknown entries."""

    values: NDArray[np.float32]
    n_iterations: int
    relative_change: float

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.dtype != np.float32:
            raise InputError(f"values is {self.values.dtype} of {self.values.ndim} axes: give (n, G) float32")
        if self.n_iterations < 0 or not self.relative_change >= 0:
            raise InputError("iterations and change cannot be negative")


def propagate(
    graph: Graph,
    counts: Any,
    budget: ArrayLike,
    *,
    key: int,
    max_iterations: int = 40,
    tolerance: float = 1e-3,
) -> Propagated:
    """Fill in unknown entries by X ← (1 − M)∘(A X) + M∘X⁰ (equation 2), at most `budget` of them per cell.

    M marks the observed (non-zero) entries. In the iteration in which a cell first has more non-zero unknown
    entries than its budget, those of smallest hash(key, cell row, gene) are kept, `budget` of them, and no others
    are filled in from then on; so the iteration converges, and nothing depends on order. It ends when the change of
    the unknown entries is below `tolerance` of their norm (0 when there are none).
    Products are float32 in the order of the graph's indices.

    Parameters
    ----------
    graph
        Of n_cells rows.
    counts
        `(n_cells, n_genes)` CSR float32, not negative.
    budget
        `(n_cells,)` int32, see `imputation_budget`.
    key
        Key of the slice.
    max_iterations
        Upper limit of the iterations.
    tolerance
        Relative change at which they end.

    Returns
    -------
    Propagated
        Dense values; observed entries are exactly those given.

    Raises
    ------
    InputError
        If shapes do not fit, a count or budget is negative, or a setting is not positive.
    """
    matrix = csr_arrays(counts, name="counts")
    allowed = array(budget, np.int32, name="budget", shape=(graph.n_cells,))
    if matrix.shape[0] != graph.n_cells:
        raise InputError(f"counts has {matrix.shape[0]} cells and the graph {graph.n_cells}: give one slice's")
    if allowed.size and int(allowed.min()) < 0:
        raise InputError("budget holds a negative number: give max(0, target - own)")
    if max_iterations < 1 or not tolerance > 0:
        raise InputError(f"max_iterations is {max_iterations}, tolerance {tolerance}: both have to be positive")
    arrays = _graph_arrays(graph)
    current = sp.csr_array((matrix.data, matrix.indices, matrix.indptr), shape=matrix.shape).toarray()
    state = (current != 0).astype(np.uint8)
    following = np.empty_like(current)
    n_iterations, relative = 0, math.inf
    while n_iterations < max_iterations and relative >= tolerance:
        change, norm = _iterate(*arrays, current, following, state, allowed, np.uint64(mix(key)))
        current, following = following, current
        n_iterations += 1
        relative = math.sqrt(change / norm) if norm > 0 else 0.0
    return Propagated(current, n_iterations, relative)


def _graph_arrays(graph: Graph) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    return (
        array(graph.indptr, np.int64, name="indptr", shape=(None,)),
        array(graph.indices, np.int32, name="indices", shape=(None,)),
        array(graph.weights, np.float32, name="weights", shape=(None,)),
    )


@njit(nogil=True, cache=True)
def _iterate(
    indptr: NDArray[Any],
    indices: NDArray[Any],
    weights: NDArray[Any],
    current: NDArray[np.float32],
    following: NDArray[np.float32],
    state: NDArray[np.uint8],
    budget: NDArray[Any],
    seed: np.uint64,
) -> tuple[float, float]:
    n, n_genes = current.shape
    # one sum a gene: the loop over genes vectorises and the order of summation stays that of the rows
    change, norm = np.zeros(n_genes), np.zeros(n_genes)
    for i in range(n):
        row, before, marks = following[i], current[i], state[i]
        _product_row(indptr[i], indptr[i + 1], indices, weights, current, row)
        filled = 0
        for g in range(n_genes):
            filled += (marks[g] == _UNKNOWN) & (row[g] != 0)
        # true once at most: of the genes left open after the draw there are no more than the budget
        if filled > budget[i]:
            _draw_support(absorb(seed, np.uint64(i)), budget[i], filled, row, marks)
        for g in range(n_genes):
            unknown = row[g] if marks[g] == _UNKNOWN else np.float32(0)
            row[g] = before[g] if marks[g] == _OBSERVED else unknown
            difference = np.float64(row[g]) - np.float64(before[g])
            change[g] += difference * difference
            norm[g] += np.float64(unknown) * np.float64(unknown)
    total, size = 0.0, 0.0
    for g in range(n_genes):
        total += change[g]
        size += norm[g]
    return total, size


@njit(nogil=True, cache=True)
def _product_row(
    first: int,
    last: int,
    indices: NDArray[Any],
    weights: NDArray[Any],
    values: NDArray[np.float32],
    row: NDArray[np.float32],
) -> None:
    for g in range(row.shape[0]):
        row[g] = 0
    p = first
    while p + 4 <= last:
        w0, w1, w2, w3 = weights[p], weights[p + 1], weights[p + 2], weights[p + 3]
        v0, v1 = values[indices[p]], values[indices[p + 1]]
        v2, v3 = values[indices[p + 2]], values[indices[p + 3]]
        for g in range(row.shape[0]):
            row[g] = (((row[g] + w0 * v0[g]) + w1 * v1[g]) + w2 * v2[g]) + w3 * v3[g]
        p += 4
    while p < last:
        w0, v0 = weights[p], values[indices[p]]
        for g in range(row.shape[0]):
            row[g] += w0 * v0[g]
        p += 1


@njit(nogil=True, cache=True)
def _draw_support(
    seed: np.uint64, budget: int, filled: int, row: NDArray[np.float32], marks: NDArray[np.uint8]
) -> None:
    # hashes of different genes never collide (absorb is a bijection), so exactly `budget` lie below the threshold
    hashes = np.empty(filled, dtype=np.uint64)
    size = 0
    for g in range(row.shape[0]):
        if marks[g] == _UNKNOWN and row[g] != 0:
            hashes[size] = absorb(seed, np.uint64(g))
            size += 1
    threshold = _select(hashes, budget)
    for g in range(row.shape[0]):
        if marks[g] == _UNKNOWN and (row[g] == 0 or absorb(seed, np.uint64(g)) >= threshold):
            marks[g] = _CLOSED


@njit(nogil=True, cache=True)
def _select(hashes: NDArray[np.uint64], rank: int) -> np.uint64:
    # the number with `rank` smaller ones, bit by bit from the top: counting vectorises, sorting does not
    found = np.uint64(0)
    for bit in range(63, -1, -1):
        candidate = found | (np.uint64(1) << np.uint64(bit))
        smaller = 0
        for c in range(hashes.shape[0]):
            smaller += hashes[c] < candidate
        if smaller <= rank:
            found = candidate
    return found
