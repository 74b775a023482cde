"""Counts of whatever form as CSR float32; a dense matrix is only ever seen a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
from scipy import sparse

from lloki_atlas.errors import InputError

BLOCK_BYTES = 8 << 20
SPARSE_BLOCK_ROWS = 65_536


def read_counts(matrix: Any, rows: np.ndarray | None = None, *, where: str = "the source") -> sparse.csr_matrix:
    """Read a matrix, or some rows of it.

    Parameters
    ----------
    matrix
        `(n, n_genes)`: scipy CSR, CSC or other sparse form, numpy array, h5py dataset, h5py group or anndata's
        backed form of a sparse matrix, dask array.
    rows
        Ascending row numbers; all when None.
    where
        What to call the source in messages.

    Returns
    -------
    scipy.sparse.csr_matrix
        `(n_rows, n_genes)` float32, indices sorted, no stored zeros, no memory shared with `matrix`.

    Raises
    ------
    InputError
        If the values are no numbers, or the parts of a sparse matrix contradict each other.
    """
    if isinstance(matrix, h5py.Group):
        check_stored(matrix, where=where)
        matrix = _backed(matrix)
    check_numbers(getattr(matrix, "dtype", None), where=where)
    if sparse.issparse(getattr(matrix, "_meta", None)):
        # a lazy sparse matrix is no larger in memory than on disk
        matrix = matrix.compute(scheduler="synchronous")
    if getattr(matrix, "format", None) == "csc" and not sparse.issparse(matrix):
        matrix = matrix.to_memory()
    if sparse.issparse(matrix):
        matrix = _consistent(matrix, where)
        chosen = matrix if rows is None else sparse.csr_matrix(matrix)[rows]
        counts = sparse.csr_matrix(chosen, dtype=np.float32, copy=True)
    else:
        n_genes = int(matrix.shape[1])
        blocks = [sparse.csr_matrix((0, n_genes), dtype=np.float32), *_blocks(matrix, rows, where)]
        counts = sparse.csr_matrix(sparse.vstack(blocks, format="csr"))
    counts.sum_duplicates()
    counts.eliminate_zeros()
    counts.sort_indices()
    return counts


def check_numbers(dtype: Any, *, where: str) -> None:
    """Refuse counts of another type than numbers."""
    if dtype is not None and np.dtype(dtype).kind not in "biuf":
        raise InputError(f"the counts of {where} are of type {dtype}: give numbers")


def check_stored(group: h5py.Group, *, where: str) -> None:
    """Refuse a compressed matrix on disk whose `indptr`, `indices` and `data` contradict each other.

    Only `indptr` is read; that the indices are in range is checked where they are.
    """
    parts = {name: group.get(name) for name in ("indptr", "indices", "data")}
    for name, part in parts.items():
        if not isinstance(part, h5py.Dataset) or part.ndim != 1:
            raise _inconsistent(where, f"it has no {name}")
    check_numbers(parts["data"].dtype, where=where)
    indptr = parts["indptr"][...]
    if indptr.dtype.kind not in "iu" or parts["indices"].dtype.kind not in "iu":
        raise _inconsistent(where, "indptr and indices are no whole numbers")
    if not len(indptr) or indptr[0] != 0 or (indptr[1:] < indptr[:-1]).any():
        raise _inconsistent(where, "indptr does not ascend from 0")
    if not len(parts["indices"]) == len(parts["data"]) == indptr[-1]:
        raise _inconsistent(where, "indptr, indices and data differ in length")


def _consistent(matrix: Any, where: str) -> Any:
    """The matrix; compiled code trusts indices without looking."""
    if matrix.format in ("csr", "csc"):
        try:
            matrix.check_format(full_check=True)
        except ValueError as error:
            raise _inconsistent(where, str(error)) from error
    return matrix


def _inconsistent(where: str, problem: str) -> InputError:
    return InputError(f"the sparse counts of {where} are damaged ({problem}): copy or export it again")


def _blocks(matrix: Any, rows: np.ndarray | None, where: str) -> Iterator[sparse.csr_matrix]:
    n = int(matrix.shape[0])
    size = _block_rows(matrix)
    for start in range(0, n, size):
        stop = min(start + size, n)
        wanted = None
        if rows is not None:
            wanted = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)] - start
            if not len(wanted):
                continue
        block = matrix[start:stop]
        if hasattr(block, "compute"):
            block = block.compute(scheduler="synchronous")
        block = _consistent(block, where) if sparse.issparse(block) else np.asarray(block)
        block = sparse.csr_matrix(block if wanted is None else block[wanted])
        yield block.astype(np.float32)


def _block_rows(matrix: Any) -> int:
    """Rows of a block: some megabytes of a dense matrix, and whole chunks where it is chunked on disk."""
    if hasattr(matrix, "to_memory"):  # anndata's backed sparse matrix
        return SPARSE_BLOCK_ROWS
    row_bytes = max(1, int(matrix.shape[1]) * np.dtype(matrix.dtype).itemsize)
    size = max(1, BLOCK_BYTES // row_bytes)
    chunks = getattr(matrix, "chunks", None)
    if isinstance(matrix, h5py.Dataset) and chunks and chunks[0] * row_bytes <= 8 * BLOCK_BYTES:
        size = max(1, size // chunks[0]) * chunks[0]
    return size


def _backed(group: h5py.Group) -> Any:
    from anndata.io import sparse_dataset

    return sparse_dataset(group)
