"""Approximate neighbours by nearest-neighbour descent, and what any approximate search is worth."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.checks import array
from lloki_atlas.kernels.hashing import mix
from lloki_atlas.kernels.neighbors import Neighbors, merge_neighbors, nearest_rows, re_rank

N_SAMPLED = 1000
_SAMPLE, _DESCENT = 21, 22  # words of their random streams
_SMALL = 2  # below this many times k + 1 rows the exact search is the better one


def descent_neighbors(rows: ArrayLike, *, n_neighbors: int, key: int) -> Neighbors:
    """Find most of the nearest other rows by cosine: pynndescent's candidates, ranked exactly.

    One thread and a keyed seed, so that the same rows give the same neighbours. What is no neighbour for the exact
    search (a similarity ≤ 0, a row without a direction) is none here.

    Parameters
    ----------
    rows
        `(n, d)` float32, all in memory; the index needs about 16 bytes an edge of 2 k neighbours on top.
    n_neighbors
        Number of neighbours k.
    key
        Key of the slice.

    Returns
    -------
    Neighbors
        `(n, k)`, in order of distance, then index.

    Raises
    ------
    InputError
        On a wrong shape, type or k.
    """
    given = array(rows, np.float32, name="rows", shape=(None, None))
    if n_neighbors < 1:
        raise InputError(f"n_neighbors is {n_neighbors}: it has to be at least 1")
    usable = np.flatnonzero(np.isfinite(given).all(axis=1) & (given != 0).any(axis=1)).astype(np.int32)
    if len(usable) <= _SMALL * (n_neighbors + 1):
        candidates = np.broadcast_to(usable, (len(given), len(usable)))
    else:
        candidates = np.full((len(given), n_neighbors + 1), -1, dtype=np.int32)
        candidates[usable] = _descend(given[usable], n_neighbors + 1, key, usable)
    return re_rank(given, candidates, n_neighbors=n_neighbors)


def _descend(rows: NDArray[np.float32], k: int, key: int, names: NDArray[np.int32]) -> NDArray[np.int32]:
    from pynndescent import NNDescent  # half a second to import, and few need it

    seed = np.random.RandomState(mix(key, _DESCENT) % 2**32)
    found = NNDescent(rows, metric="cosine", n_neighbors=k, random_state=seed, n_jobs=1).neighbor_graph[0]
    return np.where(found >= 0, names[found], -1).astype(np.int32)


def measured_recall(found: Neighbors, rows: Any, *, key: int) -> float:
    """Return recall@k on a keyed sample of rows: the share of their exact neighbours that were found.

    A neighbour at the same distance as the last exact one counts as found: which of equals is kept is no loss.

    Parameters
    ----------
    found
        `(n, k)` neighbours.
    rows
        `(n, d)` float32, an array or anything that is sliced like one.
    key
        Key of the slice.

    Returns
    -------
    float
        1 when no sampled row has a neighbour.
    """
    n, k = found.indices.shape
    if n == 0:
        return 1.0
    sampled = np.unique([mix(key, _SAMPLE, draw) % n for draw in range(min(N_SAMPLED, n))])
    queries = np.concatenate([np.asarray(rows[int(i) : int(i) + 1]) for i in sampled])
    exact = _nearest_others(queries, sampled, rows, k)
    hits = total = 0
    for place, i in enumerate(sampled):
        there = exact.indices[place] >= 0
        limit = exact.distances[place][there][-1:]
        total += int(there.sum())
        hits += int((found.distances[i] <= limit + 1e-6).sum()) if limit.size else 0
    return hits / total if total else 1.0


def _nearest_others(queries: NDArray[np.float32], names: NDArray[Any], rows: Any, k: int) -> Neighbors:
    n, best = rows.shape[0], None
    for start in range(0, n, 65536):
        part = np.asarray(rows[start : min(start + 65536, n)], dtype=np.float32)
        near = nearest_rows(queries, part, n_neighbors=k + 1)
        shifted = Neighbors(np.where(near.indices >= 0, near.indices + start, -1).astype(np.int32), near.distances)
        best = shifted if best is None else merge_neighbors(best, shifted, n_neighbors=k + 1)
    assert best is not None
    own = (best.indices == names[:, None]) | (best.distances >= 1.0)  # itself, and what is no neighbour
    indices, distances = np.where(own, -1, best.indices).astype(np.int32), np.where(own, np.inf, best.distances)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return Neighbors(
        np.take_along_axis(indices, order, axis=1), np.take_along_axis(distances, order, axis=1).astype(np.float32)
    )
