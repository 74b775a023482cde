"""Matrices that are there row by row: what a kernel slices may be in memory, on disk, or made when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


class Rows:
    """Rows of a matrix that are made when they are sliced.

    Parameters
    ----------
    shape
        Rows and columns.
    read
        Returns rows `start` to `stop`.
    """

    def __init__(self, shape: tuple[int, int], read: Callable[[int, int], Any]) -> None:
        self.shape = (int(shape[0]), int(shape[1]))
        self._read = read

    def __getitem__(self, rows: slice) -> Any:
        start, stop, _ = rows.indices(self.shape[0])
        return self._read(start, max(start, stop))


def dense_rows(matrix: Any) -> Rows:
    """Rows of a CSR matrix (or of `Rows` of one) as dense float32."""
    return Rows(matrix.shape, lambda start, stop: np.asarray(matrix[start:stop].toarray(), dtype=np.float32))
