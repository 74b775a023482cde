"""Nearest other rows of one matrix by cosine, each pair of rows multiplied once.

Rows are read slab by slab, so the matrix may lie on disk; blocks of them meet in pairs, and a similarity serves both
of its rows. Its bits do not depend on blocks, on the order of rows or on threads (see `products`); neighbours are
ordered by (distance, index), which no order of visits can change.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lloki_atlas.kernels.candidates import keep_nearest, no_keys, worst_distances
from lloki_atlas.kernels.products import BLOCK, ROWS, pack, product_block
from lloki_atlas.kernels.unit import unit_rows

SLAB_BYTES = 32 * 2**20  # unit rows of one slab; two of them are in memory at a time


def search_self(
    read: Callable[[int, int], NDArray[np.float32]],
    n_rows: int,
    n_dimensions: int,
    *,
    start: int,
    stop: int,
    n_neighbors: int,
    n_threads: int,
) -> NDArray[np.uint64]:
    """Find the neighbours of rows `start` to `stop`.

    Parameters
    ----------
    read
        Returns rows a to b of the matrix, `(b − a, d)` float32.
    n_rows, n_dimensions
        Shape of the matrix.
    start, stop
        The rows to search for.
    n_neighbors
        Length k of a list.
    n_threads
        Python threads that share the pairs of blocks.

    Returns
    -------
    numpy.ndarray
        `(stop − start, k)` keys, see `candidates`.
    """
    keys = no_keys(stop - start, n_neighbors)
    height = slab_rows(n_rows, n_dimensions)
    n_slabs = -(-n_rows // height)
    first, last = start // height, -(-stop // height)

    def load(slab: int) -> tuple[int, NDArray[np.float32]]:
        at = slab * height
        return at, unit_rows(read(at, min(at + height, n_rows)), padding=ROWS)

    for i in range(n_slabs):
        wanted = [j for j in range(i, n_slabs) if first <= i < last or first <= j < last]
        if not wanted:
            continue
        left = load(i)
        for j in wanted:
            _meet(left, left if j == i else load(j), start, stop, keys, n_threads)
    return keys


def slab_rows(n_rows: int, n_dimensions: int) -> int:
    """Rows of a slab: whole blocks."""
    rows = SLAB_BYTES // (4 * max(1, n_dimensions)) // BLOCK * BLOCK
    return max(BLOCK, min(rows, -(-n_rows // BLOCK) * BLOCK))


def _meet(
    left: tuple[int, NDArray[np.float32]],
    right: tuple[int, NDArray[np.float32]],
    start: int,
    stop: int,
    keys: NDArray[np.uint64],
    n_threads: int,
) -> None:
    # every pair of blocks of two slabs; a thread owns the lists of both blocks of its pair while it works on them
    (row, rows), (column, columns) = left, right
    same = row == column
    n_left, n_right = len(rows) - ROWS, len(columns) - ROWS
    # few and large pieces of work, but enough of them for the threads to end together
    size = BLOCK if max(n_left, n_right) < 32 * BLOCK else 4 * BLOCK
    pairs = [(a, b) for b in range(0, n_right, size) for a in range(0, min(n_left, b + size) if same else n_left, size)]
    pairs.sort(key=lambda pair: pair[0] - pair[1])  # near ones, which are alike, are taken first: from the end
    taken: set[int] = set()
    free = threading.Condition()

    def take() -> tuple[int, int] | None:
        with free:
            while pairs:
                for at in range(len(pairs) - 1, -1, -1):
                    a, b = pairs[at]
                    if taken.isdisjoint((row + a, column + b)):
                        taken.update((row + a, column + b))
                        return pairs.pop(at)
                free.wait()
        return None

    def work() -> None:
        while (pair := take()) is not None:
            a, b = pair
            try:
                _visit(
                    rows, row, a, min(a + size, n_left), columns, column, b, min(b + size, n_right), start, stop, keys
                )
            finally:
                with free:
                    taken.difference_update((row + a, column + b))
                    free.notify_all()

    if n_threads == 1:
        work()
        return
    with ThreadPoolExecutor(n_threads) as pool:
        for future in [pool.submit(work) for _ in range(n_threads)]:
            future.result()


@njit(nogil=True, cache=True)
def _visit(
    rows: NDArray[np.float32],
    row_offset: int,
    row: int,
    row_end: int,
    columns: NDArray[np.float32],
    column_offset: int,
    column: int,
    column_end: int,
    start: int,
    stop: int,
    keys: NDArray[np.uint64],
) -> None:
    # all pairs of two ranges of rows: rows look for columns and columns for rows in one pass
    panel = np.empty(rows.shape[1] * BLOCK, dtype=np.float32)
    block = np.empty((BLOCK + ROWS, BLOCK), dtype=np.float32)
    worst = np.empty(BLOCK, dtype=np.float32)
    same = row_offset + row == column_offset + column
    for c in range(column, column_end, BLOCK):
        n_columns, place = min(BLOCK, column_end - c), column_offset + c
        pack(columns, c, n_columns, panel)
        for r in range(row, min(row_end, c + BLOCK) if same else row_end, BLOCK):
            height = min(BLOCK, row_end - r)
            # of a block with itself every pair comes twice: the columns need no lists
            wanted = 0 if row_offset + r == place else n_columns
            worst_distances(keys, start, stop, place, wanted, worst)
            product_block(rows, r, height, panel, block, False)
            for i in range(height):
                keep_nearest(block[i], n_columns, row_offset + r + i, place, start, stop, worst, keys)
