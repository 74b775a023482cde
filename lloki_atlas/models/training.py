"""Train the conditional autoencoder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lloki_atlas.config import AutoencoderConfig
from lloki_atlas.errors import InputError
from lloki_atlas.models.autoencoder import N_EMBEDDING, ConditionalAutoencoder
from lloki_atlas.models.losses import conservation_loss, reconstruction_loss, triplet_loss
from lloki_atlas.models.pairs import Index, balanced_chunks, chunk_neighbors, find_triplets
from lloki_atlas.models.threads import single_thread

LOSSES = ("total", "reconstruction", "triplet", "conservation")

Progress = Callable[[int, int, dict[str, float]], None]


def train_autoencoder_on(
    embeddings: NDArray[np.float32],
    platform: Index,
    slice_codes: Index,
    platforms: Sequence[str],
    *,
    config: AutoencoderConfig,
    labels: Index | None = None,
    progress: Progress | None = None,
) -> tuple[ConditionalAutoencoder, list[dict[str, float]]]:
    """Minimise the three losses (equation 9) by Adam over chunks that are drawn anew in every epoch.

    Equal inputs give equal bytes, whatever the number of threads outside.

    Parameters
    ----------
    embeddings : (n, 512) float32
        Finite.
    platform : (n,) int
        Position of each cell's platform in `platforms`.
    slice_codes : (n,) int
        Slice of each cell: the cells whose distances are conserved, and among which negatives are drawn.
    platforms : sequence of str
        "technology|panel"; each has at least one cell.
    config : AutoencoderConfig
    labels : (n,) int, optional
        Cell types, -1 where unknown: positives have the same one, negatives are the nearest of another.
    progress : callable, optional
        Called after each epoch with its number from 1, the number of epochs, and the losses.

    Returns
    -------
    ConditionalAutoencoder
    list of dict
        For each epoch `epoch`, `total` and, before weighting, `reconstruction`, `triplet`, `conservation` (means
        over chunks), and `n_triplets`.

    Raises
    ------
    InputError
        If the arrays do not fit each other, an embedding is not finite, or the losses diverge.
    """
    sample = _checked(embeddings, platform, slice_codes, labels, platforms=platforms)
    _warn_of_small(sample["platform"], platforms, n_neighbors=config.n_neighbors_mutual)
    history: list[dict[str, float]] = []
    with single_thread(), torch.enable_grad():
        model = ConditionalAutoencoder(platforms, token_size=config.token_size, random_state=config.random_state)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        for epoch in range(1, config.n_epochs + 1):
            generator = np.random.default_rng([config.random_state % 2**63, epoch])
            chunks = balanced_chunks(sample["platform"], chunk_cells=config.chunk_cells, generator=generator)
            steps = [_step(model, optimizer, _rows(sample, rows), config, generator) for rows in chunks]
            losses: dict[str, float] = {"epoch": epoch}
            losses.update({name: sum(step[name] for step in steps) / len(steps) for name in LOSSES})
            losses["n_triplets"] = sum(int(step["n_triplets"]) for step in steps)
            if not np.isfinite(losses["total"]):
                raise InputError(f"training diverged in epoch {epoch}: lower autoencoder.learning_rate")
            history.append(losses)
            if progress is not None:
                progress(epoch, config.n_epochs, dict(losses))
    return model.eval(), history


def _step(
    model: ConditionalAutoencoder,
    optimizer: torch.optim.Optimizer,
    chunk: dict[str, Any],
    config: AutoencoderConfig,
    generator: np.random.Generator,
) -> dict[str, float]:
    """One update on one chunk; neighbours across platforms are those of the latents as they are now."""
    embeddings = torch.from_numpy(chunk["embeddings"])
    latents, reconstructed = model(embeddings, torch.from_numpy(chunk["platform"]))
    triplets = find_triplets(
        latents.detach(),
        platform=chunk["platform"],
        slice_codes=chunk["slice_codes"],
        n_neighbors=config.n_neighbors_mutual,
        generator=generator,
        labels=chunk.get("labels"),
    )
    ends = [torch.from_numpy(rows) for rows in (triplets.anchors, triplets.positives, triplets.negatives)]
    neighbors, distances = chunk_neighbors(
        embeddings, groups=chunk["slice_codes"], n_neighbors=config.n_neighbors_conservation
    )
    reconstruction = reconstruction_loss(reconstructed, embeddings)
    triplet = triplet_loss(latents, *ends, margin=config.margin)
    conservation = conservation_loss(latents, torch.from_numpy(neighbors), torch.from_numpy(distances))
    total = (
        config.reconstruction_weight * reconstruction
        + config.triplet_weight * triplet
        + config.conservation_weight * conservation
    )
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    values = (total, reconstruction, triplet, conservation)
    return {**{name: value.item() for name, value in zip(LOSSES, values, strict=True)}, "n_triplets": len(triplets)}


def _rows(sample: dict[str, Any], rows: Index) -> dict[str, Any]:
    return {name: values[rows] for name, values in sample.items()}


def _checked(
    embeddings: NDArray[np.float32],
    platform: Index,
    slice_codes: Index,
    labels: Index | None,
    *,
    platforms: Sequence[str],
) -> dict[str, Any]:
    values = np.ascontiguousarray(embeddings, dtype=np.float32)
    if values.ndim != 2 or values.shape[1] != N_EMBEDDING or not len(values):
        raise InputError(
            f"embeddings are of shape {values.shape}: give (n_cells, {N_EMBEDDING}) with at least one cell"
        )
    unfinished = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(unfinished):
        raise InputError(
            f"{len(unfinished)} embeddings are not finite (first: row {unfinished[0]}): leave those cells out"
        )
    sample: dict[str, Any] = {"embeddings": values}
    given = {"platform": platform, "slice_codes": slice_codes, "labels": labels}
    for name, column in given.items():
        if column is None:
            continue
        codes = np.asarray(column)
        if codes.shape != (len(values),) or codes.dtype.kind not in "iu":
            raise InputError(
                f"{name} is {codes.dtype} of shape {codes.shape}: give one whole number for each of {len(values)} cells"
            )
        sample[name] = codes.astype(np.int64)
    counts = np.unique(sample["platform"])
    if not np.array_equal(counts, np.arange(len(platforms))):
        raise InputError(
            f"platform holds the numbers {counts.tolist()}: each of the {len(platforms)} platforms needs its number, "
            "from 0, and at least one cell"
        )
    return sample


def _warn_of_small(platform: Index, platforms: Sequence[str], *, n_neighbors: int) -> None:
    for name, size in zip(platforms, np.bincount(platform), strict=True):
        if len(platforms) > 1 and size < n_neighbors:
            warnings.warn(
                f"platform '{name}' has {size} cells, fewer than n_neighbors_mutual = {n_neighbors}: all are searched",
                stacklevel=3,
            )
