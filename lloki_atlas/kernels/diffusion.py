"""Diffusion of the observed counts over the second graph (equation 5), for any range of rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import scipy.sparse as sp
from numba import njit
from numpy.typing import ArrayLike, NDArray

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.checks import array, csr_arrays, finite
from lloki_atlas.kernels.graph import Graph
from lloki_atlas.kernels.threads import over_rows

READ_ROWS = 16384  # rows of values in memory at a time when they are read as they are needed
_GROUP = 64  # rows whose sums are in memory at a time when all values are


def diffuse(
    graph: Graph,
    values: Any,
    *,
    start: int,
    stop: int,
    alpha: float = 1.0,
    keep_observed: bool = False,
    baseline: ArrayLike | None = None,
    n_threads: int = 1,
) -> NDArray[np.float32]:
    """Return rows of α A V + (1 − α) V, one step of diffusion.

    V = baseline + values: the baseline is what every cell has of a gene before its sparse values are added (zero
    counts after scaling, for example), and reaches row i as (α Σ_j a_ij + 1 − α) · baseline.
    Sums are float64 in the order of the graph's indices; any split into start … stop gives the same bytes.

    Parameters
    ----------
    graph
        Of n_cells rows.
    values
        `(n_cells, n_genes)` CSR float32: a matrix, or anything with a `shape` whose row slices are one. The latter is
        read in pieces, and 8 bytes an entry of the answer are held meanwhile.
    start, stop
        The rows to return.
    alpha
        Weight of the diffused values, 0 to 1.
    keep_observed
        Whether the non-zero entries of `values` stay as they are.
    baseline
        `(n_genes,)`; zero by default.
    n_threads
        Threads; they change no bit.

    Returns
    -------
    numpy.ndarray
        `(stop − start, n_genes)` float32.

    Raises
    ------
    InputError
        If shapes do not fit, or the range or α is out of bounds.
    """
    n, n_genes = (int(length) for length in values.shape)
    if n != graph.n_cells:
        raise InputError(f"values has {n} cells and the graph {graph.n_cells}: give one slice's")
    if not 0 <= start <= stop <= n:
        raise InputError(f"rows {start} to {stop} are not in 0 to {n}: give a range of rows")
    if not 0.0 <= alpha <= 1.0:
        raise InputError(f"alpha is {alpha}: it has to lie between 0 and 1")
    offset = np.zeros(n_genes) if baseline is None else baseline
    offset = finite(array(offset, np.float64, name="baseline", shape=(n_genes,)), name="baseline")
    edges = (
        array(graph.indptr, np.int64, name="indptr", shape=(None,)),
        array(graph.indices, np.int32, name="indices", shape=(None,)),
        array(graph.weights, np.float32, name="weights", shape=(None,)),
    )
    out = np.empty((stop - start, n_genes), dtype=np.float32)
    rule = (offset, float(alpha), bool(keep_observed), out)

    def piece(first: int, last: int) -> tuple[NDArray[Any], ...]:
        part = csr_arrays(values[first:last], name="values", negative=True)
        return part.indptr, part.indices, part.data

    if sp.issparse(values):
        whole = csr_arrays(values, name="values", negative=True)
        work = partial(_all_at_once, *edges, whole.indptr, whole.indices, whole.data, start, *rule)
        over_rows(stop - start, n_threads, work)
        return out
    total, reached = np.zeros(out.shape), edges[0][start:stop].copy()
    for first in range(0, n, READ_ROWS):
        last = min(first + READ_ROWS, n)
        over_rows(
            stop - start, n_threads, partial(_add, *edges, *piece(first, last), first, last, start, reached, total)
        )
    over_rows(stop - start, n_threads, partial(_finish, *edges, *piece(start, stop), start, start, *rule, total, 0))
    return out


@njit(nogil=True, cache=True)
def _all_at_once(
    graph_indptr: NDArray[Any],
    graph_indices: NDArray[Any],
    weights: NDArray[Any],
    indptr: NDArray[Any],
    indices: NDArray[Any],
    data: NDArray[Any],
    start: int,
    baseline: NDArray[Any],
    alpha: float,
    keep_observed: bool,
    out: NDArray[np.float32],
    low: int,
    high: int,
) -> None:
    # a few rows after the others, so that their sums stay in cache
    n = graph_indptr.shape[0] - 1
    total = np.empty((_GROUP, baseline.shape[0]))
    for first in range(low, high, _GROUP):
        last = min(first + _GROUP, high)
        total[:] = 0.0
        reached = graph_indptr[start + first : start + last].copy()
        _add(graph_indptr, graph_indices, weights, indptr, indices, data, 0, n, start + first, reached, total, 0,
             last - first)  # fmt: skip
        _finish(graph_indptr, graph_indices, weights, indptr, indices, data, 0, start, baseline, alpha, keep_observed,
                out, total, first, first, last)  # fmt: skip


@njit(nogil=True, cache=True)
def _add(
    graph_indptr: NDArray[Any],
    graph_indices: NDArray[Any],
    weights: NDArray[Any],
    indptr: NDArray[Any],
    indices: NDArray[Any],
    data: NDArray[Any],
    first: int,
    last: int,
    start: int,
    reached: NDArray[np.int64],
    total: NDArray[np.float64],
    low: int,
    high: int,
) -> None:
    # what cells first to last, whose values are given, add to rows low to high counted from `start`; each row goes on
    # from the edge that it has reached
    for row in range(low, high):
        p, end, sums = reached[row], graph_indptr[start + row + 1], total[row]
        while p < end and graph_indices[p] < last:
            weight, j = np.float64(weights[p]), graph_indices[p] - first
            for q in range(indptr[j], indptr[j + 1]):
                sums[indices[q]] += weight * data[q]
            p += 1
        reached[row] = p


@njit(nogil=True, cache=True)
def _finish(
    graph_indptr: NDArray[Any],
    graph_indices: NDArray[Any],
    weights: NDArray[Any],
    indptr: NDArray[Any],
    indices: NDArray[Any],
    data: NDArray[Any],
    first: int,
    start: int,
    baseline: NDArray[Any],
    alpha: float,
    keep_observed: bool,
    out: NDArray[np.float32],
    total: NDArray[np.float64],
    total_from: int,
    low: int,
    high: int,
) -> None:
    # baseline and own values; the given values begin with cell `first`, the sums with row `total_from`
    for row in range(low, high):
        i, sums = start + row, total[row - total_from]
        weight_sum = 0.0
        for p in range(graph_indptr[i], graph_indptr[i + 1]):
            weight_sum += np.float64(weights[p])
        share = alpha * weight_sum + (1.0 - alpha)
        for g in range(sums.shape[0]):
            sums[g] = alpha * sums[g] + share * baseline[g]
        for q in range(indptr[i - first], indptr[i - first + 1]):
            g = indices[q]
            if keep_observed and data[q] != 0:
                sums[g] = baseline[g] + data[q]
            else:
                sums[g] += (1.0 - alpha) * data[q]
        for g in range(sums.shape[0]):
            out[row, g] = sums[g]
