"""What every kernel asks of its arrays, checked once where Python hands them over.

Arrays are passed on as read-only C-contiguous views: a kernel cannot alter its input, and numba compiles one
specialisation whether the caller's array was writeable or came read-only out of a store.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import DTypeLike, NDArray

from lloki_atlas.errors import InputError


class CsrArrays(NamedTuple):
    """The three arrays of a CSR matrix in the kernels' types, canonical: sorted columns, no duplicates."""

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    data: NDArray[np.float32]
    shape: tuple[int, int]


def array(values: Any, dtype: DTypeLike, *, name: str, shape: tuple[int | None, ...]) -> NDArray[Any]:
    """Return `values` as a read-only C-contiguous view of that type.

    Parameters
    ----------
    values
        A real or integer array; integers are asked for where `dtype` is an integer.
    dtype
        The kernel's type.
    name
        What a message calls the array.
    shape
        The expected length of each axis, None for any.

    Returns
    -------
    numpy.ndarray
        No copy where type and layout already fit.

    Raises
    ------
    InputError
        On another number of axes, another length or a type that does not convert.
    """
    given = np.asarray(values)
    wanted = np.dtype(dtype)
    if given.dtype.kind not in ("biu" if wanted.kind in "iu" else "biuf"):
        kind = "integers" if wanted.kind in "iu" else "real numbers"
        raise InputError(f"{name} holds {given.dtype}: give {kind}")
    if given.ndim != len(shape) or any(n is not None and n != m for n, m in zip(shape, given.shape, strict=True)):
        asked = ", ".join("any" if n is None else str(n) for n in shape)
        raise InputError(f"{name} has shape {given.shape}: give ({asked})")
    if wanted.kind in "iu" and given.dtype != wanted and given.size:
        limits = np.iinfo(wanted)
        if int(given.max()) > limits.max or int(given.min()) < limits.min:
            raise InputError(f"{name} holds values outside {wanted}: give values from {limits.min} to {limits.max}")
    view = np.ascontiguousarray(given, dtype=wanted).view()
    view.flags.writeable = False
    return view


def finite(values: NDArray[Any], *, name: str) -> NDArray[Any]:
    """Return `values`, refusing NaN and infinity."""
    if not np.isfinite(values).all():
        row = int(np.argwhere(~np.isfinite(values))[0, 0])
        raise InputError(f"{name} is not finite at row {row}: remove or mend it")
    return values


def csr_arrays(matrix: Any, *, name: str, negative: bool = False) -> CsrArrays:
    """Return the arrays of a scipy CSR matrix in the kernels' types.

    Parameters
    ----------
    matrix
        `(n_cells, n_genes)` scipy CSR matrix or array of real numbers.
    name
        What a message calls the matrix.
    negative
        Whether values below zero are allowed.

    Returns
    -------
    CsrArrays
        No copy where the types already fit and the matrix is canonical.

    Raises
    ------
    InputError
        If it is not CSR, or holds NaN, infinity or (unless allowed) negative values.
    """
    if not sp.issparse(matrix) or matrix.format != "csr":
        raise InputError(f"{name} is a {type(matrix).__name__}: give a scipy CSR matrix")
    if not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    data = array(matrix.data, np.float32, name=f"{name}.data", shape=(None,))
    if not np.isfinite(data).all():
        raise InputError(f"{name} holds NaN or infinity: remove or mend those entries")
    if not negative and data.size and float(data.min()) < 0:
        raise InputError(f"{name} holds a negative value: give counts")
    indptr = array(matrix.indptr, np.int64, name=f"{name}.indptr", shape=(matrix.shape[0] + 1,))
    indices = array(matrix.indices, np.int32, name=f"{name}.indices", shape=(data.shape[0],))
    return CsrArrays(indptr, indices, data, (int(matrix.shape[0]), int(matrix.shape[1])))
