"""Autoencoders for tests."""

from __future__ import annotations

import torch

from lloki_atlas.models.autoencoder import ConditionalAutoencoder

PLATFORMS = ("MERFISH|a", "Xenium|b", "CosMx|c")


def spread_model(platforms: tuple[str, ...] = PLATFORMS) -> ConditionalAutoencoder:
    """A model whose weights are not the tame ones of the start."""
    model = ConditionalAutoencoder(platforms, random_state=3)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)
    return model
