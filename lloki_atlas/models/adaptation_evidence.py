"""What is measured of a token: how many cells have a counterpart in the atlas, how far they moved, how they mix."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from lloki_atlas.config import AutoencoderConfig
from lloki_atlas.errors import InputError
from lloki_atlas.models.adaptation_chunks import Anchored, choose, draw, find_pairs, pair_rows
from lloki_atlas.models.autoencoder import ConditionalAutoencoder
from lloki_atlas.models.mutual import Index
from lloki_atlas.models.step import Chunk
from lloki_atlas.models.training_chunks import keyed

MIXING_NEIGHBORS = 15
# cells of each side by which mixing is measured
MIXING_CELLS = 1000


@torch.no_grad()
def measure(
    before: ConditionalAutoencoder,
    after: ConditionalAutoencoder,
    cells: Chunk,
    atlas: Anchored,
    *,
    config: AutoencoderConfig,
    random_state: int,
) -> dict[str, float]:
    """Measure what a token does.

    Parameters
    ----------
    before, after : ConditionalAutoencoder
        Models that know the new platform alone: with the token that it began with, and with the trained one.
    cells : Chunk
        Of the new platform.
    atlas : Anchored
    config : AutoencoderConfig
    random_state : int

    Returns
    -------
    dict
        `n_cells`, `n_atlas_cells`; `paired`, the share of new cells with a mutual neighbour in the atlas, and
        `similarity`, the mean cosine of these pairs; `moved`, the mean distance of the latents from those before, as a
        share of their length; `mixing_before` and `mixing`, see `mixing`.

    Raises
    ------
    InputError
        If no cell has a mutual neighbour.
    """
    generator = keyed(random_state, "measure")
    drawn = draw(cells, atlas, config, generator)
    latents = own_latents(after, drawn.cells)
    anchors, positives = find_pairs(latents, drawn, config)
    if not len(anchors):
        raise InputError(
            f"no cell of '{after.platforms[0]}' has a mutual neighbour in the atlas: check gene symbols, organism and "
            "gene map, or train a new model with `lloki-atlas train`"
        )
    new, old = pair_rows(latents, drawn, config.pair_space)
    cosines = functional.cosine_similarity(new[torch.from_numpy(anchors)], old[torch.from_numpy(positives)])
    sample = choose(cells, generator.permutation(len(cells.embeddings))[:MIXING_CELLS])
    others = atlas.latents[torch.from_numpy(_spread(atlas.cells.platform, MIXING_CELLS, generator))]
    first, last = own_latents(before, sample), own_latents(after, sample)
    lengths = torch.linalg.vector_norm(first, dim=1).mean().clamp(min=torch.finfo(first.dtype).tiny)
    return {
        "n_cells": len(cells.embeddings),
        "n_atlas_cells": len(atlas.cells.embeddings),
        "paired": len(np.unique(anchors)) / len(new),
        "similarity": cosines.mean().item(),
        "moved": (torch.linalg.vector_norm(last - first, dim=1).mean() / lengths).item(),
        "mixing_before": mixing(first, others),
        "mixing": mixing(last, others),
    }


def mixing(own: torch.Tensor, others: torch.Tensor) -> float:
    """Share of `others` among the 15 nearest (cosine) of each of `own`, relative to that in a random order.

    1 is perfectly mixed, 0 is apart.

    Parameters
    ----------
    own : (n, d) float32
    others : (m, d) float32
        At least one cell.
    """
    rows = functional.normalize(torch.cat([own, others]))
    cosines = rows[: len(own)] @ rows.T
    cosines.fill_diagonal_(-torch.inf)
    nearest = cosines.topk(min(MIXING_NEIGHBORS, len(rows) - 1)).indices
    return float((nearest >= len(own)).double().mean() * (len(rows) - 1) / len(others))


def own_latents(own: ConditionalAutoencoder, cells: Chunk) -> torch.Tensor:
    """Latents of cells by a model that knows their platform alone."""
    return own.encode(torch.from_numpy(cells.embeddings), torch.zeros(len(cells.embeddings), dtype=torch.int64))


def _spread(platform: Index, size: int, generator: np.random.Generator) -> Index:
    """Draw about `size` rows, equally many of each platform as far as there are."""
    codes = np.unique(platform)
    share = -(-size // len(codes))
    return np.concatenate([generator.permutation(np.flatnonzero(platform == code))[:share] for code in codes])
