"""Rows of length 1, so that inner products are cosines."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


def unit_rows(rows: NDArray[np.float32], *, padding: int = 0) -> NDArray[np.float32]:
    """Return `rows` (n, d) divided by their lengths, and `padding` rows of zeros behind them.

    Squares are summed in float64 in the order of dimensions. A row without a direction (all zero, or holding a NaN or
    an infinity) becomes NaN, which no comparison admits as a neighbour.
    """
    unit = np.empty((rows.shape[0] + padding, rows.shape[1]), dtype=np.float32)
    unit[rows.shape[0] :] = 0.0
    _scale(rows, unit)
    unit.flags.writeable = False
    return unit


def padded_rows(rows: NDArray[np.float32], padding: int) -> NDArray[np.float32]:
    """Return `rows` (n, d) with `padding` rows of zeros behind them."""
    padded = np.zeros((rows.shape[0] + padding, rows.shape[1]), dtype=np.float32)
    padded[: rows.shape[0]] = rows
    padded.flags.writeable = False
    return padded


@njit(nogil=True, cache=True)
def _scale(rows: NDArray[Any], unit: NDArray[np.float32]) -> None:
    n, d = rows.shape
    for i in range(n):
        squares = 0.0
        for c in range(d):
            squares += np.float64(rows[i, c]) * np.float64(rows[i, c])
        norm = math.sqrt(squares) if 0.0 < squares < np.inf else np.nan
        for c in range(d):
            unit[i, c] = rows[i, c] / norm
