"""Exact nearest neighbours by blocks: bounded memory, a fixed order of summation, and one rule for ties.

Rows are compared with blocks of 256 rows that lie transposed in cache, so the inner loop runs over the block's
columns while the sum over dimensions keeps its order: a distance has the same bits wherever the row stands.
Candidates are ranked by their float32 distance as it is stored, then by index. Partial searches therefore merge
into exactly the whole one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.checks import array

_BLOCK = 256  # columns of a block; 4 rows by 256 columns of partial sums stay in the first-level cache
_CHUNK = 64  # columns tested at once for any candidate
_COSINE, _POSITIVE_COSINE, _EUCLIDEAN = 0, 1, 2
_ZERO, _ONE, _INF = np.float32(0), np.float32(1), np.float32(np.inf)


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


def nearest_neighbors(rows: ArrayLike, *, n_neighbors: int, start: int = 0, stop: int | None = None) -> Neighbors:
    """Find the nearest other rows by cosine distance 1 − cos, exactly.

    A row is not its own neighbour, rows of similarity ≤ 0 are nobody's neighbours, and rows that are all zero or
    hold a NaN have none. Ties go to the smaller index. Any split into start … stop gives the same bytes.

    Parameters
    ----------
    rows
        `(n, d)` float32.
    n_neighbors
        Number of neighbours k; may exceed n − 1.
    start, stop
        The rows to search for; all by default.

    Returns
    -------
    Neighbors
        `(stop − start, k)`, indices into `rows`.

    Raises
    ------
    InputError
        On a wrong shape, type, range or k.
    """
    given = array(rows, np.float32, name="rows", shape=(None, None))
    stop = given.shape[0] if stop is None else stop
    if not 0 <= start <= stop <= given.shape[0]:
        raise InputError(f"rows {start} to {stop} are not in 0 to {given.shape[0]}: give a range of rows")
    unit = _unit_rows(given)
    return _neighbors(unit[start:stop], unit, start, _POSITIVE_COSINE, n_neighbors)


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
        return _neighbors(left, right, -1, _EUCLIDEAN, n_neighbors)
    if metric != "cosine":
        raise InputError(f"unknown metric {metric!r}: choose 'cosine' or 'euclidean'")
    return _neighbors(_unit_rows(left), _unit_rows(right), -1, _COSINE, n_neighbors)


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


def _neighbors(
    queries: NDArray[np.float32], rows: NDArray[np.float32], first: int, metric: int, n_neighbors: int
) -> Neighbors:
    _check_k(n_neighbors)
    indices, distances = _missing(queries.shape[0], n_neighbors)
    for values in (queries, rows):
        values.flags.writeable = False
    _search(queries, rows, first, metric, indices, distances)
    return Neighbors(indices, distances)


def _missing(n: int, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    return np.full((n, k), -1, dtype=np.int32), np.full((n, k), np.inf, dtype=np.float32)


def _check_k(n_neighbors: int) -> None:
    if n_neighbors < 1:
        raise InputError(f"n_neighbors is {n_neighbors}: it has to be at least 1")


@njit(nogil=True, cache=True)
def _unit_rows(rows: NDArray[Any]) -> NDArray[np.float32]:
    # a row without a direction becomes NaN, which no comparison admits as a neighbour
    n, d = rows.shape
    unit = np.empty((n, d), dtype=np.float32)
    for i in range(n):
        squares = 0.0
        for c in range(d):
            squares += np.float64(rows[i, c]) * np.float64(rows[i, c])
        norm = math.sqrt(squares) if 0.0 < squares < np.inf else np.nan
        for c in range(d):
            unit[i, c] = rows[i, c] / norm
    return unit


@njit(nogil=True, cache=True)
def _search(
    queries: NDArray[Any],
    rows: NDArray[Any],
    first: int,  # row number of query 0 where queries are rows themselves, else −1
    metric: int,
    indices: NDArray[np.int32],
    distances: NDArray[np.float32],
) -> None:
    m, n = queries.shape[0], rows.shape[0]
    depth = (queries.shape[1] + 3) // 4 * 4  # zeros added to a sum change no bit of it
    panel = np.zeros(depth * _BLOCK, dtype=np.float32)
    group = np.zeros(4 * depth, dtype=np.float32)
    block = np.empty(4 * _BLOCK, dtype=np.float32)
    for column in range(0, n, _BLOCK):
        width = min(_BLOCK, n - column)
        _pack(rows, column, width, panel)
        for row in range(0, m, 4):
            height = min(4, m - row)
            for r in range(height):
                for d in range(queries.shape[1]):
                    group[r * depth + d] = queries[row + r, d]
            if metric == _EUCLIDEAN:
                _square_block(group, panel, depth, block)
            else:
                _dot_block(group, panel, depth, block)
            _to_distances(block, metric)
            for r in range(height):
                own = first + row + r - column
                if first >= 0 and 0 <= own < width:
                    block[r * _BLOCK + own] = _INF
                values = block[r * _BLOCK : r * _BLOCK + width]
                _keep_nearest(values, column, indices[row + r], distances[row + r])


@njit(nogil=True, cache=True)
def _pack(rows: NDArray[Any], column: int, width: int, panel: NDArray[np.float32]) -> None:
    for d in range(rows.shape[1]):
        for c in range(width):
            panel[d * _BLOCK + c] = rows[column + c, d]


@njit(nogil=True, cache=True)
def _dot_block(group: NDArray[np.float32], panel: NDArray[np.float32], depth: int, block: NDArray[np.float32]) -> None:
    # flat arrays and constant strides let the compiler see that nothing overlaps, and vectorise over c
    for c in range(block.shape[0]):
        block[c] = _ZERO
    q, r, s, t = group[:depth], group[depth : 2 * depth], group[2 * depth : 3 * depth], group[3 * depth :]
    for d in range(0, depth, 4):
        q0, q1, q2, q3 = q[d], q[d + 1], q[d + 2], q[d + 3]
        r0, r1, r2, r3 = r[d], r[d + 1], r[d + 2], r[d + 3]
        s0, s1, s2, s3 = s[d], s[d + 1], s[d + 2], s[d + 3]
        t0, t1, t2, t3 = t[d], t[d + 1], t[d + 2], t[d + 3]
        p = panel[d * _BLOCK : (d + 4) * _BLOCK]
        for c in range(_BLOCK):
            p0, p1, p2, p3 = p[c], p[c + _BLOCK], p[c + 2 * _BLOCK], p[c + 3 * _BLOCK]
            block[c] = (((block[c] + q0 * p0) + q1 * p1) + q2 * p2) + q3 * p3
            block[c + _BLOCK] = (((block[c + _BLOCK] + r0 * p0) + r1 * p1) + r2 * p2) + r3 * p3
            block[c + 2 * _BLOCK] = (((block[c + 2 * _BLOCK] + s0 * p0) + s1 * p1) + s2 * p2) + s3 * p3
            block[c + 3 * _BLOCK] = (((block[c + 3 * _BLOCK] + t0 * p0) + t1 * p1) + t2 * p2) + t3 * p3


@njit(nogil=True, cache=True)
def _square_block(
    group: NDArray[np.float32], panel: NDArray[np.float32], depth: int, block: NDArray[np.float32]
) -> None:
    for c in range(block.shape[0]):
        block[c] = _ZERO
    q, r, s, t = group[:depth], group[depth : 2 * depth], group[2 * depth : 3 * depth], group[3 * depth :]
    for d in range(depth):
        q0, r0, s0, t0 = q[d], r[d], s[d], t[d]
        p = panel[d * _BLOCK : (d + 1) * _BLOCK]
        for c in range(_BLOCK):
            block[c] += (q0 - p[c]) * (q0 - p[c])
            block[c + _BLOCK] += (r0 - p[c]) * (r0 - p[c])
            block[c + 2 * _BLOCK] += (s0 - p[c]) * (s0 - p[c])
            block[c + 3 * _BLOCK] += (t0 - p[c]) * (t0 - p[c])


@njit(nogil=True, cache=True)
def _to_distances(block: NDArray[np.float32], metric: int) -> None:
    if metric == _EUCLIDEAN:
        for c in range(block.shape[0]):
            block[c] = np.sqrt(block[c])
    elif metric == _POSITIVE_COSINE:
        for c in range(block.shape[0]):
            # rounding may put a cosine a little above 1
            block[c] = max(_ONE - block[c], _ZERO) if block[c] > _ZERO else _INF
    else:
        for c in range(block.shape[0]):
            distance = _ONE - block[c]
            block[c] = _ZERO if distance < _ZERO else distance


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
