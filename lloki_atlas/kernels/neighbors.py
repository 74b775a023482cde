"""Exact nearest neighbours by blocks: bounded memory, a fixed order of summation, and one rule for ties.

A distance has the same bits wherever its rows stand, see `products`.
Candidates are ranked by their float32 distance as it is stored, then by index. Partial searches therefore merge
into exactly the whole one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.candidates import no_keys, rank_candidates, unpack_keys
from lloki_atlas.kernels.checks import array
from lloki_atlas.kernels.products import BLOCK, ROWS, pack, product_block
from lloki_atlas.kernels.self_search import search_self
from lloki_atlas.kernels.threads import over_rows
from lloki_atlas.kernels.unit import padded_rows, unit_rows

_CHUNK = 64  # columns tested at once for any candidate
_COSINE, _EUCLIDEAN = 0, 1
_ZERO, _ONE = np.float32(0), np.float32(1)


@dataclass(frozen=True)
class Neighbors:
    """Nearest rows of each row, nearest first.

    `indices` is `(n, k)` int32, −1 where there are fewer than k; `distances` is `(n, k)` float32, infinite there.
    """

    indices: NDArray[np.int32]
    distances: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.indices.ndim != 2 or self.indices.shape != self.distances.shape:
            raise InputError(
                f"indices {self.indices.shape} and distances {self.distances.shape}: give two (n, k) arrays"
            )
        if self.indices.dtype != np.int32 or self.distances.dtype != np.float32:
            raise InputError(f"types are {self.indices.dtype}, {self.distances.dtype}: give int32 and float32")
        missing = self.indices < 0
        if not np.array_equal(missing, np.isinf(self.distances)) or (self.indices < -1).any():
            raise InputError("a missing neighbour has index -1 and infinite distance, both or none")
        if np.isnan(self.distances).any() or (self.distances[:, 1:] < self.distances[:, :-1]).any():
            raise InputError("distances of a row have to be in ascending order")

    @property
    def n_neighbors(self) -> int:
        """Number of columns k."""
        return int(self.indices.shape[1])


def nearest_neighbors(
    rows: Any, *, n_neighbors: int, start: int = 0, stop: int | None = None, n_threads: int = 1
) -> Neighbors:
    """Find the nearest other rows by cosine distance 1 − cos, exactly.

    A row is not its own neighbour, rows of similarity ≤ 0 are nobody's neighbours, and rows that are all zero or
    hold a NaN have none. Ties go to the smaller index. Any split into start … stop gives the same bytes.
    Memory: two slabs of rows (`self_search.SLAB_BYTES` each) beside the answer, whatever the number of rows.

    Parameters
    ----------
    rows
        `(n, d)` float32: an array, or anything with a `shape` that is sliced like one and read slab by slab, such as
        a Zarr array.
    n_neighbors
        Number of neighbours k; may exceed n − 1.
    start, stop
        The rows to search for; all by default. Over all rows each pair is multiplied once.
    n_threads
        Threads that share the work; they change no bit.

    Returns
    -------
    Neighbors
        `(stop − start, k)`, indices into `rows`.

    Raises
    ------
    InputError
        On a wrong shape, type, range or k.
    """
    lazy = hasattr(rows, "shape") and hasattr(rows, "__getitem__") and not isinstance(rows, np.ndarray)
    given = rows if lazy and len(rows.shape) == 2 else array(rows, np.float32, name="rows", shape=(None, None))
    n, d = given.shape
    stop = n if stop is None else stop
    if not 0 <= start <= stop <= n:
        raise InputError(f"rows {start} to {stop} are not in 0 to {n}: give a range of rows")
    _check_k(n_neighbors)
    if n_threads < 1:
        raise InputError(f"n_threads is {n_threads}: it has to be at least 1")

    def read(first: int, last: int) -> NDArray[np.float32]:
        return array(given[first:last], np.float32, name="rows", shape=(last - first, d))

    found = search_self(read, n, d, start=start, stop=stop, n_neighbors=n_neighbors, n_threads=n_threads)
    return Neighbors(*unpack_keys(found.keys))


def nearest_rows(
    queries: ArrayLike, rows: ArrayLike, *, n_neighbors: int, metric: Literal["cosine", "euclidean"] = "cosine"
) -> Neighbors:
    """Find the nearest rows of each query, exactly; ties go to the smaller index.

    Rows and queries with a NaN, and for `cosine` all-zero ones, have no neighbours and are nobody's.

    Parameters
    ----------
    queries
        `(m, d)` float32.
    rows
        `(n, d)` float32.
    n_neighbors
        Number of neighbours k; may exceed n.
    metric
        `cosine`: 1 − cos, from 0 to 2; `euclidean`: the square root of the sum of squared differences.

    Returns
    -------
    Neighbors
        `(m, k)`, indices into `rows`.

    Raises
    ------
    InputError
        On a wrong shape, type, metric or k.
    """
    right = array(rows, np.float32, name="rows", shape=(None, None))
    left = array(queries, np.float32, name="queries", shape=(None, right.shape[1]))
    if metric == "euclidean":
        return _neighbors(padded_rows(left, ROWS), right, _EUCLIDEAN, n_neighbors)
    if metric != "cosine":
        raise InputError(f"unknown metric {metric!r}: choose 'cosine' or 'euclidean'")
    return _neighbors(unit_rows(left, padding=ROWS), unit_rows(right), _COSINE, n_neighbors)


def merge_neighbors(a: Neighbors, b: Neighbors, *, n_neighbors: int) -> Neighbors:
    """Combine two partial searches of the same queries whose indices already count the same rows.

    Parameters
    ----------
    a, b
        `(n, k_a)` and `(n, k_b)`, each in order of distance, then index. A row found by both is kept once.
    n_neighbors
        Number of neighbours to keep.

    Returns
    -------
    Neighbors
        `(n, n_neighbors)`, by the same tie rule.

    Raises
    ------
    InputError
        If the numbers of queries differ.
    """
    _check_k(n_neighbors)
    if a.indices.shape[0] != b.indices.shape[0]:
        raise InputError(f"{a.indices.shape[0]} and {b.indices.shape[0]} queries: merge searches of the same queries")
    parts = [
        array(values, kind, name="neighbors", shape=(None, None))
        for part in (a, b)
        for values, kind in ((part.indices, np.int32), (part.distances, np.float32))
    ]
    indices, distances = _missing(a.indices.shape[0], n_neighbors)
    _merge(*parts, indices, distances)
    return Neighbors(indices, distances)


def re_rank(rows: ArrayLike, candidates: ArrayLike, *, n_neighbors: int, n_threads: int = 1) -> Neighbors:
    """Rank given candidates of each row by their exact cosine distances.

    Parameters
    ----------
    rows
        `(n, d)` float32.
    candidates
        `(n, m)` int32 indices into `rows`, −1 for none; a row's own index is passed over.
    n_neighbors
        Number of neighbours k to keep.
    n_threads
        Threads; they change no bit.

    Returns
    -------
    Neighbors
        `(n, k)`; similarities are summed as in `nearest_neighbors`, with the same bits.

    Raises
    ------
    InputError
        On a wrong shape or type, or an index outside the rows.
    """
    given = array(rows, np.float32, name="rows", shape=(None, None))
    named = array(candidates, np.int32, name="candidates", shape=(len(given), None))
    _check_k(n_neighbors)
    if named.size and int(named.max()) >= len(given):
        raise InputError(f"a candidate lies outside 0 to {len(given) - 1}: give indices of rows")
    keys = no_keys(len(given), n_neighbors)
    over_rows(len(given), n_threads, partial(rank_candidates, unit_rows(given), named, keys))
    return Neighbors(*unpack_keys(keys))


def _neighbors(queries: NDArray[np.float32], rows: NDArray[np.float32], metric: int, n_neighbors: int) -> Neighbors:
    _check_k(n_neighbors)
    indices, distances = _missing(queries.shape[0] - ROWS, n_neighbors)
    _search(queries, rows, metric, indices, distances)
    return Neighbors(indices, distances)


def _missing(n: int, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    return np.full((n, k), -1, dtype=np.int32), np.full((n, k), np.inf, dtype=np.float32)


def _check_k(n_neighbors: int) -> None:
    if n_neighbors < 1:
        raise InputError(f"n_neighbors is {n_neighbors}: it has to be at least 1")


@njit(nogil=True, cache=True)
def _search(
    queries: NDArray[Any],
    rows: NDArray[Any],
    metric: int,
    indices: NDArray[np.int32],
    distances: NDArray[np.float32],
) -> None:
    m, n = queries.shape[0] - ROWS, rows.shape[0]
    panel = np.empty(rows.shape[1] * BLOCK, dtype=np.float32)
    block = np.empty((BLOCK + ROWS, BLOCK), dtype=np.float32)
    for column in range(0, n, BLOCK):
        width = min(BLOCK, n - column)
        pack(rows, column, width, panel)
        for row in range(0, m, BLOCK):
            height = min(BLOCK, m - row)
            product_block(queries, row, height, panel, block, metric == _EUCLIDEAN)
            _to_distances(block[:height], metric)
            for r in range(height):
                _keep_nearest(block[r, :width], column, indices[row + r], distances[row + r])


@njit(nogil=True, cache=True)
def _to_distances(block: NDArray[np.float32], metric: int) -> None:
    if metric == _EUCLIDEAN:
        for r in range(block.shape[0]):
            for c in range(BLOCK):
                block[r, c] = np.sqrt(block[r, c])
    else:
        for r in range(block.shape[0]):
            for c in range(BLOCK):
                distance = _ONE - block[r, c]
                block[r, c] = _ZERO if distance < _ZERO else distance


@njit(nogil=True, cache=True)
def _keep_nearest(
    values: NDArray[np.float32], column: int, indices: NDArray[np.int32], distances: NDArray[np.float32]
) -> None:
    # columns come in ascending order, so an equal distance never displaces what is there: ties to the smaller index
    last = distances.shape[0] - 1
    for begin in range(0, values.shape[0], _CHUNK):
        chunk = values[begin : min(begin + _CHUNK, values.shape[0])]
        candidates = 0
        for c in range(chunk.shape[0]):
            candidates += chunk[c] < distances[last]
        if candidates == 0:
            continue
        for c in range(chunk.shape[0]):
            distance = chunk[c]
            if distance < distances[last]:
                place = last
                while place > 0 and distances[place - 1] > distance:
                    distances[place] = distances[place - 1]
                    indices[place] = indices[place - 1]
                    place -= 1
                distances[place] = distance
                indices[place] = column + begin + c


@njit(nogil=True, cache=True)
def _merge(
    indices_a: NDArray[Any],
    distances_a: NDArray[Any],
    indices_b: NDArray[Any],
    distances_b: NDArray[Any],
    indices: NDArray[np.int32],
    distances: NDArray[np.float32],
) -> None:
    size_a, size_b, k = indices_a.shape[1], indices_b.shape[1], indices.shape[1]
    for i in range(indices.shape[0]):
        a, b, kept = 0, 0, 0
        while kept < k:
            while a < size_a and indices_a[i, a] < 0:
                a += 1
            while b < size_b and indices_b[i, b] < 0:
                b += 1
            if a == size_a and b == size_b:
                break
            take_a = b == size_b or (
                a < size_a
                and (
                    distances_a[i, a] < distances_b[i, b]
                    or (distances_a[i, a] == distances_b[i, b] and indices_a[i, a] <= indices_b[i, b])
                )
            )
            index = indices_a[i, a] if take_a else indices_b[i, b]
            distance = distances_a[i, a] if take_a else distances_b[i, b]
            if take_a:
                a += 1
            else:
                b += 1
            known = False
            for c in range(kept):
                known = known or indices[i, c] == index
            if not known:
                indices[i, kept], distances[i, kept] = index, distance
                kept += 1
