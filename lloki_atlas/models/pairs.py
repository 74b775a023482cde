"""Which cells of a chunk pull and push each other: mutual neighbours, negatives, neighbours to conserve, chunks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lloki_atlas.errors import InputError

Index = NDArray[np.int64]
# fewer cells of a platform in a chunk than this leave too few neighbours to choose from
MIN_PLATFORM_CELLS = 50
# squared distances below this share of the squared norms are recomputed from differences: cancellation has eaten them
CANCELLED = 1e-2


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
) -> Triplets:
    """Positives across platforms and negatives within the slice, for the cells of one chunk.

    A positive is the nearest mutual neighbour of the anchor in each other platform.
    A negative is a random cell of the anchor's slice, never the anchor; a slice's only cell is no anchor.
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
    """
    anchors, positives = mutual_pairs(latents, platform=platform, n_neighbors=n_neighbors, labels=labels)
    sizes = np.unique(slice_codes, return_inverse=True, return_counts=True)
    paired = sizes[2][sizes[1]][anchors] > 1
    anchors, positives = anchors[paired], positives[paired]
    negatives = random_negatives(anchors, slice_codes=slice_codes, generator=generator)
    if labels is not None:
        hard = hard_negatives(latents, anchors, slice_codes=slice_codes, labels=labels)
        negatives = np.where(hard >= 0, hard, negatives)
    return Triplets(anchors, positives, negatives)


def mutual_pairs(
    latents: torch.Tensor, *, platform: Index, n_neighbors: int, labels: Index | None = None
) -> tuple[Index, Index]:
    """Nearest mutual neighbour of each cell in each other platform, in both directions.

    Cells i and j of platforms P and Q are mutual neighbours when the cosine of i and j is positive, among the
    `n_neighbors` largest of i over Q, and among those of j over P; ties with the last of them count.

    Parameters
    ----------
    latents : (n, d) float32
    platform : (n,) int64
    n_neighbors : int
    labels : (n,) int64, optional
        Mutual neighbours of different labels are dropped; -1 matches every label.

    Returns
    -------
    anchors, positives : (m,) int64
        Ordered by pair of platforms, then anchor; equal cosines give the smaller row.
    """
    norms = torch.linalg.vector_norm(latents, dim=1, keepdim=True)
    directions = latents / norms.clamp(min=torch.finfo(latents.dtype).tiny)
    groups = [np.flatnonzero(platform == code) for code in np.unique(platform)]
    smallest = np.finfo(np.float32).tiny
    found: list[tuple[Index, Index]] = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    for second, right in enumerate(groups):
        for left in groups[:second]:
            cosines = (directions[left] @ directions[right].T).numpy()
            turned = np.ascontiguousarray(cosines.T)
            mutual = cosines >= np.maximum(_floors(cosines, n_neighbors), smallest)[:, None]
            mutual &= cosines >= _floors(turned, n_neighbors)
            if labels is not None:
                a, b = labels[left][:, None], labels[right][None, :]
                mutual &= (a == b) | (a < 0) | (b < 0)
            cosines *= mutual
            found.append(_nearest(cosines, left, right))
            found.append(_nearest(np.ascontiguousarray(cosines.T), right, left))
    return np.concatenate([pair[0] for pair in found]), np.concatenate([pair[1] for pair in found])


def random_negatives(anchors: Index, *, slice_codes: Index, generator: np.random.Generator) -> Index:
    """For each anchor a uniformly random other cell of its slice.

    Parameters
    ----------
    anchors : (m,) int64
        Cells whose slice has at least two cells in the chunk.
    slice_codes : (n,) int64
    generator : numpy.random.Generator

    Returns
    -------
    (m,) int64
    """
    order = np.argsort(slice_codes, kind="stable")
    _, codes, sizes = np.unique(slice_codes, return_inverse=True, return_counts=True)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    first, size = starts[codes[anchors]], sizes[codes[anchors]]
    # one of the others: a draw at or after the anchor's own place moves on by one
    drawn = first + generator.integers(0, size - 1)
    chosen: Index = order[drawn + (drawn >= place[anchors])]
    return chosen


def hard_negatives(latents: torch.Tensor, anchors: Index, *, slice_codes: Index, labels: Index) -> Index:
    """For each anchor the nearest cell (Euclidean) of another label in its slice; -1 where there is none.

    Parameters
    ----------
    latents : (n, d) float32
    anchors : (m,) int64
    slice_codes, labels : (n,) int64
        Cells without a label (-1) neither have nor are hard negatives.

    Returns
    -------
    (m,) int64
    """
    chosen = np.full(len(anchors), -1, np.int64)
    for code in np.unique(slice_codes[anchors]):
        asked = np.flatnonzero((slice_codes[anchors] == code) & (labels[anchors] >= 0))
        others = np.flatnonzero((slice_codes == code) & (labels >= 0))
        if not len(asked) or not len(others):
            continue
        squared = _squared_distances(latents[anchors[asked]], latents[others])
        squared[labels[anchors[asked]][:, None] == labels[others][None, :]] = np.inf
        nearest = squared.argmin(axis=1)
        known = np.isfinite(squared[np.arange(len(asked)), nearest])
        chosen[asked[known]] = others[nearest[known]]
    return chosen


def chunk_neighbors(embeddings: torch.Tensor, *, groups: Index, n_neighbors: int) -> tuple[Index, NDArray[np.float32]]:
    """Nearest cells (Euclidean) of each cell in its own group, itself excluded.

    Parameters
    ----------
    embeddings : (n, d) float32
    groups : (n,) int64
        The slice of each cell.
    n_neighbors : int

    Returns
    -------
    neighbors : (n, k) int64
        In no particular order; -1 where the group has fewer than k + 1 cells.
    distances : (n, k) float32
        Zero where there is no neighbour.
    """
    neighbors = np.full((len(groups), n_neighbors), -1, np.int64)
    distances = np.zeros((len(groups), n_neighbors), np.float32)
    for code in np.unique(groups):
        rows = np.flatnonzero(groups == code)
        k = min(n_neighbors, len(rows) - 1)
        if k < 1:
            continue
        own = embeddings[rows]
        # around their mean the norms are small, and so is what the expanded square loses
        own = own - own.mean(dim=0)
        squared = _squared_distances(own, own)
        np.fill_diagonal(squared, np.inf)
        nearest = np.argpartition(squared, k - 1, axis=1)[:, :k]
        neighbors[rows, :k] = rows[nearest]
        distances[rows, :k] = _refined(np.take_along_axis(squared, nearest, axis=1), own, nearest)
    return neighbors, distances


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


def _floors(cosines: NDArray[np.float32], n_neighbors: int) -> NDArray[np.float32]:
    """Return the `n_neighbors`-th largest value of each row."""
    last = cosines.shape[1] - min(n_neighbors, cosines.shape[1])
    floors: NDArray[np.float32] = np.partition(cosines, last, axis=1)[:, last]
    return floors


def _nearest(cosines: NDArray[np.float32], left: Index, right: Index) -> tuple[Index, Index]:
    best = cosines.argmax(axis=1)
    known = cosines[np.arange(len(left)), best] > 0
    return left[known], right[best[known]]


def _squared_distances(left: torch.Tensor, right: torch.Tensor) -> NDArray[np.float32]:
    squared = left.square().sum(dim=1)[:, None] + right.square().sum(dim=1)[None, :]
    values: NDArray[np.float32] = squared.addmm_(left, right.T, alpha=-2).clamp_(min=0).numpy()
    return values


def _refined(squared: NDArray[np.float32], rows: torch.Tensor, nearest: Index) -> NDArray[np.float32]:
    """Distances from squares, recomputed from the differences where cancellation has left few digits."""
    distances = np.sqrt(squared)
    norms = rows.square().sum(dim=1).numpy()
    cell, column = np.nonzero(squared < CANCELLED * norms[:, None])
    difference = rows[torch.from_numpy(cell)] - rows[torch.from_numpy(nearest[cell, column])]
    distances[cell, column] = torch.linalg.vector_norm(difference, dim=1).numpy()
    return distances
