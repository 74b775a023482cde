"""How many genes a cell may be filled up to: the one-dimensional optimal transport of sparsity onto the reference's.

Sparsity takes one of G + 1 values, so both distributions are exact integer histograms: they add up over tiles in
any order, and the map between them is integer arithmetic.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.checks import array


def sparsity_histogram(nonzeros: ArrayLike, n_genes: int) -> NDArray[np.int64]:
    """Count the cells with each number of non-zero genes; histograms of parts of a slice add up.

    Parameters
    ----------
    nonzeros
        `(n_cells,)` integers, the number of non-zero genes of each cell.
    n_genes
        Number of genes G.

    Returns
    -------
    numpy.ndarray
        `(G + 1,)` int64.

    Raises
    ------
    InputError
        If a number lies outside 0 … G.
    """
    if n_genes < 0:
        raise InputError(f"n_genes is {n_genes}: it cannot be negative")
    counts = array(nonzeros, np.int64, name="nonzeros", shape=(None,))
    if counts.size and (int(counts.min()) < 0 or int(counts.max()) > n_genes):
        raise InputError(f"nonzeros holds a number outside 0 to {n_genes}: count the genes of the histogram alone")
    return np.bincount(counts, minlength=n_genes + 1).astype(np.int64)


def target_nonzeros(own: ArrayLike, reference: ArrayLike) -> NDArray[np.int32]:
    """Return the number of non-zero genes that each own number is transported to (equations 3 and 4).

    s* = F_ref⁻¹(F(s)) on the sparsity s = 1 − nonzero/G, with F the mid-rank distribution of the slice,
    (cells of smaller sparsity + half of those of equal sparsity) / n, and F_ref⁻¹(u) the smallest sparsity at which the
    reference's distribution reaches u. Cells of equal sparsity get equal targets, and a slice distributed like
    the reference is left as it is.

    Parameters
    ----------
    own, reference
        `(G + 1,)` histograms over the same genes, see `sparsity_histogram`; their sums may differ.

    Returns
    -------
    numpy.ndarray
        `(G + 1,)` int32, never decreasing; also defined at numbers that no cell has.

    Raises
    ------
    InputError
        If the histograms differ in length, hold a negative number, or are empty.
    """
    mine = array(own, np.int64, name="own", shape=(None,))
    theirs = array(reference, np.int64, name="reference", shape=(mine.shape[0],))
    for name, histogram in (("own", mine), ("reference", theirs)):
        if histogram.size == 0 or int(histogram.min()) < 0 or not histogram.any():
            raise InputError(f"the {name} histogram has no cells or negative numbers of them: count at least one cell")
    # Python integers: the cross-multiplied ranks of two large atlases need more than 64 bits
    mine_list, theirs_list = mine.tolist(), theirs.tolist()
    n_own, n_reference = sum(mine_list), sum(theirs_list)
    targets = np.empty(mine.shape[0], dtype=np.int32)
    below, reached, bin_reference = 0, theirs_list[-1], len(theirs_list) - 1
    for bin_own in range(len(mine_list) - 1, -1, -1):  # from the least sparse cells upwards
        rank = (2 * below + mine_list[bin_own]) * n_reference
        while reached == 0 or 2 * reached * n_own < rank:
            bin_reference -= 1
            reached += theirs_list[bin_reference]
        targets[bin_own] = bin_reference
        below += mine_list[bin_own]
    return targets


def imputation_budget(nonzeros: ArrayLike, targets: ArrayLike) -> NDArray[np.int32]:
    """Return how many genes propagation may fill in per cell: max(0, target − own).

    Parameters
    ----------
    nonzeros
        `(n_cells,)` integers, the number of non-zero genes of each cell.
    targets
        `(G + 1,)` from `target_nonzeros`.

    Returns
    -------
    numpy.ndarray
        `(n_cells,)` int32.

    Raises
    ------
    InputError
        If a number lies outside 0 … G.
    """
    wanted = array(targets, np.int64, name="targets", shape=(None,))
    counts = array(nonzeros, np.int64, name="nonzeros", shape=(None,))
    if counts.size and (int(counts.min()) < 0 or int(counts.max()) >= wanted.shape[0]):
        raise InputError(f"nonzeros holds a number outside 0 to {wanted.shape[0] - 1}: give targets of the same genes")
    return np.maximum(wanted[counts] - counts, 0).astype(np.int32)
