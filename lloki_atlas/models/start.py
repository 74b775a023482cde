"""Where training starts: weights that keep the geometry of the embeddings.

With random weights and random tokens the platforms start far apart, and in ten epochs of training the geometry that
the embeddings came with is found again only in part. A sign split keeps it through ReLU: the network passes
[max(0, Ux), max(0, -Ux)] on, U the principal directions of the embeddings, and the decoder takes the difference.
"""

from __future__ import annotations

import torch
from torch import nn

from lloki_atlas.models.autoencoder import N_LATENT, ConditionalAutoencoder

# share of the random weights that stays, for the gradients to tell the units apart
NOISE = 0.02
# directions with less than this share of the largest second moment are not in the embeddings
SMALLEST = 1e-6


@torch.no_grad()
def start_isometric(model: ConditionalAutoencoder, embeddings: torch.Tensor) -> None:
    """Let the encoder start as the sign split of the principal directions, and the decoder as its inverse.

    Differences of cells keep their lengths where no sign changes, up to what lies outside of the first 64 directions.

    Parameters
    ----------
    model : ConditionalAutoencoder
        With random weights; changed in place. Tokens stay as they are, their weights shrink with the others.
    embeddings : (n, 512) float32
        A sample of cells.
    """
    directions = principal_directions(embeddings, at_most=N_LATENT // 2)  # (r, 512)
    rank = len(directions)
    split = torch.cat([directions, -directions])
    width = embeddings.shape[1]
    for layers in (model.encoder, model.decoder):
        for layer in layers:
            layer.weight.mul_(NOISE)
            layer.bias.zero_()
    model.encoder[0].weight[: 2 * rank, :width] += split
    model.decoder[-1].weight[:, : 2 * rank] += split.T
    for layer in (*model.encoder[1:], *model.decoder[:-1]):
        _pass_on(layer, 2 * rank)


def principal_directions(embeddings: torch.Tensor, *, at_most: int) -> torch.Tensor:
    """Leading eigenvectors of the second moments, each with its largest entry positive.

    Parameters
    ----------
    embeddings : (n, d) float32
    at_most : int

    Returns
    -------
    (r, d) float32, orthonormal rows, r at most `at_most`
    """
    rows = embeddings.double()
    moments, vectors = torch.linalg.eigh(rows.T @ rows)
    kept = moments > SMALLEST * moments[-1]
    chosen = vectors[:, kept].flip(1)[:, :at_most].T
    largest = chosen.abs().argmax(dim=1, keepdim=True)
    return (chosen * chosen.gather(1, largest).sign()).float()


def _pass_on(layer: nn.Module, n: int) -> None:
    layer.weight[:n, :n] += torch.eye(n)
