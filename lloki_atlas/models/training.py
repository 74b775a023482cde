"""Train the conditional autoencoder: epochs over chunks from anywhere, held-out cells, checkpoints between epochs."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lloki_atlas.config import AutoencoderConfig
from lloki_atlas.errors import InputError
from lloki_atlas.models.autoencoder import ConditionalAutoencoder
from lloki_atlas.models.criterion import integration_score
from lloki_atlas.models.pairs import Index
from lloki_atlas.models.start import start_isometric
from lloki_atlas.models.step import LOSSES, Chunk, TrainingStep
from lloki_atlas.models.threads import single_thread
from lloki_atlas.models.training_arrays import ArraySource
from lloki_atlas.models.training_chunks import keyed
from lloki_atlas.models.training_state import Training, Write, restore, saved

__all__ = ["LOSSES", "ChunkSource", "best_epoch", "train", "train_autoencoder_on"]

MAX_THREADS = 4
# an epoch that lowers the loss of the held-out cells by less than this share is none in which it has improved
MIN_IMPROVEMENT = 1e-3
HELD_OUT = "held_out_"
# cells whose principal directions the weights start from
START_CELLS = 4000

Losses = dict[str, float]
Progress = Callable[[int, int, Losses], None]


class ChunkSource(Protocol):
    """Where chunks come from."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """Names of the tokens in the order of their numbers."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Cells of each token in an epoch."""

    def epoch(self, number: int) -> Generator[Chunk, None, None]:
        """Chunks of an epoch, the same whenever it is asked for by its number."""

    def held_out(self) -> list[Chunk]:
        """Chunks of the cells that are never trained on."""


