"""The largest numbers of a row, found by bisection: no row is sorted or moved.

A key is a float32 read as an int32, which keeps the order of numbers that are not negative and puts every negative one
below them. How many keys reach a floor is counted in a few vector instructions; the floor is halved in until the count
is right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lloki_atlas.kernels.edges import squared_distance

Keys = NDArray[np.int32]
TILE = 32  # columns that are turned into rows together
_ONE = np.int32(1)
_INFINITY = np.int32(0x7F800000)
# squared distances below this share of the squared norm are recomputed from differences: cancellation has eaten them
CANCELLED = np.float32(1e-2)
# the key of the smallest normal number
SMALLEST_POSITIVE = np.int32(0x00800000)


@njit(nogil=True, cache=True)
def row_floors(keys: Keys, k: int, floors: Keys) -> None:
    """Write the key that the `k` largest positive numbers of each row reach, ties with the last included, in-place.

    `keys` (n, m), `floors` (n,). Every positive number reaches the floor of a row that has at most `k`.
    """
    for i in range(keys.shape[0]):
        floors[i] = _floor(keys[i], k, SMALLEST_POSITIVE)


@njit(nogil=True, cache=True)
def mutual_entries(
    keys: Keys, floors: Keys, k: int, start: int, stop: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Entries of columns `start` to `stop` that are among the `k` largest of their column and reach their row's floor.

    Parameters
    ----------
    keys : (n, m) int32
    floors : (n,) int32
        Of the rows.
    k, start, stop : int

    Returns
    -------
    rows, columns : (n_found,) int32
        Ordered by column, then row.
    """
    n = keys.shape[0]
    turned = np.empty((TILE, n), dtype=np.int32)
    size = (stop - start) * min(k, n) + 1
    rows, columns = np.empty(size, dtype=np.int32), np.empty(size, dtype=np.int32)
    n_found = 0
    for first in range(start, stop, TILE):
        width = min(TILE, stop - first)
        _turn(keys, first, width, turned)
        for c in range(width):
            floor = _floor(turned[c], k, SMALLEST_POSITIVE)
            needed = n_found + _count(turned[c], floor) + 1
            if needed > len(rows):  # ties
                rows, columns = _longer(rows, 2 * needed), _longer(columns, 2 * needed)
            n_new = _list_entries(turned[c], floor, floors, rows[n_found:])
            columns[n_found : n_found + n_new] = first + c
            n_found += n_new
    return rows[:n_found], columns[:n_found]


@njit(nogil=True, cache=True)
def largest_of_each(owners: NDArray[Any], values: NDArray[Any], n: int) -> NDArray[np.int64]:
    """Position in `values` of the largest one of each of `n` owners, the first on a tie, -1 where there is none."""
    best = np.full(n, -1, dtype=np.int64)
    for place in range(len(owners)):
        owner = owners[place]
        if best[owner] < 0 or values[place] > values[best[owner]]:
            best[owner] = place
    return best


@njit(nogil=True, cache=True)
def nearest_unlike(
    products: NDArray[np.float32],
    squares: NDArray[np.float32],
    own: NDArray[np.int64],
    labels: NDArray[np.int64],
    nearest: NDArray[np.int64],
) -> None:
    """Write the nearest (Euclidean) column of another label for each row, -1 where there is none, in-place.

    Parameters
    ----------
    products : (r, n) float32
        Inner products of rows and columns.
    squares : (n,) float32
        Inner product of each column with itself.
    own : (r,) int64
        Labels of the rows.
    labels : (n,) int64
        Labels of the columns.
    nearest : (r,) int64
        Of equally near ones the first.
    """
    for i in range(products.shape[0]):
        found, least = -1, np.float32(np.inf)
        for j in range(products.shape[1]):
            if labels[j] != own[i]:
                beyond = squares[j] - np.float32(2) * products[i, j]  # of the squared distance what depends on j
                if beyond < least:
                    found, least = j, beyond
        nearest[i] = found


