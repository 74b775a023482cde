"""scGPT's value bins, one cell at a time: which genes are tokens, and by which quantiles of the cell a value lies.

The edges are the `n_edges` evenly spaced quantiles of a cell's non-zero values. A value v lies above `below` edges
(e < v), and `upto` of them count with equality (e <= v). scGPT draws the bin of a value from below + 1 to upto at
random, and of too many genes a random part; both rules are here, and one without random numbers for each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lloki_atlas.kernels.hashing import absorb, uniform

_TIES, _CUT = np.uint64(31), np.uint64(32)  # words of the two random streams


@njit(nogil=True, cache=True)
def count_present(rows: NDArray[np.float32], order: NDArray[np.int64], counts: NDArray[np.int64]) -> int:
    """Count the non-zero values of every row in the columns `order`; return the first row with a value not finite.

    Parameters
    ----------
    rows
        (n_cells, n_genes) float32, C order.
    order
        (n_known,) columns.
    counts
        (n_cells,), written.

    Returns
    -------
    int
        -1 when every value of every column is finite.
    """
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            if not np.isfinite(rows[i, j]):
                return i
        present = 0
        for j in range(len(order)):
            present += rows[i, order[j]] != 0
        counts[i] = present
    return -1


@njit(nogil=True, cache=True)
def bin_rows(
    rows: NDArray[np.float32],
    order: NDArray[np.int64],
    tokens: NDArray[np.int32],
    n_edges: int,
    max_genes: int,
    random: bool,
    key: np.uint64,
    indptr: NDArray[np.int64],
    genes: NDArray[np.int32],
    digits: NDArray[np.int16],
) -> None:
    """Write the tokens of each cell: its non-zero columns in the order given, and the bins of their values.

    Bins are found before anything is left out. Of more than `max_genes` values the largest stay, the earlier column
    among equal ones; with `random`, a subset drawn uniformly.

    Parameters
    ----------
    rows
        (n_cells, n_genes) float32, finite.
    order
        (n_known,) columns that have a token.
    tokens
        (n_known,) their tokens.
    n_edges
        Number of quantiles, at least 2; bins are 1 to n_edges.
    max_genes
        Most tokens of a cell.
    random
        Draw the bins of equal values and the genes left out, keyed by `key` and the cell's content.
    key
        Seed.
    indptr
        (n_cells,) where each cell's tokens begin in `genes` and `digits`.
    genes, digits
        Written: the tokens, in their order in `tokens`, and the bins.
    """
    n_known = len(order)
    values, ascending = np.empty(n_known, np.float32), np.empty(n_known, np.float32)
    found, kept = np.empty(n_known, np.int32), np.empty(n_known, np.int64)
    edges = np.empty(n_edges)
    for i in range(rows.shape[0]):
        n = 0
        for place in range(n_known):
            value = rows[i, order[place]]
            if value != 0:
                values[n], ascending[n], found[n] = value, value, tokens[place]
                n += 1
        if n == 0:
            continue
        ascending[:n].sort()
        _quantiles(ascending[:n], edges)
        state = _content(key, found[:n], values[:n]) if random else key
        n_kept = n
        if n > max_genes:
            n_kept = max_genes
            _choose(values[:n], ascending[:n], max_genes, random, state, kept)
        start = indptr[i]
        for t in range(n_kept):
            j = kept[t] if n > max_genes else t
            genes[start + t] = found[j]
            digits[start + t] = _digit(values[j], edges, random, absorb(absorb(state, _TIES), np.uint64(found[j])))


@njit(nogil=True, cache=True)
def _quantiles(ascending: NDArray[np.float32], edges: NDArray[np.float64]) -> None:
    # numpy.quantile to the last bit: a step in float32, all else in float64
    last, n_edges = len(ascending) - 1, len(edges)
    delta = 1.0 / (n_edges - 1)
    for e in range(n_edges):
        place = (1.0 if e == n_edges - 1 else e * delta) * last
        lower = int(np.floor(place))
        weight = place - lower
        left, right = ascending[lower], ascending[min(lower + 1, last)]
        step = np.float64(np.float32(right - left))
        edges[e] = right - step * (1.0 - weight) if weight >= 0.5 else left + step * weight


@njit(nogil=True, cache=True)
def _digit(value: np.float32, edges: NDArray[np.float64], random: bool, drawn: np.uint64) -> Any:
    below, upto = np.searchsorted(edges, value, side="left"), np.searchsorted(edges, value, side="right")
    if random:
        digit = below + 1 + int(uniform(drawn) * (upto - below)) if upto > below else upto
    else:
        digit = (below + 1 + upto) // 2
    # an edge interpolated between two values may be rounded past the outermost of them
    if digit > len(edges):
        return len(edges)
    return digit if digit > 1 else 1


@njit(nogil=True, cache=True)
def _choose(
    values: NDArray[np.float32],
    ascending: NDArray[np.float32],
    size: int,
    random: bool,
    state: np.uint64,
    kept: NDArray[np.int64],
) -> None:
    """Write `size` positions, ascending: the largest values, the earlier among equal ones, or a random subset."""
    n, t = len(values), 0
    if random:
        # selection sampling (Knuth, algorithm S): each position in turn, with the share that is still wanted
        state = absorb(state, _CUT)
        for j in range(n):
            if uniform(absorb(state, np.uint64(j))) * (n - j) < size - t:
                kept[t] = j
                t += 1
        return
    least = ascending[n - size]
    ties = size
    for j in range(n):
        ties -= values[j] > least
    for j in range(n):
        if values[j] > least:
            kept[t] = j
            t += 1
        elif values[j] == least and ties > 0:
            kept[t] = j
            t += 1
            ties -= 1


@njit(nogil=True, cache=True)
def _content(key: np.uint64, found: NDArray[np.int32], values: NDArray[np.float32]) -> np.uint64:
    """Hash what a cell holds: a random stream of its own, in any batch and at any place."""
    state = key
    for j in range(len(found)):
        bits = values[j : j + 1].view(np.uint32)[0]
        state = absorb(absorb(state, np.uint64(found[j])), np.uint64(bits))
    return state
