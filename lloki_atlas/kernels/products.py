"""Products of four rows with a block of rows, summed over dimensions in ascending order: the inner loop of a search."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

BLOCK = 256  # columns of a block; 4 rows by 256 columns of partial sums stay in the first-level cache
_ZERO = np.float32(0)


@njit(nogil=True, cache=True)
def pack(rows: NDArray[Any], column: int, width: int, panel: NDArray[np.float32]) -> None:
    """Lay `width` rows from `column` on side by side: `panel` (d × BLOCK), one dimension after the other, in-place."""
    for d in range(rows.shape[1]):
        for c in range(width):
            panel[d * BLOCK + c] = rows[column + c, d]


@njit(nogil=True, cache=True)
def dot_block(group: NDArray[np.float32], panel: NDArray[np.float32], depth: int, block: NDArray[np.float32]) -> None:
    """Inner products of 4 rows (4 × depth) with a panel (depth × BLOCK) into `block` (4 × BLOCK), in-place.

    `depth` is a multiple of 4; every sum runs over dimensions in ascending order, so a pair of rows gives the same
    bits whichever of them is in the panel.
    """
    # flat arrays and constant strides let the compiler see that nothing overlaps, and vectorise over c
    for c in range(block.shape[0]):
        block[c] = _ZERO
    q, r, s, t = group[:depth], group[depth : 2 * depth], group[2 * depth : 3 * depth], group[3 * depth :]
    for d in range(0, depth, 4):
        q0, q1, q2, q3 = q[d], q[d + 1], q[d + 2], q[d + 3]
        r0, r1, r2, r3 = r[d], r[d + 1], r[d + 2], r[d + 3]
        s0, s1, s2, s3 = s[d], s[d + 1], s[d + 2], s[d + 3]
        t0, t1, t2, t3 = t[d], t[d + 1], t[d + 2], t[d + 3]
        p = panel[d * BLOCK : (d + 4) * BLOCK]
        for c in range(BLOCK):
            p0, p1, p2, p3 = p[c], p[c + BLOCK], p[c + 2 * BLOCK], p[c + 3 * BLOCK]
            block[c] = (((block[c] + q0 * p0) + q1 * p1) + q2 * p2) + q3 * p3
            block[c + BLOCK] = (((block[c + BLOCK] + r0 * p0) + r1 * p1) + r2 * p2) + r3 * p3
            block[c + 2 * BLOCK] = (((block[c + 2 * BLOCK] + s0 * p0) + s1 * p1) + s2 * p2) + s3 * p3
            block[c + 3 * BLOCK] = (((block[c + 3 * BLOCK] + t0 * p0) + t1 * p1) + t2 * p2) + t3 * p3


@njit(nogil=True, cache=True)
def square_block(
    group: NDArray[np.float32], panel: NDArray[np.float32], depth: int, block: NDArray[np.float32]
) -> None:
    """Sums of squared differences of 4 rows with a panel into `block` (4 × BLOCK), in-place."""
    for c in range(block.shape[0]):
        block[c] = _ZERO
    q, r, s, t = group[:depth], group[depth : 2 * depth], group[2 * depth : 3 * depth], group[3 * depth :]
    for d in range(depth):
        q0, r0, s0, t0 = q[d], r[d], s[d], t[d]
        p = panel[d * BLOCK : (d + 1) * BLOCK]
        for c in range(BLOCK):
            block[c] += (q0 - p[c]) * (q0 - p[c])
            block[c + BLOCK] += (r0 - p[c]) * (r0 - p[c])
            block[c + 2 * BLOCK] += (s0 - p[c]) * (s0 - p[c])
            block[c + 3 * BLOCK] += (t0 - p[c]) * (t0 - p[c])