def train(
    source: ChunkSource,
    config: AutoencoderConfig,
    *,
    key: str = "",
    state: Path | None = None,
    write: Write | None = None,
    n_threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[ConditionalAutoencoder, list[Losses]]:
    """Minimise the three losses (equation 9) by Adam over the chunks of a source.

    Every random number is keyed by seed, epoch and chunk: equal inputs give equal bytes, whatever the number of
    threads, and a training that goes on from its state gives those of one that was not interrupted.

    Parameters
    ----------
    source
        Chunks of every epoch, and of the cells that are held out.
    config
        With `patience` the training ends when the loss of the held-out cells no longer improves, and the weights of
        the epoch in which it was lowest are returned; with `search` those of the epoch in which these cells scored
        best, and no epoch is left out; without either, those of the last epoch.
    key
        Names this training; a state of another one is refused.
    state
        File of the training between two epochs; None keeps none.
    write
        Replaces a file as a whole and durably; needed with `state`.
    n_threads
        The cores of the machine, at most 4, when None.
    progress
        Called after each epoch with its number from 1, the number of epochs, and the losses.

    Returns
    -------
    ConditionalAutoencoder
    list of dict
        For each epoch `epoch`, `total` and, before weighting, `reconstruction`, `triplet`, `conservation` (means
        over chunks), and `n_triplets`; with held-out cells the same of them as `held_out_...`, and with `search` also
        their `biology`, `batch` and `score` (`criterion`); with `patience` or `search` `best_epoch` so far.

    Raises
    ------
    InputError
        If no platform has two cells, a chunk cannot be read, or the losses diverge.
    CheckpointError
        If `state` is damaged or belongs to another training.
    """
    _check_sizes(source, n_neighbors=config.n_neighbors_mutual)
    held_out = source.held_out()
    if config.search and not held_out:
        raise InputError(
            "no cells are held out to choose settings by (a platform needs more than 256): leave autoencoder.search off"
        )
    if config.patience and not held_out:
        warnings.warn(
            "no cells are held out (a platform needs more than 256): autoencoder.patience has no effect, all epochs "
            "are trained",
            stacklevel=2,
        )
    model = ConditionalAutoencoder(source.tokens, token_size=config.token_size, random_state=config.random_state)
    with TrainingStep(model, config, n_threads=n_threads or min(MAX_THREADS, os.cpu_count() or 1)) as step:
        training = Training(step.model, step.optimizer)
        if state is not None and state.exists():
            restore(training, state, key)
        elif config.start == "isometric":
            with single_thread():
                start_isometric(model, _sample(source))
        history = training.history
        patience = 0 if config.search else config.patience
        while len(history) < config.n_epochs and not stalled(history, patience):
            history.append(_run_epoch(step, source, config, len(history) + 1))
            history[-1] |= _validate(step, held_out, config)
            if held_out and (config.patience or config.search):
                history[-1]["best_epoch"] = best_epoch(history)
                if history[-1]["best_epoch"] == len(history):
                    training.best = copy.deepcopy(model.state_dict())
            if state is not None and write is not None:
                write(state, saved(training, key))
            if progress is not None:
                progress(len(history), config.n_epochs, dict(history[-1]))
    if training.best is not None:
        model.load_state_dict(training.best)
    return model.eval(), history


def train_autoencoder_on(
    embeddings: NDArray[np.float32],
    platform: Index,
    slice_codes: Index,
    platforms: Sequence[str],
    *,
    config: AutoencoderConfig,
    labels: Index | None = None,
    hold_out: bool | None = None,
    n_threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[ConditionalAutoencoder, list[Losses]]:
    """Train on cells that are in memory; each is in a chunk of every epoch, but for those that are held out.

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
    hold_out : bool, optional
        Whether a share `held_out` of each platform's blocks of 256 cells is left out, and its losses told; when
        None, if `patience` is above 0.
    n_threads, progress
        As for `train`.

    Returns
    -------
    As `train`.

    Raises
    ------
    InputError
        If the arrays do not fit each other, an embedding is not finite, no platform has two cells, or the losses
        diverge.
    """
    source = ArraySource(embeddings, platform, slice_codes, platforms, config=config, labels=labels, hold_out=hold_out)
    return train(source, config, n_threads=n_threads, progress=progress)


def best_epoch(history: Sequence[Losses]) -> int:
    """Number of the epoch, from 1, in which the held-out cells scored best or, without scores, lost least; the first
    of equals.
    """
    if HELD_OUT + "score" in history[0]:
        return 1 + int(np.argmax([losses[HELD_OUT + "score"] for losses in history]))
    return 1 + int(np.argmin([losses[HELD_OUT + "total"] for losses in history]))


def stalled(history: Sequence[Losses], patience: int) -> bool:
    """Whether the loss of the held-out cells has not improved for so many epochs."""
    if not patience or not history or HELD_OUT + "total" not in history[0]:
        return False
    lowest, last = np.inf, 0
    for number, losses in enumerate(history):
        if losses[HELD_OUT + "total"] < lowest * (1 - MIN_IMPROVEMENT):
            lowest, last = losses[HELD_OUT + "total"], number
    return len(history) - 1 - last >= patience


def _sample(source: ChunkSource) -> torch.Tensor:
    """Embeddings of the first chunks of the first epoch, at least `START_CELLS` where there are so many."""
    parts: list[NDArray[np.float32]] = []
    with closing(source.epoch(1)) as chunks:
        for chunk in chunks:
            parts.append(chunk.embeddings)
            if sum(len(part) for part in parts) >= START_CELLS:
                break
    return torch.from_numpy(np.concatenate(parts))


def _run_epoch(step: TrainingStep, source: ChunkSource, config: AutoencoderConfig, epoch: int) -> Losses:
    # "fixed" trains on the chunks of the first epoch again and again
    steps: list[Losses] = []
    with closing(source.epoch(epoch if config.chunks == "redrawn" else 1)) as chunks:
        for number, chunk in enumerate(chunks):
            steps.append(step.update(chunk, keyed(config.random_state, "step", epoch, number)))
            if not np.isfinite(steps[-1]["total"]):
                raise InputError(f"training diverged in epoch {epoch}: lower autoencoder.learning_rate")
    return {"epoch": epoch, **_means(steps)}


def _validate(step: TrainingStep, held_out: Sequence[Chunk], config: AutoencoderConfig) -> Losses:
    """Losses of the held-out cells, and scores; what is drawn of them at random is the same in every epoch."""
    steps = [
        step.losses(chunk, keyed(config.random_state, "validation", number)) for number, chunk in enumerate(held_out)
    ]
    if not steps:
        return {}
    losses = _means(steps)
    if config.search:
        scores = [_score(step.model, chunk) for chunk in held_out]
        losses |= {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
    return {HELD_OUT + name: value for name, value in losses.items()}


def _score(model: ConditionalAutoencoder, chunk: Chunk) -> Losses:
    with single_thread(), torch.no_grad():
        latents = model.encode(torch.from_numpy(chunk.embeddings), torch.from_numpy(chunk.platform)).numpy()
        return integration_score(
            chunk.embeddings,
            latents,
            platform=chunk.platform,
            slice_codes=chunk.slice_codes,
            labels=chunk.labels,
        )


def _means(steps: Sequence[Losses]) -> Losses:
    losses = {name: sum(step[name] for step in steps) / len(steps) for name in LOSSES}
    losses["n_triplets"] = sum(int(step["n_triplets"]) for step in steps)
    return losses


def _check_sizes(source: ChunkSource, *, n_neighbors: int) -> None:
    if max(source.sizes) < 2:
        raise InputError(
            f"no platform has two cells to train on ({', '.join(source.tokens)}): the autoencoder needs more cells"
        )
    if len(source.tokens) == 1:
        warnings.warn(
            f"one platform ('{source.tokens[0]}'): no triplets, nothing to mix; training keeps to reconstruction and "
            "conservation",
            stacklevel=3,
        )
    for name, size in zip(source.tokens, source.sizes, strict=True):
        if len(source.tokens) > 1 and size < n_neighbors:
            warnings.warn(
                f"platform '{name}' has {size} cells, fewer than n_neighbors_mutual = {n_neighbors}: all are searched",
                stacklevel=3,
            )
