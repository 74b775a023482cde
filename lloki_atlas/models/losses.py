"""The three losses of LLOKI-CAE (equations 6 to 9): reconstruction, triplets across platforms, conserved distances."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import sparse

# pairs gathered at once: the differences of a block stay in the cache
BLOCK_PAIRS = 8192


class _PairDistances(torch.autograd.Function):
    """Distances between gathered rows, with the gradient as one product with a sparse graph Laplacian.

    Differentiating the gathers instead would add one row at a time, several times slower than the rest of a step.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        distances = rows.new_empty(right.shape)
        step = max(1, BLOCK_PAIRS // max(1, right.shape[1]))
        for start in range(0, len(left), step):
            block = slice(start, start + step)
            difference = rows.index_select(0, right[block].reshape(-1)).view(-1, right.shape[1], rows.shape[1])
            difference.sub_(rows.index_select(0, left[block])[:, None])
            distances[block] = torch.linalg.vector_norm(difference, dim=2)
        ctx.save_for_backward(rows, left, right, distances)
        return distances

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        rows, left, right, distances = ctx.saved_tensors
        # the norm has no gradient at zero: rows that coincide do not move each other
        weights = torch.where(distances > 0, gradients[0] / distances, 0.0).reshape(-1).numpy()
        sources = left.int().repeat_interleave(right.shape[1]).numpy()
        targets = right.int().reshape(-1).numpy()
        ends = np.concatenate([sources, targets]), np.concatenate([targets, sources])
        n_rows = len(rows)
        graph = sparse.coo_array((np.concatenate([weights, weights]), ends), shape=(n_rows, n_rows)).tocsr()
        values = rows.numpy()
        moved = graph.sum(axis=1)[:, None] * values - graph @ values
        return torch.from_numpy(np.ascontiguousarray(moved, dtype=values.dtype)), None, None


def pair_distances(rows: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Euclidean distances of gathered pairs of rows, differentiable; the gradient of a zero distance is zero.

    Parameters
    ----------
    rows : (n, d) float32 or float64
    left : (m,) int64
        First row of each pair.
    right : (m, k) int64
        The rows it is compared with.

    Returns
    -------
    (m, k), the dtype of `rows`
    """
    distances: torch.Tensor = _PairDistances.apply(rows, left, right)
    return distances


def reconstruction_loss(reconstructed: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """Mean squared error over cells and dimensions: equation 6 on the scale to which the published weights belong.

    Parameters
    ----------
    reconstructed, embeddings : (n, 512) float
    """
    loss: torch.Tensor = (reconstructed - embeddings).square().mean()
    return loss


def triplet_loss(
    latents: torch.Tensor,
    anchors: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    *,
    margin: float,
) -> torch.Tensor:
    """Mean of max(0, d(a, p) - d(a, n) + margin) with plain Euclidean d (equation 7); zero without triplets.

    Parameters
    ----------
    latents : (n, d) float
    anchors, positives, negatives : (m,) int64
        Rows of `latents`.
    """
    if not len(anchors):
        return latents.new_zeros(())
    distances = pair_distances(latents, anchors, torch.stack([positives, negatives], dim=1))
    loss: torch.Tensor = (distances[:, 0] - distances[:, 1] + margin).clamp(min=0).mean()
    return loss


def conservation_loss(latents: torch.Tensor, neighbors: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
    """Mean over cells and neighbours of (|z_i - z_j| - |x_i - x_j|)² (equation 8); zero without neighbours.

    Parameters
    ----------
    latents : (n, d) float
    neighbors : (n, k) int64
        The neighbours j of each cell i in the space of the embeddings; -1 where there is none.
    distances : (n, k) float
        |x_i - x_j|; ignored where there is no neighbour.
    """
    present = neighbors >= 0
    n_pairs = int(present.sum())
    if not n_pairs:
        return latents.new_zeros(())
    own = torch.arange(len(neighbors))
    found = pair_distances(latents, own, torch.where(present, neighbors, own[:, None]))
    change = torch.where(present, found - distances, 0.0)
    loss: torch.Tensor = change.square().sum() / n_pairs
    return loss
