"""Gene moments and the expression space of the neighbour search, from sparse counts.

Sums are float64 within pieces of a fixed number of rows and then over pieces, both in order, so that they do not depend
on threads or on how much of the counts is in memory.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import scipy.linalg
from numba import njit
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import threadpool_limits

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.checks import CsrArrays, array, csr_arrays, finite

PIECE = 4096  # rows of a partial sum: fixed, for sums must not depend on anything else
SD_FLOOR = 1e-3
# z-scores have a variance near 1, so a component with less than this, or this part of a squared mean, is rounding
_NO_VARIANCE = 1e-10
# two threads that limit BLAS at once would restore each other's limit
BLAS_LOCK = threading.Lock()

T = TypeVar("T")


@dataclass(frozen=True)
class GeneMoments:
    """Mean and standard deviation (over n, not n − 1) of each gene: `(n_genes,)` float64."""

    mean: NDArray[np.float64]
    sd: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.mean.shape != self.sd.shape:
            raise InputError(f"mean {self.mean.shape} and sd {self.sd.shape} differ: give one number a gene")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.sd).all() and (self.sd >= 0).all()):
            raise InputError("a gene's mean or sd is not finite or negative: compute them from finite counts")


def gene_moments(counts: Any, totals: ArrayLike, *, target_total: float, n_threads: int = 1) -> GeneMoments:
    """Return mean and standard deviation per gene of log1p(x / total · target_total), in one pass.

    Parameters
    ----------
    counts
        `(n_cells, n_genes)` CSR, not negative: a matrix, or anything with a `shape` whose row slices are one.
    totals
        `(n_cells,)` library sizes; a cell of total 0 counts as all zero.
    target_total
        The library size that every cell is brought to.
    n_threads
        Threads; they change no bit.

    Raises
    ------
    InputError
        If there are no cells, or shapes and values do not fit.
    """
    n = int(counts.shape[0])
    if n == 0:
        raise InputError("counts has no cells: moments need at least one")
    scale = _library_scale(array(totals, np.float64, name="totals", shape=(n,)), target_total)
    return _moments(counts, scale, n_threads)


def scaled_components(
    counts: Any,
    *,
    n_components: int,
    target_total: float = 100.0,
    clip: float = 5.0,
    totals: ArrayLike | None = None,
    n_threads: int = 1,
) -> NDArray[np.float32]:
    """Return the first principal components of z-scored log counts.

    z = clip((log1p(x / total · target_total) − mean) / (sd + 0.001), ±clip) per gene; components are eigenvectors
    of the covariance of z, each with its largest loading positive. A component without variance is all zero.
    z of an absent gene is one number per gene, so covariance and scores are sums over the counts that are there
    (Cov(z) = Cov(z − z₀)).

    Parameters
    ----------
    counts
        `(n_cells, n_genes)` CSR over every gene of the panel, not negative: a matrix, or anything with a `shape` whose
        row slices are one; read three times, or four without `totals`.
    n_components
        Number of components asked for.
    target_total
        The library size that every cell is brought to.
    clip
        Largest absolute z.
    totals
        `(n_cells,)` library sizes, when `counts` holds only some of the genes; row sums when None.
    n_threads
        Threads; they change no bit. Each holds 8 bytes a pair of genes.

    Returns
    -------
    numpy.ndarray
        `(n_cells, k)` float32, k = max(1, min(n_components, n_genes, n_cells − 1)).

    Raises
    ------
    InputError
        If there are no cells or genes, or a setting is not positive.
    """
    n, n_genes = (int(length) for length in counts.shape)
    if n == 0 or n_genes == 0:
        raise InputError(f"counts has shape {(n, n_genes)}: components need at least one cell and one gene")
    if n_components < 1 or not clip > 0:
        raise InputError(f"n_components is {n_components} and clip {clip}: both have to be positive")
    k = max(1, min(n_components, n_genes, n - 1))
    if totals is None:
        library = np.concatenate(
            list(_over_pieces(counts, n_threads, lambda part, _: _row_sums(part.indptr, part.data)))
        )
    else:
        library = array(totals, np.float64, name="totals", shape=(n,))
    scale = _library_scale(library, target_total)
    moments = _moments(counts, scale, n_threads)
    spread = moments.sd + SD_FLOOR
    absent = np.clip(-moments.mean / spread, -clip, clip)
    z = (moments.mean, spread, absent, float(clip))

    def product(part: CsrArrays, rows: slice) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return _products(part.indptr, part.indices, part.data, scale[rows], *z)

    covariance, center = np.zeros((n_genes, n_genes)), np.zeros(n_genes)
    for products, sums in _over_pieces(counts, n_threads, product):
        covariance += products
        center += sums
    center /= n
    covariance = np.triu(covariance) / n - np.triu(np.outer(center, center))
    covariance += np.triu(covariance, 1).T
    rounding = _NO_VARIANCE * max(1.0, float(np.max(center**2)))
    loadings = _leading_eigenvectors(covariance, k, rounding)

    def scores(part: CsrArrays, rows: slice) -> NDArray[np.float32]:
        return _scores(part.indptr, part.indices, part.data, scale[rows], *z, center, loadings)

    out, start = np.empty((n, k), dtype=np.float32), 0
    for piece in _over_pieces(counts, n_threads, scores):
        out[start : start + len(piece)] = piece
        start += len(piece)
    return out


def _over_pieces(counts: Any, n_threads: int, work: Callable[[CsrArrays, slice], T]) -> Iterator[T]:
    """Call `work` on PIECE rows at a time and yield what it returns in the order of rows; few wait at a time."""

    def call(start: int) -> T:
        rows = slice(start, min(start + PIECE, n))
        return work(csr_arrays(counts[rows], name="counts"), rows)

    n = int(counts.shape[0])
    starts = range(0, n, PIECE)
    if n_threads == 1 or len(starts) == 1:
        yield from map(call, starts)
        return
    with ThreadPoolExecutor(n_threads) as pool:
        for first in range(0, len(starts), n_threads):
            yield from pool.map(call, starts[first : first + n_threads])


def _library_scale(totals: NDArray[np.float64], target_total: float) -> NDArray[np.float64]:
    if not (math.isfinite(target_total) and target_total > 0):
        raise InputError(f"target_total is {target_total}: it has to be positive")
    if (finite(totals, name="totals") < 0).any():
        raise InputError("totals holds a negative number: give library sizes")
    scale = np.zeros(totals.shape[0])
    np.divide(target_total, totals, out=scale, where=totals > 0)
    return scale


def _moments(counts: Any, scale: NDArray[np.float64], n_threads: int) -> GeneMoments:
    n, n_genes = (int(length) for length in counts.shape)

    def sums(part: CsrArrays, rows: slice) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return _log_sums(part.indptr, part.indices, part.data, scale[rows], n_genes)

    total, squares = np.zeros(n_genes), np.zeros(n_genes)
    for some, some_squares in _over_pieces(counts, n_threads, sums):
        total += some
        squares += some_squares
    mean = total / n
    return GeneMoments(mean, np.sqrt(np.maximum(squares / n - mean**2, 0.0)))


def _leading_eigenvectors(covariance: NDArray[np.float64], k: int, rounding: float) -> NDArray[np.float64]:
    n_genes = covariance.shape[0]
    with BLAS_LOCK, threadpool_limits(limits=1, user_api="blas"):
        variances, vectors = scipy.linalg.eigh(covariance, subset_by_index=[n_genes - k, n_genes - 1])
    variances, vectors = variances[::-1], np.ascontiguousarray(vectors[:, ::-1])
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(k)]
    vectors *= np.where(largest < 0, -1.0, 1.0)
    vectors[:, variances <= rounding] = 0.0
    return vectors


@njit(nogil=True, cache=True)
def _row_sums(indptr: NDArray[Any], data: NDArray[Any]) -> NDArray[np.float64]:
    sums = np.zeros(indptr.shape[0] - 1)
    for i in range(sums.shape[0]):
        for p in range(indptr[i], indptr[i + 1]):
            sums[i] += data[p]
    return sums


@njit(nogil=True, cache=True)
def _log_sums(
    indptr: NDArray[Any], indices: NDArray[Any], data: NDArray[Any], scale: NDArray[Any], n_genes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    total, squares = np.zeros(n_genes), np.zeros(n_genes)
    for i in range(indptr.shape[0] - 1):
        for p in range(indptr[i], indptr[i + 1]):
            value = math.log1p(data[p] * scale[i])
            total[indices[p]] += value
            squares[indices[p]] += value * value
    return total, squares


@njit(nogil=True, cache=True)
def _shifted_row(  # z − z₀ of the counts of one cell, into `out`
    i: int,
    indptr: NDArray[Any],
    indices: NDArray[Any],
    data: NDArray[Any],
    scale: NDArray[Any],
    mean: NDArray[Any],
    spread: NDArray[Any],
    absent: NDArray[Any],
    clip: float,
    out: NDArray[np.float64],
) -> None:
    first = indptr[i]
    for p in range(first, indptr[i + 1]):
        gene = indices[p]
        z = (math.log1p(data[p] * scale[i]) - mean[gene]) / spread[gene]
        out[p - first] = min(max(z, -clip), clip) - absent[gene]


@njit(nogil=True, cache=True)
def _products(
    indptr: NDArray[Any],
    indices: NDArray[Any],
    data: NDArray[Any],
    scale: NDArray[Any],
    mean: NDArray[Any],
    spread: NDArray[Any],
    absent: NDArray[Any],
    clip: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    # upper triangle of Σ (z − z₀)(z − z₀)ᵀ, and Σ (z − z₀)
    n, n_genes = indptr.shape[0] - 1, mean.shape[0]
    products, center, row = np.zeros((n_genes, n_genes)), np.zeros(n_genes), np.empty(n_genes)
    for i in range(n):
        _shifted_row(i, indptr, indices, data, scale, mean, spread, absent, clip, row)
        first, size = indptr[i], indptr[i + 1] - indptr[i]
        for a in range(size):
            gene = indices[first + a]
            center[gene] += row[a]
            for b in range(a, size):
                products[gene, indices[first + b]] += row[a] * row[b]
    return products, center


@njit(nogil=True, cache=True)
def _scores(
    indptr: NDArray[Any],
    indices: NDArray[Any],
    data: NDArray[Any],
    scale: NDArray[Any],
    mean: NDArray[Any],
    spread: NDArray[Any],
    absent: NDArray[Any],
    clip: float,
    center: NDArray[Any],
    loadings: NDArray[Any],
) -> NDArray[np.float32]:
    n, k = indptr.shape[0] - 1, loadings.shape[1]
    scores, row, accumulated = np.empty((n, k), dtype=np.float32), np.empty(mean.shape[0]), np.empty(k)
    offset = np.zeros(k)
    for gene in range(center.shape[0]):
        for c in range(k):
            offset[c] -= center[gene] * loadings[gene, c]
    for i in range(n):
        _shifted_row(i, indptr, indices, data, scale, mean, spread, absent, clip, row)
        for c in range(k):
            accumulated[c] = offset[c]
        for p in range(indptr[i], indptr[i + 1]):
            value, loading = row[p - indptr[i]], loadings[indices[p]]
            for c in range(k):
                accumulated[c] += value * loading[c]
        for c in range(k):
            scores[i, c] = accumulated[c]
    return scores
