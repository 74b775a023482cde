"""Mutual nearest neighbours across platforms, by cosine: one product for each pair of platforms."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lloki_atlas.kernels.selection import mutual_entries, row_floors
from lloki_atlas.models.workers import Each, in_turn, parts

Index = NDArray[np.int64]
# cosines that are held at once, unless a single pair of platforms has more
MAX_COSINES = 2**23


class MutualNeighbors(NamedTuple):
    """All mutual neighbours of two platforms: rows of the first, rows of the second, their cosine, each (m,)."""

    left: Index
    right: Index
    cosines: NDArray[np.float32]


class _Pair(NamedTuple):
    first: int
    second: int
    cosines: torch.Tensor  # (cells of the first, cells of the second)
    floors: NDArray[np.int32]  # (cells of the first,)


def mutual_neighbors(
    rows: torch.Tensor, *, platform: Index, n_neighbors: int, each: Each = in_turn
) -> list[MutualNeighbors]:
    """Mutual nearest neighbours of every pair of platforms.

    Cells i and j of platforms P and Q are mutual neighbours when the cosine of i and j is positive, among the
    `n_neighbors` largest of i over Q, and among those of j over P; ties with the last of them count.

    Parameters
    ----------
    rows : (n, d) float32
    platform : (n,) int64
    n_neighbors : int
        At most all cells of a platform.
    each : Each
        What runs the parts.

    Returns
    -------
    list of MutualNeighbors
        Pairs of platforms in the order of their numbers; in each, ordered by the row of the second, then of the first.
    """
    members = [np.flatnonzero(platform == code) for code in np.unique(platform)]
    if len(members) < 2:
        return []
    directions = each(lambda cells: _directions(rows[torch.from_numpy(cells)]), members)

    def compare(task: tuple[_Pair, slice]) -> None:
        pair, part = task
        torch.mm(directions[pair.first][part], directions[pair.second].T, out=pair.cosines[part])
        row_floors(pair.cosines[part].numpy().view(np.int32), n_neighbors, pair.floors[part])

    def select(task: tuple[_Pair, slice]) -> MutualNeighbors:
        pair, part = task
        cosines = pair.cosines.numpy()
        left, right = mutual_entries(cosines.view(np.int32), pair.floors, n_neighbors, part.start, part.stop)
        return MutualNeighbors(members[pair.first][left], members[pair.second][right], cosines[left, right])

    found = []
    for batch in _batches([len(cells) for cells in members]):
        each(compare, [(pair, part) for pair in batch for part in parts(pair.cosines.shape[0])])
        selected = each(select, [(pair, part) for pair in batch for part in parts(pair.cosines.shape[1])])
        for pair in batch:
            n_parts = len(parts(pair.cosines.shape[1]))
            found.append(MutualNeighbors(*(np.concatenate(column) for column in zip(*selected[:n_parts], strict=True))))
            selected = selected[n_parts:]
    return found


def _batches(sizes: list[int]) -> Iterator[list[_Pair]]:
    """Yield pairs of platforms whose cosines fit into a buffer together; the next ones overwrite it."""
    pairs = list(itertools.combinations(range(len(sizes)), 2))
    areas = [sizes[first] * sizes[second] for first, second in pairs]
    buffer = torch.empty(min(sum(areas), max(MAX_COSINES, *areas)))
    batch: list[_Pair] = []
    used = 0
    for (first, second), area in zip(pairs, areas, strict=True):
        if used + area > len(buffer):
            yield batch
            batch, used = [], 0
        cosines = buffer[used : used + area].view(sizes[first], sizes[second])
        batch.append(_Pair(first, second, cosines, np.empty(sizes[first], np.int32)))
        used += area
    yield batch


def _directions(rows: torch.Tensor) -> torch.Tensor:
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / norms.clamp(min=torch.finfo(rows.dtype).tiny)
