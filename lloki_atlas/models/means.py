"""Means of cells and their neighbours: what pairs across platforms are searched and pulled between.

A single cell is mostly noise, and a pull between two single cells draws them together along the noise as well, which
costs what tells cell types apart. Between means only what platforms differ by systematically is left.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import sparse

from lloki_atlas.models.mutual import Index


class _Means(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: sparse.csr_array) -> torch.Tensor:
        ctx.weights = weights
        return torch.from_numpy(np.ascontiguousarray(weights @ rows.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.from_numpy(np.ascontiguousarray(ctx.weights.T @ gradients[0].numpy())), None


def neighborhood_weights(neighbors: Index) -> sparse.csr_array:
    """Weights that turn rows into means of each row and its neighbours.

    Parameters
    ----------
    neighbors : (n, k) int64
        -1 where there is none.

    Returns
    -------
    (n, n) float32, CSR
        Rows sum to one.
    """
    n = len(neighbors)
    members = np.concatenate([np.arange(n)[:, None], neighbors], axis=1)
    present = members >= 0
    counts = present.sum(axis=1)
    values = np.repeat((1 / counts).astype(np.float32), counts)
    starts = np.concatenate([[0], np.cumsum(counts)])
    return sparse.csr_array((values, members[present], starts), shape=(n, n))


def neighborhood_means(rows: torch.Tensor, weights: sparse.csr_array) -> torch.Tensor:
    """Means of each row and its neighbours, differentiable.

    Parameters
    ----------
    rows : (n, d) float32
    weights : (n, n) float32, CSR
        Of `neighborhood_weights`.

    Returns
    -------
    (n, d) float32
    """
    means: torch.Tensor = _Means.apply(rows, weights)
    return means
