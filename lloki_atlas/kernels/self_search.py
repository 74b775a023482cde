"""Nearest other rows of one matrix by cosine, each pair of rows multiplied once.

Blocks of rows meet in pairs, and a similarity serves both of its rows. It is summed over dimensions in ascending
order and products commute, so its bits do not depend on blocks, on the order of rows or on threads; neighbours are
ordered by (distance, index), which no order of visits can change.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lloki_atlas.kernels.products import BLOCK, dot_block, pack

_CHUNK = 64  # similarities looked at together before any is looked at alone
_GROUP = 4  # rows that share a pass over a block
_ZERO, _ONE = np.float32(0), np.float32(1)


def search_self(
    unit: NDArray[np.float32],
    *,
    start: int,
    stop: int,
    indices: NDArray[np.int32],
    distances: NDArray[np.float32],
    n_threads: int,
) -> None:
    """Fill the neighbours of rows `start` to `stop`, in-place.

    Parameters
    ----------
    unit
        `(n, d)` float32, rows of length 1; a row with a NaN has no neighbours and is nobody's.
    start, stop
        The rows to search for.
    indices, distances
        `(stop − start, k)`, filled with −1 and infinity.
    n_threads
        Python threads that share the pairs of blocks.
    """
    n_blocks = -(-len(unit) // BLOCK)
    pairs = _pairs(n_blocks, start, stop)
    locks = [threading.Lock() for _ in range(n_blocks)]
    dealing = threading.Lock()

    def work() -> None:
        while True:
            with dealing:
                pair = next(pairs, None)
            if pair is None:
                return
            a, b = pair
            with locks[a], locks[b] if b > a else nullcontext():  # a first: no two threads wait for each other
                _visit(unit, a * BLOCK, b * BLOCK, start, stop, indices, distances)

    if n_threads == 1:
        work()
        return
    with ThreadPoolExecutor(n_threads) as pool:
        for future in [pool.submit(work) for _ in range(n_threads)]:
            future.result()


def _pairs(n_blocks: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Pairs a ≤ b with a or b among the wanted rows, near ones first, and far apart for threads that take turns."""
    first, last = start // BLOCK, -(-stop // BLOCK)
    for step in range(n_blocks):
        for a in range(n_blocks - step):
            b = a + step
            if first <= a < last or first <= b < last:
                yield a, b


@njit(nogil=True, cache=True)
def _visit(
    unit: NDArray[np.float32],
    row: int,
    column: int,
    start: int,
    stop: int,
    indices: NDArray[np.int32],
    distances: NDArray[np.float32],
) -> None:
    # all pairs of two blocks: rows look for columns and columns for rows in one pass
    n, width = unit.shape
    height, n_columns = min(BLOCK, n - row), min(BLOCK, n - column)
    depth = (width + 3) // 4 * 4  # zeros added to a sum change no bit of it
    panel = np.zeros(depth * BLOCK, dtype=np.float32)
    group = np.zeros(_GROUP * depth, dtype=np.float32)
    block = np.empty(_GROUP * BLOCK, dtype=np.float32)
    pack(unit, column, n_columns, panel)
    last = distances.shape[1] - 1
    worst = np.full(n_columns, -np.inf, dtype=np.float32)  # what a column's neighbour has to beat; −∞: not wanted
    if row != column:
        for c in range(max(0, start - column), min(n_columns, stop - column)):
            worst[c] = distances[column + c - start, last]
    for first in range(0, height, _GROUP):
        n_rows = min(_GROUP, height - first)
        for r in range(n_rows):
            for d in range(width):
                group[r * depth + d] = unit[row + first + r, d]
        dot_block(group, panel, depth, block)
        for r in range(n_rows):
            i = row + first + r
            line = block[r * BLOCK : r * BLOCK + n_columns]
            _keep(line, i, column, start, stop, worst, indices, distances)


@njit(nogil=True, cache=True)
def _keep(
    line: NDArray[np.float32],
    i: int,
    column: int,
    start: int,
    stop: int,
    worst: NDArray[np.float32],
    indices: NDArray[np.int32],
    distances: NDArray[np.float32],
) -> None:
    last = distances.shape[1] - 1
    limit = distances[i - start, last] if start <= i < stop else -np.float32(np.inf)
    for begin in range(0, line.shape[0], _CHUNK):
        end = min(begin + _CHUNK, line.shape[0])
        candidates = 0
        for c in range(begin, end):
            distance = _ONE - line[c]
            candidates += (distance <= limit) | (distance <= worst[c])
        if candidates == 0:
            continue
        for c in range(begin, end):
            if not line[c] > _ZERO or i == column + c:
                continue
            distance = max(_ONE - line[c], _ZERO)  # rounding may put a cosine a little above 1
            if distance <= limit:
                _insert(distance, column + c, indices[i - start], distances[i - start])
                limit = distances[i - start, last]
            if distance <= worst[c]:
                place = column + c - start
                _insert(distance, i, indices[place], distances[place])
                worst[c] = distances[place, last]


@njit(nogil=True, cache=True)
def _insert(distance: np.float32, index: int, indices: NDArray[np.int32], distances: NDArray[np.float32]) -> None:
    # kept in order of (distance, index); what comes after the last one is dropped
    place = distances.shape[0] - 1
    if distance == distances[place] and index > indices[place] >= 0:
        return
    while place > 0 and (
        distances[place - 1] > distance or (distances[place - 1] == distance and indices[place - 1] > index)
    ):
        distances[place] = distances[place - 1]
        indices[place] = indices[place - 1]
        place -= 1
    distances[place] = distance
    indices[place] = index
