"""Nearest other rows of one matrix by cosine, each pair of rows multiplied once.

Rows are read slab by slab, so the matrix may lie on disk; blocks of them meet in pairs, and a similarity serves both
of its rows. Its bits do not depend on blocks, on the order of rows or on threads (see `products`); neighbours are
ordered by (distance, index), which no order of visits can change.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lloki_atlas.kernels.candidates import keep_nearest, no_keys, worst_distances
from lloki_atlas.kernels.products import BLOCK, ROWS, pack, product_block
from lloki_atlas.kernels.unit import unit_rows

ReadRows = Callable[[int, int], NDArray[np.float32]]
_Slab = tuple[int, NDArray[np.float32]]  # first row, and unit rows with padding

SLAB_BYTES = 32 * 2**20  # unit rows of one slab; two of them are in memory at a time


@dataclass(frozen=True)
class Lists:
    """Lists of the neighbours found so far of rows `start` to `stop`: `keys` (stop − start, k), see `candidates`."""

    start: int
    stop: int
    keys: NDArray[np.uint64]

    @classmethod
    def empty(cls, start: int, stop: int, n_neighbors: int) -> Lists:
        """Return lists without any neighbour."""
        return cls(start, stop, no_keys(stop - start, n_neighbors))


def search_self(
    read: ReadRows, n_rows: int, n_dimensions: int, *, start: int, stop: int, n_neighbors: int, n_threads: int
) -> Lists:
    """Find the neighbours of rows `start` to `stop` among all rows.

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
    """
    lists = Lists.empty(start, stop, n_neighbors)
    height = slab_rows(n_rows, n_dimensions)
    n_slabs = -(-n_rows // height)
    first, last = start // height, -(-stop // height)

    def load(slab: int) -> _Slab:
        return _load(read, slab * height, min((slab + 1) * height, n_rows))

    for i in range(n_slabs):
        wanted = [j for j in range(i, n_slabs) if first <= i < last or first <= j < last]
        if not wanted:
            continue
        left = load(i)
        for j in wanted:
            _meet(left, left if j == i else load(j), lists, lists, n_threads)
    return lists


def search_between(
    read: ReadRows,
    rows: tuple[int, int],
    columns: tuple[int, int],
    n_dimensions: int,
    lists: tuple[Lists, Lists],
    *,
    n_threads: int,
) -> None:
    """Let two ranges of rows that do not overlap find neighbours in each other, in-place in `lists`."""
    height = slab_rows(max(rows[1] - rows[0], columns[1] - columns[0]), n_dimensions)
    for a in range(*rows, height):
        left = _load(read, a, min(a + height, rows[1]))
        for b in range(*columns, height):
            _meet(left, _load(read, b, min(b + height, columns[1])), *lists, n_threads)


def search_within(read: ReadRows, rows: tuple[int, int], n_dimensions: int, lists: Lists, *, n_threads: int) -> None:
    """Let a range of rows find neighbours in itself, in-place in its lists."""
    height = slab_rows(rows[1] - rows[0], n_dimensions)
    for a in range(*rows, height):
        left = _load(read, a, min(a + height, rows[1]))
        for b in range(a, rows[1], height):
            right = left if b == a else _load(read, b, min(b + height, rows[1]))
            _meet(left, right, lists, lists, n_threads)


def merge_keys(parts: list[NDArray[np.uint64]], n_neighbors: int) -> NDArray[np.uint64]:
    """Return the lists `(n, k)` of rows whose neighbours were looked for in several places, none twice."""
    if len(parts) == 1:
        return parts[0]
    merged = np.empty((len(parts[0]), n_neighbors), dtype=np.uint64)
    for start in range(0, len(merged), 8192):
        rows = np.concatenate([part[start : start + 8192] for part in parts], axis=1)
        rows.sort(axis=1)
        merged[start : start + 8192] = rows[:, :n_neighbors]
    return merged


def _load(read: ReadRows, start: int, stop: int) -> _Slab:
    return start, unit_rows(read(start, stop), padding=ROWS)


def slab_rows(n_rows: int, n_dimensions: int) -> int:
    """Rows of a slab: whole blocks."""
    rows = SLAB_BYTES // (4 * max(1, n_dimensions)) // BLOCK * BLOCK
    return max(BLOCK, min(rows, -(-n_rows // BLOCK) * BLOCK))


def _meet(left: _Slab, right: _Slab, row_lists: Lists, column_lists: Lists, n_threads: int) -> None:
    # every pair of blocks of two slabs; a thread owns the lists of both blocks of its pair while it works on them
    (row, rows), (column, columns) = left, right
    same = row == column
    n_left, n_right = len(rows) - ROWS, len(columns) - ROWS
    # large pieces of work, in which a block is packed once for many rows, but enough for the threads to end together
    size = BLOCK * min(4, max(1, max(n_left, n_right) // (8 * BLOCK)))
    pairs = [(a, b) for b in range(0, n_right, size) for a in range(0, min(n_left, b + size) if same else n_left, size)]
    pairs.sort(key=lambda pair: pair[0] - pair[1])  # near ones, which are alike, are taken first: from the end
    lists = tuple(part for each in (row_lists, column_lists) for part in (each.start, each.stop, each.keys))
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
                _visit(rows, row, a, min(a + size, n_left), columns, column, b, min(b + size, n_right), *lists)
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
    row_start: int,
    row_stop: int,
    row_keys: NDArray[np.uint64],
    column_start: int,
    column_stop: int,
    column_keys: NDArray[np.uint64],
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
            worst_distances(column_keys, column_start, column_stop, place, wanted, worst)
            product_block(rows, r, height, panel, block, False)
            for i in range(height):
                keep_nearest(
                    block[i],
                    n_columns,
                    row_offset + r + i,
                    place,
                    row_start,
                    row_stop,
                    row_keys,
                    column_start,
                    worst,
                    column_keys,
                )
