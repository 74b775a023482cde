"""The order in which a slice stores its cells: along a Hilbert curve, so that a tile is a compact piece of tissue."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from lloki_atlas.kernels.checks import array, finite

BITS = 16


def hilbert_order(coordinates: ArrayLike) -> NDArray[np.int64]:
    """Return the rows in the order of a Hilbert curve of 16 bits an axis over the bounding square.

    The square starts at the smallest x and y and has the longer side of the bounding box, so the order does not
    depend on the origin or the unit. Cells of one square of the curve keep the order of their rows.

    Parameters
    ----------
    coordinates
        `(n_cells, 2)`, any unit.

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
    return np.argsort(codes, kind="stable").astype(np.int64)


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
