"""The order in which a slice stores its cells: along a Hilbert curve, so that a tile is a compact piece of tissue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from lloki_atlas.kernels.checks import array, finite

BITS = 16


def hilbert_order(coordinates: ArrayLike, *, names: Sequence[str] | None = None) -> NDArray[np.int64]:
    """Return the rows in the order of a Hilbert curve of 16 bits an axis over the bounding square.

    The square starts at the smallest x and y and has the longer side of the bounding box, so the order does not
    depend on the origin or the unit. Cells of one square of the curve follow each other by x, then y, and at one place
    by name: the order of the rows does not matter, unless there are no names.

    Parameters
    ----------
    coordinates
        `(n_cells, 2)`, any unit.
    names
        Of the cells, all different; cells at one place keep the order of their rows without them.

    Returns
    -------
    numpy.ndarray
        `(n_cells,)` int64 permutation: the source row of each stored cell.

    Raises
    ------
    InputError
        If the shape is another one, or a coordinate is not finite.
    """
    given = np.asarray(coordinates)
    points = finite(array(given, np.float64, name="coordinates", shape=(None, 2)), name="coordinates")
    if points.shape[0] == 0:
        return np.zeros(0, dtype=np.int64)
    low, high = points.min(axis=0), points.max(axis=0)
    codes = _hilbert_codes(points, low[0], low[1], max(high - low))
    order = np.lexsort((points[:, 1], points[:, 0], codes)).astype(np.int64)
    if names is not None:
        _sort_places(order, points, names)
    return order


def _sort_places(order: NDArray[np.int64], points: NDArray[Any], names: Sequence[str]) -> None:
    """Order cells at one place by name, in-place."""
    same = (points[order[1:]] == points[order[:-1]]).all(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
    for first, last in edges.reshape(-1, 2):
        order[first : last + 1] = sorted(order[first : last + 1].tolist(), key=lambda row: names[row])


@njit(nogil=True, cache=True)
def _hilbert_codes(points: NDArray[Any], low_x: float, low_y: float, side: float) -> NDArray[np.int64]:
    n = points.shape[0]
    codes = np.zeros(n, dtype=np.int64)
    if side <= 0.0:
        return codes
    top = (1 << BITS) - 1
    for i in range(n):
        # the far edge of the square belongs to the last cell of the grid
        x = min(int((points[i, 0] - low_x) / side * (top + 1)), top)
        y = min(int((points[i, 1] - low_y) / side * (top + 1)), top)
        code = 0
        bit = 1 << (BITS - 1)
        while bit > 0:
            right = 1 if x & bit else 0
            upper = 1 if y & bit else 0
            code = 4 * code + ((3 * right) ^ upper)
            if upper == 0:
                if right == 1:
                    x, y = top - x, top - y
                x, y = y, x
            bit >>= 1
        codes[i] = code
    return codes
