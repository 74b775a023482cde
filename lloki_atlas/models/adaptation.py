"""Adapt a trained autoencoder to a platform that it does not know: the platform's own token is trained, nothing else.

Encoder and decoder are frozen, and so are the cells of the atlas: the new cells are compared with their latents, which
are constants here. What is left to train is the token, 10 numbers for the encoder and 10 for the decoder.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lloki_atlas.config import AutoencoderConfig
from lloki_atlas.errors import InputError
from lloki_atlas.models.adaptation_chunks import Anchored, Drawn, anchored, choose, draw, pair_latents
from lloki_atlas.models.adaptation_evidence import measure
from lloki_atlas.models.autoencoder import ConditionalAutoencoder
from lloki_atlas.models.losses import conservation_loss, pair_loss, reconstruction_loss, triplet_loss
from lloki_atlas.models.pairs import hard_negatives, random_negatives
from lloki_atlas.models.platform_token import Token, only_token, token_of
from lloki_atlas.models.step import LOSSES, Chunk
from lloki_atlas.models.structure import check_structure
from lloki_atlas.models.threads import single_thread
from lloki_atlas.models.training_chunks import keyed

N_EPOCHS = 10
# chunks of an epoch, and updates by each, however many cells there are: so few numbers need updates rather than cells,
# and drawing a chunk and searching its pairs takes longer than several updates
EPOCH_CHUNKS = 2
CHUNK_UPDATES = 5
LEARNING_RATE = 0.05
# fewer cells than this do not tell where a platform lies
MIN_CELLS = 10

Progress = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Adaptation:
    """A trained token, the losses of every epoch, and what was measured; see `adapt_token`."""

    token: Token
    history: list[dict[str, float]]
    evidence: dict[str, float]


def adapt_token(
    model: ConditionalAutoencoder,
    platform: str,
    cells: Chunk,
    atlas: Chunk,
    *,
    config: AutoencoderConfig,
    random_state: int = 0,
    progress: Progress | None = None,
) -> Adaptation:
    """Train the token of a new platform by the three losses of the autoencoder.

    Reconstruction and conserved distances are those of the new cells. The anchors of pairs and triplets are new cells,
    the positives their mutual neighbours in the atlas, and the negatives, where the settings want some, cells of the
    anchor's slice. The token begins as the mean of those that the model has. The model is left as it is; equal inputs
    give equal bytes.

    Parameters
    ----------
    model : ConditionalAutoencoder
    platform : str
        Name of the new token.
    cells : Chunk
        Cells of the new platform, whose numbers in `platform` mean nothing; those whose embedding is not finite are
        left out.
    atlas : Chunk
        Cells of platforms of the model; all of their embeddings are finite.
    config : AutoencoderConfig
        Settings that the model was trained with.
    random_state : int
    progress : callable, optional
        Called after each epoch with its number from 1, the number of epochs, and the losses.

    Returns
    -------
    Adaptation
        `history` has for each epoch `epoch`, `total`, and, before weighting, `reconstruction`, `triplet` and
        `conservation` (means over updates), and `n_triplets`; `evidence` has what `check_structure` and `measure` give.

    Raises
    ------
    InputError
        If the model knows the platform, there are too few cells, they share no structure with the atlas, none has a
        mutual neighbour in it, or the losses diverge.
    """
    cells = _checked(model, platform, cells, atlas, config)
    with single_thread():
        found = check_structure(platform, cells, atlas, names=model.platforms, random_state=random_state)
        known = anchored(model, atlas)
        own = only_token(model, platform)
        before = copy.deepcopy(own)
        with torch.enable_grad():
            history = _train(own, cells, known, config, random_state, progress)
        found |= measure(before, own, cells, known, config=config, random_state=random_state)
    return Adaptation(token_of(own), history, found)


def _checked(
    model: ConditionalAutoencoder, platform: str, cells: Chunk, atlas: Chunk, config: AutoencoderConfig
) -> Chunk:
    if platform in model.platforms:
        raise InputError(f"'{platform}' already has a token: training makes a new model, adapting does not change one")
    if not len(atlas.embeddings):
        raise InputError(f"the atlas has no cells to adapt '{platform}' to: train a new model with `lloki-atlas train`")
    known = np.flatnonzero(np.isfinite(cells.embeddings).all(axis=1))
    if len(known) < MIN_CELLS:
        raise InputError(
            f"'{platform}' has {len(known)} cells with an embedding, adapting needs {MIN_CELLS}: add cells, or stop at "
            "the 512-d embedding with until='embed'"
        )
    if len(known) < config.n_neighbors_mutual:
        warnings.warn(
            f"platform '{platform}' has {len(known)} cells, fewer than n_neighbors_mutual = "
            f"{config.n_neighbors_mutual}: all are searched",
            stacklevel=3,
        )
    return choose(cells, known)


def _train(
    own: ConditionalAutoencoder,
    cells: Chunk,
    atlas: Anchored,
    config: AutoencoderConfig,
    random_state: int,
    progress: Progress | None,
) -> list[dict[str, float]]:
    tokens = [own.encoder_tokens.weight, own.decoder_tokens.weight]
    optimizer = torch.optim.Adam(tokens, lr=LEARNING_RATE)
    n_updates = N_EPOCHS * EPOCH_CHUNKS * CHUNK_UPDATES
    # down to zero along half a cosine: the draws of the last updates leave no trace
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: (1 + math.cos(math.pi * done / n_updates)) / 2)
    history: list[dict[str, float]] = []
    for epoch in range(1, N_EPOCHS + 1):
        steps = []
        for number in range(EPOCH_CHUNKS):
            generator = keyed(random_state, "adapt", epoch, number)
            drawn = draw(cells, atlas, config, generator)
            for _ in range(CHUNK_UPDATES):
                total, losses = _losses(own, drawn, config, generator)
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
                schedule.step()
                steps.append(losses)
        means = {name: sum(step[name] for step in steps) / len(steps) for name in LOSSES}
        history.append({"epoch": epoch, **means, "n_triplets": sum(int(step["n_triplets"]) for step in steps)})
        if not math.isfinite(means["total"]):
            raise InputError(f"adapting to '{own.platforms[0]}' diverged in epoch {epoch}: embed its slices again")
        if progress is not None:
            progress(epoch, N_EPOCHS, dict(history[-1]))
    return history


def _losses(
    own: ConditionalAutoencoder, drawn: Drawn, config: AutoencoderConfig, generator: np.random.Generator
) -> tuple[torch.Tensor, dict[str, float]]:
    """Weighted sum of the losses of a drawn chunk, and its parts."""
    embeddings = torch.from_numpy(drawn.cells.embeddings)
    latents, reconstructed = own(embeddings, torch.zeros(len(embeddings), dtype=torch.int64))
    triplet, n_triplets = _triplet_loss(latents, drawn, config, generator)
    reconstruction = reconstruction_loss(reconstructed, embeddings, equations=config.equations)
    conservation = conservation_loss(
        latents, torch.from_numpy(drawn.conserved), torch.from_numpy(drawn.distances), equations=config.equations
    )
    total = (
        config.reconstruction_weight * reconstruction
        + config.triplet_weight * triplet
        + config.conservation_weight * conservation
    )
    values = (value.item() for value in (total, reconstruction, triplet, conservation))
    return total, {**dict(zip(LOSSES, values, strict=True)), "n_triplets": n_triplets}


def _triplet_loss(
    latents: torch.Tensor, drawn: Drawn, config: AutoencoderConfig, generator: np.random.Generator
) -> tuple[torch.Tensor, int]:
    """Loss of the pairs, with negatives where the settings want them; rows of the atlas follow those of new cells."""
    cells, equations = drawn.cells, config.equations
    anchors, positives = drawn.pairs(latents.detach(), config)
    rows = torch.cat(pair_latents(latents, drawn))
    if config.negatives == "none":
        ends = torch.from_numpy(anchors), torch.from_numpy(positives + len(latents))
        return pair_loss(rows, *ends, equations=equations), len(anchors)
    _, codes, sizes = np.unique(cells.slice_codes, return_inverse=True, return_counts=True)
    paired = sizes[codes[anchors]] > 1  # a slice's only cell has no negative
    anchors, positives = anchors[paired], positives[paired]
    negatives = random_negatives(anchors, groups=cells.slice_codes, generator=generator)
    if cells.labels is not None:
        own = rows[: len(latents)].detach()
        hard = hard_negatives(own, anchors, slice_codes=cells.slice_codes, labels=cells.labels)
        negatives = np.where(hard >= 0, hard, negatives)
    triplets = (torch.from_numpy(column) for column in (anchors, positives + len(latents), negatives))
    return triplet_loss(rows, *triplets, margin=config.margin, equations=equations), len(anchors)
