"""Which genes propagation may fill in per cell: sets of genes as bits, walked over the graph without any value.

Whether an entry is non-zero does not depend on how large it is, so the support of every cell, and the iteration in
which it is drawn, are found first, with 1 bit a gene; what follows can then treat blocks of genes one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lloki_atlas.kernels.hashing import absorb, mix
from lloki_atlas.kernels.threads import over_rows

_ONE, _ZERO = np.uint64(1), np.uint64(0)


@dataclass(frozen=True)
class Support:
    """Per cell: the genes it may fill in, and since when.

    `allowed` (n_cells, words) uint64, a bit a gene; `frozen_at` (n_cells,) int16, the iteration (from 1) in which the
    cell first had more unknown genes than its budget and `allowed` was drawn, 0 for cells that never had.
    """

    allowed: NDArray[np.uint64]
    frozen_at: NDArray[np.int16]


def gene_words(n_genes: int) -> int:
    """Number of 64-bit words that hold a bit a gene."""
    return -(-n_genes // 64)


def draw_supports(
    graph_arrays: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
    observed: NDArray[np.uint64],
    budget: NDArray[np.int32],
    *,
    key: int,
    max_iterations: int,
    n_threads: int = 1,
) -> Support:
    """Follow which entries propagation would make non-zero, and draw the support of cells with too many.

    In the iteration in which a cell first has more unknown genes within reach than its budget, those of smallest
    hash(key, cell, gene) are kept, `budget` of them, for good.

    Parameters
    ----------
    graph_arrays
        `indptr`, `indices`, `weights` of the graph; an edge of weight 0 carries nothing.
    observed
        `(n_cells, words)` bits of the observed entries.
    budget
        `(n_cells,)`.
    key
        Key of the slice.
    max_iterations
        Iterations that propagation may run.
    n_threads
        Threads; they change no bit.
    """
    n = observed.shape[0]
    state, following = observed.copy(), np.empty_like(observed)
    support = Support(np.zeros_like(observed), np.zeros(n, dtype=np.int16))
    seed = np.uint64(mix(key))
    for iteration in range(1, max_iterations + 1):
        arrays = (*graph_arrays, observed, state, following, support.allowed, support.frozen_at, budget)
        moved = over_rows(n, n_threads, partial(_spread, *arrays, seed, iteration))
        state, following = following, state
        if not any(moved):  # nothing will ever move again
            break
    return support


@njit(nogil=True, cache=True)
def mark_observed(
    indptr: NDArray[Any], indices: NDArray[Any], data: NDArray[Any], start: int, observed: NDArray[np.uint64]
) -> None:
    """Set the bits of the entries that are not zero in CSR rows, the first of which is row `start`, in-place."""
    for i in range(indptr.shape[0] - 1):
        for p in range(indptr[i], indptr[i + 1]):
            if data[p] != 0:
                gene = np.uint64(indices[p])
                observed[start + i, np.int64(gene >> np.uint64(6))] |= _ONE << (gene & np.uint64(63))


@njit(nogil=True, cache=True)
def _spread(
    indptr: NDArray[Any],
    indices: NDArray[Any],
    weights: NDArray[Any],
    observed: NDArray[np.uint64],
    state: NDArray[np.uint64],
    following: NDArray[np.uint64],
    allowed: NDArray[np.uint64],
    frozen_at: NDArray[np.int16],
    budget: NDArray[Any],
    seed: np.uint64,
    iteration: int,
    start: int,
    stop: int,
) -> int:
    # one iteration of rows start to stop; how many of them changed
    words = state.shape[1]
    open_genes = np.empty(words, dtype=np.uint64)
    moved = 0
    for i in range(start, stop):
        open_genes[:] = _ZERO
        for p in range(indptr[i], indptr[i + 1]):
            if weights[p] != 0:
                for w in range(words):
                    open_genes[w] |= state[indices[p], w]
        n_open = 0
        for w in range(words):
            open_genes[w] &= ~observed[i, w]
            n_open += _count(open_genes[w])
        if frozen_at[i] == 0 and n_open > budget[i]:
            frozen_at[i] = iteration
            _draw(open_genes, n_open, budget[i], absorb(seed, np.uint64(i)), allowed[i])
            moved += 1
        changed = False
        for w in range(words):
            filled = open_genes[w] & allowed[i, w] if frozen_at[i] > 0 else open_genes[w]
            following[i, w] = observed[i, w] | filled
            changed = changed or following[i, w] != state[i, w]
        moved += changed
    return moved


@njit(nogil=True, cache=True)
def _count(word: np.uint64) -> Any:
    # bits of a word, all pairs, then fours, then bytes at once
    word = word - ((word >> _ONE) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@njit(nogil=True, cache=True)
def _draw(
    open_genes: NDArray[np.uint64], n_open: int, budget: int, seed: np.uint64, allowed: NDArray[np.uint64]
) -> None:
    # hashes of different genes never collide (absorb is a bijection), so exactly `budget` lie below the threshold
    if budget == 0:
        return
    genes, hashes = np.empty(n_open, dtype=np.int64), np.empty(n_open, dtype=np.uint64)
    upper = np.empty(n_open, dtype=np.uint32)
    size = 0
    for gene in range(64 * open_genes.shape[0]):
        if (open_genes[gene >> 6] >> np.uint64(gene & 63)) & _ONE:
            genes[size] = gene
            hashes[size] = absorb(seed, np.uint64(gene))
            upper[size] = np.uint32(hashes[size] >> np.uint64(32))
            size += 1
    threshold = _select(hashes, upper, budget)
    for c in range(n_open):
        if hashes[c] < threshold:
            allowed[genes[c] >> 6] |= _ONE << np.uint64(genes[c] & 63)


@njit(nogil=True, cache=True)
def _select(hashes: NDArray[np.uint64], upper: NDArray[np.uint32], rank: int) -> np.uint64:
    # a number with exactly `rank` hashes below it: the upper half bit by bit (counting vectorises, sorting does not),
    # then the lower half among those few that share it
    found, below = np.uint32(0), 0
    for bit in range(31, -1, -1):
        candidate = np.uint32(found | (np.uint32(1) << np.uint32(bit)))
        smaller = 0
        for c in range(upper.shape[0]):
            smaller += upper[c] < candidate
        if smaller == rank:
            return np.uint64(candidate) << np.uint64(32)
        if smaller < rank:
            found, below = candidate, smaller
    for c in range(hashes.shape[0]):
        if upper[c] == found:
            before = below
            for other in range(hashes.shape[0]):
                before += upper[other] == found and hashes[other] < hashes[c]
            if before == rank:
                return hashes[c]
    return _ZERO
