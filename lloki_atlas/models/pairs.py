"""Which cells of a chunk pull and push each other: positives, negatives, neighbours to conserve, chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.edges import edge_distances
from lloki_atlas.kernels.selection import largest_of_each, nearest_others, nearest_unlike
from lloki_atlas.models.mutual import Index, MutualNeighbors, mutual_neighbors
from lloki_atlas.models.workers import Each, in_turn, parts

Pairing = Literal["symmetric", "published"]
# fewer cells of a platform in a chunk than this leave too few neighbours to choose from
MIN_PLATFORM_CELLS = 50


@dataclass(frozen=True)
class Triplets:
    """Anchor, positive and negative rows of a chunk, each (m,) int64."""

    anchors: Index
    positives: Index
    negatives: Index

    def __post_init__(self) -> None:
        if not len(self.anchors) == len(self.positives) == len(self.negatives):
            raise InputError("triplets need as many positives and negatives as anchors")

    def __len__(self) -> int:
        return len(self.anchors)


def find_triplets(
    latents: torch.Tensor,
    *,
    platform: Index,
    slice_codes: Index,
    n_neighbors: int,
    generator: np.random.Generator,
    labels: Index | None = None,
    pairing: Pairing = "symmetric",
    mutual: Sequence[MutualNeighbors] | None = None,
    each: Each = in_turn,
) -> Triplets:
    """Positives across platforms and negatives within the slice, for the cells of one chunk.

    A positive is the nearest mutual neighbour of the anchor in each other platform.
    A negative is a random cell of the anchor's slice, never the anchor; a slice's only cell is no anchor.
    `published` pairing: the anchor is of the platform with the lower number, and a negative is a random cell of the
    anchor's platform, the anchor included.
    With labels, positives of another label are dropped and the negative is the nearest cell of another label in
    the slice, where there is one; a cell without a label (-1) is treated as if no labels were given.

    Parameters
    ----------
    latents : (n, d) float32
    platform, slice_codes : (n,) int64
    n_neighbors : int
        Neighbours searched in each other platform (cosine), at most all of its cells.
    generator : numpy.random.Generator
        Source of the random negatives; drawn from once for each anchor.
    labels : (n,) int64, optional
    pairing : {"symmetric", "published"}
    mutual : sequence of MutualNeighbors, optional
        Where they are known already, or of another space; those of the latents otherwise.
    each : Each
        What runs the parts.
    """
    if mutual is None:
        mutual = mutual_neighbors(latents, platform=platform, n_neighbors=n_neighbors, each=each)
    anchors, positives = nearest_pairs(mutual, len(platform), labels=labels, both=pairing == "symmetric")
    if pairing == "symmetric":
        sizes = np.unique(slice_codes, return_inverse=True, return_counts=True)
        paired = sizes[2][sizes[1]][anchors] > 1
        anchors, positives = anchors[paired], positives[paired]
        negatives = random_negatives(anchors, groups=slice_codes, generator=generator)
    else:
        negatives = random_negatives(anchors, groups=platform, generator=generator, itself=True)
    if labels is not None:
        hard = hard_negatives(latents, anchors, slice_codes=slice_codes, labels=labels, each=each)
        negatives = np.where(hard >= 0, hard, negatives)
    return Triplets(anchors, positives, negatives)


def nearest_pairs(
    mutual: Sequence[MutualNeighbors], n: int, *, labels: Index | None = None, both: bool = True
) -> tuple[Index, Index]:
    """Nearest mutual neighbour of each cell in each other platform.

    Parameters
    ----------
    mutual : sequence of MutualNeighbors
        One for each pair of platforms.
    n : int
        Cells of the chunk.
    labels : (n,) int64, optional
        Mutual neighbours of different labels are dropped; -1 matches every label.
    both : bool
        Whether cells of the second platform anchor, too.

    Returns
    -------
    anchors, positives : (m,) int64
        Ordered by pair of platforms, direction, then anchor; equal cosines give the smaller row.
    """
    found: list[tuple[Index, Index]] = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    for left, right, cosines in mutual:
        if labels is not None:
            a, b = labels[left], labels[right]
            kept = (a == b) | (a < 0) | (b < 0)
            left, right, cosines = left[kept], right[kept], cosines[kept]
        for anchors, others in ((left, right), (right, left))[: 1 + both]:
            best = largest_of_each(anchors, cosines, n)
            best = best[best >= 0]
            found.append((anchors[best], others[best]))
    return np.concatenate([pair[0] for pair in found]), np.concatenate([pair[1] for pair in found])


def random_negatives(anchors: Index, *, groups: Index, generator: np.random.Generator, itself: bool = False) -> Index:
    """For each anchor a uniformly random other cell of its group.

    Parameters
    ----------
    anchors : (m,) int64
        Cells whose group has at least two cells in the chunk, unless `itself`.
    groups : (n,) int64
        The slice of each cell.
    generator : numpy.random.Generator
    itself : bool
        Whether the anchor is one of the cells that are drawn from.

    Returns
    -------
    (m,) int64
    """
    order = np.argsort(groups, kind="stable")
    _, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    first, size = starts[codes[anchors]], sizes[codes[anchors]]
    if itself:
        drawn = first + generator.integers(0, size)
    else:
        # one of the others: a draw at or after the anchor's own place moves on by one
        drawn = first + generator.integers(0, size - 1)
        drawn += drawn >= place[anchors]
    chosen: Index = order[drawn]
    return chosen


def hard_negatives(
    latents: torch.Tensor, anchors: Index, *, slice_codes: Index, labels: Index, each: Each = in_turn
) -> Index:
    """For each anchor the nearest cell (Euclidean) of another label in its slice; -1 where there is none.

    Parameters
    ----------
    latents : (n, d) float32
    anchors : (m,) int64
    slice_codes, labels : (n,) int64
        Cells without a label (-1) neither have nor are hard negatives.
    each : Each
        What runs the parts.

    Returns
    -------
    (m,) int64
    """
    chosen = np.full(len(labels), -1, np.int64)
    tasks = []
    for code in np.unique(slice_codes[anchors]):
        others = np.flatnonzero((slice_codes == code) & (labels >= 0))
        asked = np.intersect1d(others, anchors)
        tasks += [(asked[part], others) for part in parts(len(asked))]

    def select(task: tuple[Index, Index]) -> None:
        asked, others = task
        left, right = latents[torch.from_numpy(asked)], latents[torch.from_numpy(others)]
        nearest = np.empty(len(asked), np.int64)
        squares = right.square().sum(dim=1)
        nearest_unlike((left @ right.T).numpy(), squares.numpy(), labels[asked], labels[others], nearest)
        chosen[asked] = np.where(nearest >= 0, others[nearest], -1)

    each(select, tasks)
    return chosen[anchors]


def chunk_neighbors(
    embeddings: torch.Tensor, *, groups: Index, n_neighbors: int, each: Each = in_turn
) -> tuple[Index, NDArray[np.float32]]:
    """Nearest cells (Euclidean) of each cell in its own group, itself excluded.

    Parameters
    ----------
    embeddings : (n, d) float32
    groups : (n,) int64
        The slice of each cell.
    n_neighbors : int
    each : Each
        What runs the parts.

    Returns
    -------
    neighbors : (n, k) int64
        In no particular order; -1 where the group has fewer than k + 1 cells.
    distances : (n, k) float32
        Zero where there is no neighbour.
    """
    neighbors = np.full((len(groups), n_neighbors), -1, np.int64)
    distances = np.zeros((len(groups), n_neighbors), np.float32)
    members = [rows for rows in (np.flatnonzero(groups == code) for code in np.unique(groups)) if len(rows) > 1]

    def center(rows: Index) -> tuple[torch.Tensor, torch.Tensor]:
        # around their mean the norms are small, and so is what the expanded square loses
        own = embeddings[torch.from_numpy(rows)]
        own = own - own.mean(dim=0)
        return own, own.square().sum(dim=1)

    centered = each(center, members)

    def select(task: tuple[int, slice]) -> None:
        group, part = task
        rows, (own, squares) = members[group], centered[group]
        k = min(n_neighbors, len(rows) - 1)
        nearest = np.empty((part.stop - part.start, k), np.int64)
        near = np.empty(nearest.shape, np.float32)
        nearest_others(own.numpy(), (own[part] @ own.T).numpy(), squares.numpy(), part.start, nearest, near)
        neighbors[rows[part], :k], distances[rows[part], :k] = rows[nearest], near

    each(select, [(group, part) for group, rows in enumerate(members) for part in parts(len(rows))])
    return neighbors, distances


def in_order(neighbors: Index, distances: NDArray[np.float32]) -> tuple[Index, NDArray[np.float32]]:
    """Neighbours from the nearest to the farthest, ties by row, those that are missing (-1) last.

    Parameters
    ----------
    neighbors : (n, k) int64
    distances : (n, k) float32
    """
    order = np.lexsort((neighbors, np.where(neighbors < 0, np.inf, distances)), axis=1)
    return np.take_along_axis(neighbors, order, axis=1), np.take_along_axis(distances, order, axis=1)


def distant_cells(
    embeddings: NDArray[np.float32],
    *,
    groups: Index,
    n_cells: int,
    generator: np.random.Generator,
    each: Each = in_turn,
) -> tuple[Index, NDArray[np.float32]]:
    """For each cell some uniformly random other cells of its group: most of them are far.

    Parameters
    ----------
    embeddings : (n, d) float32
    groups : (n,) int64
        The slice of each cell.
    n_cells : int
    generator : numpy.random.Generator

    Returns
    -------
    cells : (n, n_cells) int64
        -1 for the only cell of a group.
    distances : (n, n_cells) float32
        Euclidean; zero where there is no other cell.
    """
    cells = np.full((len(groups), n_cells), -1, np.int64)
    sizes = np.unique(groups, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(sizes[2][sizes[1]] > 1)
    for place in range(n_cells):
        cells[rows, place] = random_negatives(rows, groups=groups, generator=generator)
    distances = np.zeros(cells.shape, np.float32)
    own = np.arange(len(groups))
    each(lambda part: edge_distances(embeddings, own, cells, part.start, part.stop, distances), parts(len(groups)))
    return cells, distances


def balanced_chunks(platform: Index, *, chunk_cells: int, generator: np.random.Generator) -> list[Index]:
    """Cut the cells at random into chunks that each hold every platform in proportion.

    Every cell is in a chunk. A chunk has at least min(50, all) cells of each platform: a small platform lends the
    same cells to several chunks, never twice to one.

    Parameters
    ----------
    platform : (n,) int64
    chunk_cells : int
        Cells of a chunk, up to what small platforms add.
    generator : numpy.random.Generator

    Returns
    -------
    list of (about chunk_cells,) int64
        Rows of each chunk, platform by platform.
    """
    n_chunks = -(-len(platform) // chunk_cells)
    parts: list[list[Index]] = [[] for _ in range(n_chunks)]
    for code in np.unique(platform):
        rows = generator.permutation(np.flatnonzero(platform == code))
        bounds = np.arange(n_chunks + 1) * len(rows) // n_chunks
        for part, start, stop in zip(parts, bounds, bounds[1:], strict=False):
            size = max(stop - start, min(len(rows), MIN_PLATFORM_CELLS))
            part.append(rows[(start + np.arange(size)) % len(rows)])
    return [np.concatenate(part) for part in parts]
