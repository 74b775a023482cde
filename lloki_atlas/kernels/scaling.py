"""Gene moments and the expression space of the neighbour search, from sparse counts in one thread and a fixed order."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from numba import njit
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import threadpool_limits

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.checks import CsrArrays, array, csr_arrays, finite

SD_FLOOR = 1e-3
# z-scores have a variance near 1, so a component with less than this, or this part of a squared mean, is rounding
_NO_VARIANCE = 1e-10
# two threads that limit BLAS at once would restore each other's limit
_BLAS = threading.Lock()


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


def gene_moments(counts: Any, totals: ArrayLike, *, target_total: float) -> GeneMoments:
    """Return mean and standard deviation per gene of log1p(x / total · target_total).

    One pass; sums in float64 in the order of rows.

    Parameters
    ----------
    counts
        `(n_cells, n_genes)` CSR, not negative.
    totals
        `(n_cells,)` library sizes; a cell of total 0 counts as all zero.
    target_total
        The library size that every cell is brought to.

    Raises
    ------
    InputError
        If there are no cells, or shapes and values do not fit.
    """
    matrix = csr_arrays(counts, name="counts")
    if matrix.shape[0] == 0:
        raise InputError("counts has no cells: moments need at least one")
    scale = _library_scale(array(totals, np.float64, name="totals", shape=(matrix.shape[0],)), target_total)
    return _moments(matrix, scale)


def scaled_components(
    counts: Any,
    *,
    n_components: int,
    target_total: float = 100.0,
    clip: float = 5.0,
    totals: ArrayLike | None = None,
) -> NDArray[np.float32]:
    """Return the first principal components of z-scored log counts.

    z = clip((log1p(x / total · target_total) − mean) / (sd + 0.001), ±clip) per gene; components are eigenvectors
    of the covariance of z, each with its largest loading positive. A component without variance is all zero.
    z of an absent gene is one number per gene, so covariance and scores are sums over the counts that are there
    (Cov(z) = Cov(z − z₀)), in float64 in the order of rows: nothing depends on blocks or on BLAS threads.

    Parameters
    ----------
    counts
        `(n_cells, n_genes)` CSR over every gene of the panel, not negative.
    n_components
        Number of components asked for.
    target_total
        The library size that every cell is brought to.
    clip
        Largest absolute z.
    totals
        `(n_cells,)` library sizes, when `counts` holds only some of the genes; row sums when None.

    Returns
    -------
    numpy.ndarray
        `(n_cells, k)` float32, k = max(1, min(n_components, n_genes, n_cells − 1)).

    Raises
    ------
    InputError
        If there are no cells or genes, or a setting is not positive.
    """
    matrix = csr_arrays(counts, name="counts")
    n, n_genes = matrix.shape
    if n == 0 or n_genes == 0:
        raise InputError(f"counts has shape {matrix.shape}: components need at least one cell and one gene")
    if n_components < 1 or not clip > 0:
        raise InputError(f"n_components is {n_components} and clip {clip}: both have to be positive")
    k = max(1, min(n_components, n_genes, n - 1))
    library = (
        _row_sums(matrix.indptr, matrix.data)
        if totals is None
        else array(totals, np.float64, name="totals", shape=(n,))
    )
    scale = _library_scale(library, target_total)
    moments = _moments(matrix, scale)
    spread = moments.sd + SD_FLOOR
    absent = np.clip(-moments.mean / spread, -clip, clip)
    arguments = (matrix.indptr, matrix.indices, matrix.data, scale, moments.mean, spread, absent, float(clip))
    covariance, center = _covariance(*arguments)
    rounding = _NO_VARIANCE * max(1.0, float(np.max(center**2)))
    loadings = _leading_eigenvectors(covariance, k, rounding)
    return _scores(*arguments, center, loadings)


def _library_scale(totals: NDArray[np.float64], target_total: float) -> NDArray[np.float64]:
    if not (math.isfinite(target_total) and target_total > 0):
        raise InputError(f"target_total is {target_total}: it has to be positive")
    if (finite(totals, name="totals") < 0).any():
        raise InputError("totals holds a negative number: give library sizes")
    scale = np.zeros(totals.shape[0])
    np.divide(target_total, totals, out=scale, where=totals > 0)
    return scale


def _moments(matrix: CsrArrays, scale: NDArray[np.float64]) -> GeneMoments:
    total, squares = _log_sums(matrix.indptr, matrix.indices, matrix.data, scale, matrix.shape[1])
    mean = total / matrix.shape[0]
    return GeneMoments(mean, np.sqrt(np.maximum(squares / matrix.shape[0] - mean**2, 0.0)))


def _leading_eigenvectors(covariance: NDArray[np.float64], k: int, rounding: float) -> NDArray[np.float64]:
    n_genes = covariance.shape[0]
    with _BLAS, threadpool_limits(limits=1, user_api="blas"):
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
def _covariance(
    indptr: NDArray[Any],
    indices: NDArray[Any],
    data: NDArray[Any],
    scale: NDArray[Any],
    mean: NDArray[Any],
    spread: NDArray[Any],
    absent: NDArray[Any],
    clip: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    n, n_genes = indptr.shape[0] - 1, mean.shape[0]
    covariance, center, row = np.zeros((n_genes, n_genes)), np.zeros(n_genes), np.empty(n_genes)
    for i in range(n):
        _shifted_row(i, indptr, indices, data, scale, mean, spread, absent, clip, row)
        first, size = indptr[i], indptr[i + 1] - indptr[i]
        for a in range(size):
            gene = indices[first + a]
            center[gene] += row[a]
            for b in range(a, size):
                covariance[gene, indices[first + b]] += row[a] * row[b]
    for a in range(n_genes):
        center[a] /= n
    for a in range(n_genes):
        for b in range(a, n_genes):
            covariance[a, b] = covariance[a, b] / n - center[a] * center[b]
            covariance[b, a] = covariance[a, b]
    return covariance, center


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
