"""Diffusion of the observed counts over the second graph (equation 5), for any range of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.checks import array, csr_arrays, finite
from lloki_atlas.kernels.graph import Graph


def diffuse(
    graph: Graph,
    values: Any,
    *,
    start: int,
    stop: int,
    alpha: float = 1.0,
    keep_observed: bool = False,
    baseline: ArrayLike | None = None,
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
        `(n_cells, n_genes)` CSR float32.
    start, stop
        The rows to return.
    alpha
        Weight of the diffused values, 0 to 1.
    keep_observed
        Whether the non-zero entries of `values` stay as they are.
    baseline
        `(n_genes,)`; zero by default.

    Returns
    -------
    numpy.ndarray
        `(stop − start, n_genes)` float32.

    Raises
    ------
    InputError
        If shapes do not fit, or the range or α is out of bounds.
    """
    matrix = csr_arrays(values, name="values", negative=True)
    n, n_genes = matrix.shape
    if n != graph.n_cells:
        raise InputError(f"values has {n} cells and the graph {graph.n_cells}: give one slice's")
    if not 0 <= start <= stop <= n:
        raise InputError(f"rows {start} to {stop} are not in 0 to {n}: give a range of rows")
    if not 0.0 <= alpha <= 1.0:
        raise InputError(f"alpha is {alpha}: it has to lie between 0 and 1")
    offset = np.zeros(n_genes) if baseline is None else baseline
    offset = finite(array(offset, np.float64, name="baseline", shape=(n_genes,)), name="baseline")
    out = np.empty((stop - start, n_genes), dtype=np.float32)
    _diffuse_rows(
        array(graph.indptr, np.int64, name="indptr", shape=(None,)),
        array(graph.indices, np.int32, name="indices", shape=(None,)),
        array(graph.weights, np.float32, name="weights", shape=(None,)),
        matrix.indptr,
        matrix.indices,
        matrix.data,
        offset,
        start,
        float(alpha),
        bool(keep_observed),
        out,
    )
    return out


@njit(nogil=True, cache=True)
def _diffuse_rows(
    graph_indptr: NDArray[Any],
    graph_indices: NDArray[Any],
    weights: NDArray[Any],
    indptr: NDArray[Any],
    indices: NDArray[Any],
    data: NDArray[Any],
    baseline: NDArray[Any],
    start: int,
    alpha: float,
    keep_observed: bool,
    out: NDArray[np.float32],
) -> None:
    total = np.empty(baseline.shape[0])
    for row in range(out.shape[0]):
        i = start + row
        for g in range(total.shape[0]):
            total[g] = 0.0
        weight_sum = 0.0
        for p in range(graph_indptr[i], graph_indptr[i + 1]):
            weight = np.float64(weights[p])
            weight_sum += weight
            j = graph_indices[p]
            for q in range(indptr[j], indptr[j + 1]):
                total[indices[q]] += weight * data[q]
        share = alpha * weight_sum + (1.0 - alpha)
        for g in range(total.shape[0]):
            total[g] = alpha * total[g] + share * baseline[g]
        for q in range(indptr[i], indptr[i + 1]):
            g = indices[q]
            if keep_observed and data[q] != 0:
                total[g] = baseline[g] + data[q]
            else:
                total[g] += (1.0 - alpha) * data[q]
        for g in range(total.shape[0]):
            out[row, g] = total[g]
