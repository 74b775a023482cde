"""How many genes a cell may be filled up to: the one-dimensional optimal transport of sparsity onto the reference's.

Sparsity takes one of G + 1 values, so both distributions are exact integer histograms: they add up over tiles in
any order, and the map between them is integer arithmetic.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.checks import array

Distribution = Literal["midrank", "upper", "linspace"]
Match = Literal["rank", "argsort"]


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
    return _transported(mine, theirs, upper=False)


def _transported(own: NDArray[np.int64], reference: NDArray[np.int64], *, upper: bool) -> NDArray[np.int32]:
    """The reference's bin for each own bin; F counts all cells of equal sparsity (`upper`) or half of them."""
    # Python integers: the cross-multiplied ranks of two large atlases need more than 64 bits
    mine, theirs = own.tolist(), reference.tolist()
    n_own, n_reference = sum(mine), sum(theirs)
    targets = np.empty(own.shape[0], dtype=np.int32)
    below, reached, bin_reference = 0, theirs[-1], len(theirs) - 1
    for bin_own in range(len(mine) - 1, -1, -1):  # from the least sparse cells upwards
        rank = (2 * below + (2 if upper else 1) * mine[bin_own]) * n_reference
        while reached == 0 or 2 * reached * n_own < rank:
            bin_reference -= 1
            reached += theirs[bin_reference]
        targets[bin_own] = bin_reference
        below += mine[bin_own]
    return targets


def assigned_targets(
    nonzeros: ArrayLike,
    reference_nonzeros: ArrayLike,
    *,
    n_genes: int,
    n_reference_genes: int,
    cdf: Distribution,
    match: Match,
) -> NDArray[np.int32]:
    """Return each cell's target number of non-zero genes, ⌈(1 − s*) · G⌉, by one of the rules in use.

    The sparsities of the slice are sorted, each place p is given a value s*_p of the reference by `cdf`, and the values
    are given to cells by `match`. `midrank` with `rank` and the reference counted over the slice's genes is
    `target_nonzeros`, cell by cell.

    Parameters
    ----------
    nonzeros
        `(n_cells,)` integers, the number of non-zero genes of each cell.
    reference_nonzeros
        `(n_reference_cells,)` integers, those of the reference's cells.
    n_genes, n_reference_genes
        How many genes either is counted over; sparsity is 1 − nonzero / genes.
    cdf
        `midrank`: see `target_nonzeros`. `upper`: F(s) is the share of cells of sparsity ≤ s (equation 3), and F_ref⁻¹
        the smallest sparsity at which the reference's reaches it; both in exact integers. `linspace`: the published
        code's, sorted sparsities of either lie evenly from 0 to 1 inclusive, with straight lines in between; equal
        cells get different targets, and a single cell the densest reference cell's.
    match
        `rank`: the cell at place p in the order of sparsity gets s*_p. `argsort`: the published code's, cell p gets the
        value of the place whose number is the p-th in that order; for comparison with it alone.

    Returns
    -------
    numpy.ndarray
        `(n_cells,)` int32. With `argsort` it depends on how this machine's numpy orders equal cells.

    Raises
    ------
    InputError
        If a rule is unknown, a number lies outside 0 … genes, or either has no cells or no genes.
    """
    if cdf not in ("midrank", "upper", "linspace") or match not in ("rank", "argsort"):
        raise InputError(f"unknown rule {cdf!r}, {match!r}: choose midrank, upper or linspace, and rank or argsort")
    own = sparsity_histogram(nonzeros, n_genes)
    reference = sparsity_histogram(reference_nonzeros, n_reference_genes)
    if not (own.any() and reference.any() and n_genes and n_reference_genes):
        raise InputError("the slice or the reference has no cells or no genes: count at least one of each")
    counts = array(nonzeros, np.int64, name="nonzeros", shape=(None,))
    sparsity = 1 - counts / n_genes
    if cdf == "linspace":
        theirs = array(reference_nonzeros, np.int64, name="reference_nonzeros", shape=(None,))
        mapped = _interpolated(counts.shape[0], 1 - theirs / n_reference_genes)
        # this order of operations is the published code's: another one rounds to the other side of some integers
        targets = np.ceil((1 - mapped) * n_genes).astype(np.int32)
    else:
        # ⌈r · G / G_ref⌉ in integers, for a rounded 1 − (1 − r / G) may exceed r / G, and its ceiling be one too many
        bins = _transported(own, reference, upper=cdf == "upper").astype(np.int64)
        targets = -(-bins[np.sort(counts)[::-1]] * n_genes // n_reference_genes).astype(np.int32)
    if match == "argsort":
        # numpy's default order of equal cells, which is not that of their rows: the published code sorts so, and
        # budgets can then be compared cell by cell
        return targets[np.argsort(sparsity)]
    assigned = np.empty_like(targets)
    assigned[np.argsort(sparsity, kind="stable")] = targets
    return assigned


def _interpolated(n_cells: int, reference_sparsity: NDArray[np.float64]) -> NDArray[np.float64]:
    places = np.linspace(0, 1, reference_sparsity.shape[0])
    return np.interp(np.linspace(0, 1, n_cells), places, np.sort(reference_sparsity))


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
