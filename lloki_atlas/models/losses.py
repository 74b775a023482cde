"""The three losses of LLOKI-CAE (equations 6 to 9): reconstruction, triplets across platforms, conserved distances.

Each has two scales (`equations`): that of the published code, to which the published weights belong, and `paper`, as
printed.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import mse_loss

from lloki_atlas.kernels.edges import Incidence, edge_distances, incidence, pull
from lloki_atlas.models.workers import Each, in_turn, parts

Equations = Literal["code", "paper"]


class _PairDistances(torch.autograd.Function):
    """Distances between gathered rows; the gradient gathers, too, from the edges at each row.

    Differentiating the gathers instead would add one row at a time, several times slower than the rest of a step.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, left: torch.Tensor, right: torch.Tensor, ends: Incidence | None, each: Each
    ) -> torch.Tensor:
        values, first, second = rows.detach().contiguous().numpy(), left.numpy(), right.numpy()
        distances = np.empty(second.shape, values.dtype)
        each(
            lambda part: edge_distances(values, first, second, part.start, part.stop, distances),
            parts(len(first)),
        )
        ctx.rows, ctx.ends, ctx.each = values, ends or incidence(first, second, len(values)), each
        found = torch.from_numpy(distances)
        ctx.save_for_backward(found)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (distances,) = ctx.saved_tensors
        # the norm has no gradient at zero: rows that coincide do not move each other
        weights = torch.where(distances > 0, gradients[0] / distances, 0.0).reshape(-1).numpy()
        moved = np.empty(ctx.rows.shape, ctx.rows.dtype)
        ctx.each(
            lambda part: pull(ctx.rows, *ctx.ends, weights, part.start, part.stop, moved),
            parts(len(moved)),
        )
        return torch.from_numpy(moved), None, None, None, None


def pair_distances(
    rows: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    ends: Incidence | None = None,
    each: Each = in_turn,
) -> torch.Tensor:
    """Euclidean distances of gathered pairs of rows, differentiable; the gradient of a zero distance is zero.

    Parameters
    ----------
    rows : (n, d) float32 or float64
    left : (m,) int64
        First row of each pair.
    right : (m, k) int64
        The rows it is compared with; negative where there is none, which is a distance of zero.
    ends : Incidence, optional
        `incidence(left, right, n)`, where it is known already.
    each : Each
        What runs the parts.

    Returns
    -------
    (m, k), the dtype of `rows`
    """
    distances: torch.Tensor = _PairDistances.apply(rows, left, right, ends, each)
    return distances


def squared_error(reconstructed: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """Sum of the squared differences of two (n, 512) tensors."""
    total: torch.Tensor = mse_loss(reconstructed, embeddings, reduction="sum")
    return total


def reconstruction_scale(n: int, n_dimensions: int, equations: Equations) -> float:
    """What the sum of squared differences is multiplied by: a mean over cells, and in the code over dimensions."""
    return 1.0 / (n * n_dimensions if equations == "code" else n)


def reconstruction_loss(
    reconstructed: torch.Tensor, embeddings: torch.Tensor, *, equations: Equations = "code"
) -> torch.Tensor:
    """Squared error (equation 6): mean over cells and dimensions, in the `paper` sum over dimensions.

    Parameters
    ----------
    reconstructed, embeddings : (n, 512) float
    """
    n, n_dimensions = embeddings.shape
    return squared_error(reconstructed, embeddings) * reconstruction_scale(n, n_dimensions, equations)


def triplet_loss(
    latents: torch.Tensor,
    anchors: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    *,
    margin: float,
    equations: Equations = "code",
    each: Each = in_turn,
) -> torch.Tensor:
    """Mean of max(0, d(a, p) - d(a, n) + margin) (equation 7), d being Euclidean, in the `paper` squared.

    Zero without triplets.

    Parameters
    ----------
    latents : (n, d) float
    anchors, positives, negatives : (m,) int64
        Rows of `latents`.
    """
    if not len(anchors):
        return latents.new_zeros(())
    distances = pair_distances(latents, anchors, torch.stack([positives, negatives], dim=1), each=each)
    if equations == "paper":
        distances = distances.square()
    loss: torch.Tensor = (distances[:, 0] - distances[:, 1] + margin).clamp(min=0).mean()
    return loss


def pair_loss(
    latents: torch.Tensor,
    anchors: torch.Tensor,
    positives: torch.Tensor,
    *,
    equations: Equations = "code",
    each: Each = in_turn,
) -> torch.Tensor:
    """Mean distance of anchors and positives, in the `paper` squared: the triplet loss without its negatives.

    Zero without pairs.

    Parameters
    ----------
    latents : (n, d) float
    anchors, positives : (m,) int64
        Rows of `latents`.
    """
    if not len(anchors):
        return latents.new_zeros(())
    distances = pair_distances(latents, anchors, positives[:, None], each=each)
    loss: torch.Tensor = (distances.square() if equations == "paper" else distances).mean()
    return loss


def conservation_loss(
    latents: torch.Tensor,
    neighbors: torch.Tensor,
    distances: torch.Tensor,
    *,
    equations: Equations = "code",
    ends: Incidence | None = None,
    each: Each = in_turn,
) -> torch.Tensor:
    """Mean over cells of (|z_i - z_j| - |x_i - x_j|)² (equation 8), its mean over neighbours, in the `paper` its sum.

    Zero without neighbours. In the code's mean every neighbour counts alike, in the paper's every cell.

    Parameters
    ----------
    latents : (n, d) float
    neighbors : (n, k) int64
        The neighbours j of each cell i in the space of the embeddings; -1 where there is none.
    distances : (n, k) float
        |x_i - x_j|; ignored where there is no neighbour.
    ends : Incidence, optional
        `incidence(arange(n), neighbors, n)`, where it is known already.
    """
    present = neighbors >= 0
    n_pairs = int(present.sum())
    if not n_pairs:
        return latents.new_zeros(())
    found = pair_distances(latents, torch.arange(len(neighbors)), neighbors, ends=ends, each=each)
    change = torch.where(present, found - distances, 0.0)
    loss: torch.Tensor = change.square().sum() / (n_pairs if equations == "code" else len(neighbors))
    return loss