@njit(nogil=True, cache=True)
def nearest_others(
    rows: NDArray[np.float32],
    products: NDArray[np.float32],
    squares: NDArray[np.float32],
    first: int,
    nearest: NDArray[np.int64],
    distances: NDArray[np.float32],
) -> None:
    """Write which rows are nearest (Euclidean) to rows `first`, `first` + 1, ..., themselves excluded, in-place.

    Parameters
    ----------
    rows : (n, d) float32
    products : (r, n) float32
        Inner products of rows from `first` on with all.
    squares : (n,) float32
        Inner product of each row with itself.
    first : int
    nearest : (r, k) int64
        k less than n; in no particular order; of equally near ones the first.
    distances : (r, k) float32
    """
    n, k = products.shape[1], nearest.shape[1]
    squared = np.empty(n, dtype=np.float32)
    keys, found = np.empty(n, dtype=np.int32), np.empty(n + 1, dtype=np.int32)
    for i in range(products.shape[0]):
        own = squares[first + i]
        for j in range(n):
            squared[j] = max(own + squares[j] - np.float32(2) * products[i, j], np.float32(0))
        numbers = squared.view(np.int32)
        for j in range(n):
            keys[j] = _INFINITY - numbers[j]  # the nearest is the largest
        keys[first + i] = np.int32(-1)
        nearest[i] = first + i  # stays where distances overflow
        floor = _floor(keys, k, np.int32(0))
        n_found = _list_from(keys, floor, found)
        if n_found > k:  # ties: what is nearer, then the first of the others
            n_found = _list_from(keys, np.int32(floor + _ONE), found)
            for j in range(n):
                if n_found < k and keys[j] == floor:
                    found[n_found] = j
                    n_found += 1
        nearest[i, :n_found] = found[:n_found]
        for place in range(k):
            j = nearest[i, place]
            if squared[j] < CANCELLED * own:
                squared[j] = squared_distance(rows, first + i, j)
            distances[i, place] = np.sqrt(squared[j])


@njit(nogil=True, cache=True)
def _floor(keys: Keys, k: int, lowest: np.int32) -> np.int32:
    # more than k keys reach `low`, fewer than k reach `high`; bisection takes turns with the rule of three
    smallest, largest = _ends(keys)
    low, high = max(smallest, lowest), np.int32(largest + _ONE)
    n_low, n_high = _count(keys, low), np.int32(0)
    if n_low <= k:
        return lowest
    halve = True
    while high - low > 1:
        share = 0.5 if halve else (n_low - k) / (n_low - n_high)
        middle = min(max(np.int32(low + np.int32(share * (high - low))), np.int32(low + _ONE)), np.int32(high - _ONE))
        halve = not halve
        n = _count(keys, middle)
        if n == k:
            return middle
        if n > k:
            low, n_low = middle, n
        else:
            high, n_high = middle, n
    return low


@njit(nogil=True, cache=True)
def _count(keys: Keys, floor: np.int32) -> np.int32:
    n = np.int32(0)
    for i in range(keys.shape[0]):
        n = np.int32(n + np.int32(keys[i] >= floor))
    return n


@njit(nogil=True, cache=True)
def _ends(keys: Keys) -> tuple[np.int32, np.int32]:
    smallest = largest = keys[0]
    for i in range(keys.shape[0]):
        smallest, largest = min(smallest, keys[i]), max(largest, keys[i])
    return smallest, largest


@njit(nogil=True, cache=True)
def _list_entries(line: Keys, floor: np.int32, floors: Keys, found: NDArray[np.int32]) -> int:
    # every place is written, and kept only where the count moves on: no branch to guess
    n = 0
    for i in range(line.shape[0]):
        found[n] = i
        n += (line[i] >= floor) & (line[i] >= floors[i])
    return n


@njit(nogil=True, cache=True)
def _list_from(keys: Keys, floor: np.int32, found: NDArray[np.int32]) -> int:
    n = 0
    for i in range(keys.shape[0]):
        found[n] = i
        n += keys[i] >= floor
    return n


@njit(nogil=True, cache=True)
def _turn(keys: Keys, first: int, width: int, turned: Keys) -> None:
    for i in range(keys.shape[0]):
        for c in range(width):
            turned[c, i] = keys[i, first + c]


@njit(nogil=True, cache=True)
def _longer(values: NDArray[np.int32], size: int) -> NDArray[np.int32]:
    longer = np.empty(size, dtype=np.int32)
    longer[: len(values)] = values
    return longer
