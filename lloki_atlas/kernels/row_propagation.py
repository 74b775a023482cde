"""Feature propagation whose support is chosen anew at every iteration, and whose values are whole dense rows.

Two rules of which filled-in entries a cell keeps, for comparison with the published code and as a method of its own.
Here an entry that is closed in one iteration may open in the next, so a rule has to see the whole row of a cell.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from numba import njit
from numpy.typing import ArrayLike, NDArray

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.checks import CsrArrays, array, csr_arrays
from lloki_atlas.kernels.graph import Graph
from lloki_atlas.kernels.hashing import absorb, mix
from lloki_atlas.kernels.propagation import Propagated

Support = Literal["redrawn", "largest"]
Stopping = Literal["relative", "absolute"]
_ONE, _WORD, _ALL, _LAST = np.uint64(1), np.uint64(32), np.uint64(0xFFFFFFFF), np.uint64(0xFFFFFFFFFFFFFFFF)


def propagate_rows(
    graph: Graph,
    values: Any,
    budget: ArrayLike,
    *,
    key: int,
    support: Support,
    stopping: Stopping,
    max_iterations: int = 40,
    tolerance: float = 1e-3,
    absolute_threshold: float = 15.0,
    n_threads: int = 1,
) -> Propagated:
    """Fill in unknown entries by X ← (1 − M)∘(A X) + M∘X⁰ (equation 2), choosing which ones at every iteration.

    M marks the observed (non-zero) entries. After each product a cell with more non-zero unknown entries than its
    budget keeps `budget` of them and the others return to 0. Products are float32 in the order of the graph's indices.

    Parameters
    ----------
    graph
        Of n_cells rows, no weight negative.
    values
        `(n_cells, n_genes)` CSR float32, not negative; counts, or for `absolute` counts divided by their maximum.
    budget
        `(n_cells,)` int32, genes that may be filled in.
    key
        Key of the slice.
    support
        `redrawn`: a uniform random subset, those of smallest hash(key, iteration, cell row, gene), iterations counted
        from 0; it never settles. `largest`: the largest values, equal ones by smaller gene index; `key` has no effect.
    stopping
        `relative`: when the change of the unknown entries is below `tolerance` of their norm (0 if there are none);
        `absolute`: when the Frobenius norm of the change of X is below `absolute_threshold`.
    max_iterations
        Upper limit of the iterations.
    tolerance
        Relative change for `relative`.
    absolute_threshold
        Norm of the change for `absolute`, in units of `values`; the published code's is 15, of values up to 1.
    n_threads
        Threads that share the rows; they change no bit.

    Returns
    -------
    Propagated
        Dense values; observed entries are exactly those given. `relative_change` is the last one for either stop.

    Raises
    ------
    InputError
        If shapes do not fit, a value, weight or budget is negative, a rule is unknown or a setting is not positive.
    """
    matrix, allowed = csr_arrays(values, name="values"), array(budget, np.int32, name="budget", shape=(graph.n_cells,))
    edges = _edges(graph)
    _check(matrix, allowed, edges[2], support=support, stopping=stopping)
    if max_iterations < 1 or n_threads < 1 or not (tolerance > 0 and absolute_threshold > 0):
        raise InputError(
            f"max_iterations is {max_iterations}, n_threads {n_threads}, tolerance {tolerance}, absolute_threshold "
            f"{absolute_threshold}: all have to be positive"
        )
    current = sp.csr_array((matrix.data, matrix.indices, matrix.indptr), shape=matrix.shape).toarray()
    following = np.empty_like(current)
    # kept per row and added up without rounding, so that threads change nothing
    change, size = np.empty(graph.n_cells), np.empty(graph.n_cells)
    n_iterations, ended, relative = 0, False, math.inf
    bounds = [graph.n_cells * part // n_threads for part in range(n_threads + 1)]
    with ThreadPoolExecutor(n_threads) as pool:
        while n_iterations < max_iterations and not ended:
            rule = (allowed, np.uint64(mix(key, n_iterations)), support == "largest")
            rows = partial(_iterate, *edges, *matrix[:3], *rule, current, following, change, size)
            for _ in pool.map(rows, bounds[:-1], bounds[1:]):
                pass  # an exception of a thread is raised here
            current, following = following, current
            n_iterations += 1
            moved, norm = (math.sqrt(math.fsum(squares.tolist())) for squares in (change, size))
            relative = moved / norm if norm > 0 else 0.0
            ended = relative < tolerance if stopping == "relative" else moved < absolute_threshold
    return Propagated(current, n_iterations, relative)


def _edges(graph: Graph) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    return (
        array(graph.indptr, np.int64, name="indptr", shape=(None,)),
        array(graph.indices, np.int32, name="indices", shape=(None,)),
        array(graph.weights, np.float32, name="weights", shape=(None,)),
    )


def _check(
    matrix: CsrArrays, budget: NDArray[Any], weights: NDArray[Any], *, support: Support, stopping: Stopping
) -> None:
    if matrix.shape[0] != budget.shape[0]:
        raise InputError(f"values has {matrix.shape[0]} cells and the graph {budget.shape[0]}: give one slice's")
    if budget.size and int(budget.min()) < 0:
        raise InputError("budget holds a negative number: give max(0, target - own)")
    if weights.size and float(weights.min()) < 0:
        raise InputError("the graph has a negative weight: build it with build_graph")
    if support not in ("redrawn", "largest"):
        raise InputError(f"unknown support {support!r}: choose 'redrawn' or 'largest'")
    if stopping not in ("relative", "absolute"):
        raise InputError(f"unknown stopping {stopping!r}: choose 'relative' or 'absolute'")


@njit(nogil=True, cache=True)
def _iterate(
    graph_indptr: NDArray[Any],
    graph_indices: NDArray[Any],
    weights: NDArray[Any],
    indptr: NDArray[Any],
    indices: NDArray[Any],
    data: NDArray[Any],
    budget: NDArray[Any],
    seed: np.uint64,
    largest: bool,
    current: NDArray[np.float32],
    following: NDArray[np.float32],
    change: NDArray[np.float64],
    size: NDArray[np.float64],
    start: int,
    stop: int,
) -> None:
    n_genes = current.shape[1]
    keys, nothing = np.empty(n_genes, dtype=np.uint64), np.zeros(n_genes, dtype=np.float32)
    for i in range(start, stop):
        row = following[i]
        _product_row(graph_indptr[i], graph_indptr[i + 1], graph_indices, weights, current, row)
        # zero while the budget acts, so that what is left non-zero is what was filled in
        for p in range(indptr[i], indptr[i + 1]):
            if data[p] != 0:
                row[indices[p]] = 0
        filled = 0
        for g in range(n_genes):
            filled += row[g] != 0
        if filled > budget[i]:
            _keep(row, budget[i], keys, absorb(seed, np.uint64(i)), largest)
        size[i] = _squared_distance(row, nothing)
        for p in range(indptr[i], indptr[i + 1]):
            if data[p] != 0:
                row[indices[p]] = data[p]
        change[i] = _squared_distance(row, current[i])


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
def _keep(row: NDArray[np.float32], budget: int, keys: NDArray[np.uint64], seed: np.uint64, largest: bool) -> None:
    # keys of different genes differ for either rule, so exactly `budget` lie below the threshold; zeros come last, and
    # no branch depends on a value, so that every loop vectorises
    if largest:
        bits = row.view(np.uint32)
        for g in range(row.shape[0]):  # positive floats are ordered as their bits are
            value_first = ((_ALL - np.uint64(bits[g])) << _WORD) | np.uint64(g)
            keys[g] = value_first if row[g] != 0 else _LAST
    else:
        for g in range(row.shape[0]):
            hashed = absorb(seed, np.uint64(g))
            keys[g] = hashed if row[g] != 0 else _LAST
    threshold = _select(keys, budget)
    for g in range(row.shape[0]):
        row[g] = row[g] if keys[g] < threshold else np.float32(0)


@njit(nogil=True, cache=True)
def _select(keys: NDArray[np.uint64], rank: int) -> np.uint64:
    # a number with `rank` smaller keys, bit by bit from the top: counting vectorises, sorting does not
    found = np.uint64(0)
    for bit in range(63, -1, -1):
        candidate = found | (_ONE << np.uint64(bit))
        smaller = 0
        for c in range(keys.shape[0]):
            smaller += keys[c] < candidate
        if smaller == rank:
            return candidate
        if smaller < rank:
            found = candidate
    return found


@njit(nogil=True, cache=True)
def _squared_distance(row: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    # four sums, for in a single one each addition would wait for the one before
    n = row.shape[0]
    a, b, c, d = 0.0, 0.0, 0.0, 0.0
    for g in range(0, n - 3, 4):
        p, q = np.float64(row[g]) - other[g], np.float64(row[g + 1]) - other[g + 1]
        r, s = np.float64(row[g + 2]) - other[g + 2], np.float64(row[g + 3]) - other[g + 3]
        a, b, c, d = a + p * p, b + q * q, c + r * r, d + s * s
    for g in range(n // 4 * 4, n):
        p = np.float64(row[g]) - other[g]
        a += p * p
    return (a + b) + (c + d)
