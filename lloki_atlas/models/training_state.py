"""A training of the autoencoder between two epochs, as one file."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lloki_atlas.config import digest
from lloki_atlas.errors import CheckpointError
from lloki_atlas.models.autoencoder import ConditionalAutoencoder

Write = Callable[[Path, bytes], None]
DIGEST_BYTES = 32


@dataclass
class Training:
    """What a training consists of between two epochs; `best` are the weights of the best epoch, None without one."""

    model: ConditionalAutoencoder
    optimizer: torch.optim.Optimizer
    best: dict[str, torch.Tensor] | None = None
    history: list[dict[str, float]] = field(default_factory=list)


def saved(training: Training, key: str) -> bytes:
    """Bytes of the state, after a digest of them; `key` names the training."""
    buffer = io.BytesIO()
    content = {
        "key": key,
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "best": training.best,
        "history": training.history,
    }
    torch.save(content, buffer)
    data = buffer.getvalue()
    return digest(data).encode() + data


def restore(training: Training, state: Path, key: str) -> None:
    """Continue from a state file.

    Parameters
    ----------
    training
        As it was made; changed in place.
    state
        The file.
    key
        Of this training.

    Raises
    ------
    CheckpointError
        If the file is damaged, or is of a training with another key. Nothing is deleted: the file may be another
        training's last hope.
    """
    data = state.read_bytes()
    try:
        if digest(data[DIGEST_BYTES:]).encode() != data[:DIGEST_BYTES]:
            raise ValueError("its digest is not that of its bytes")
        content = torch.load(io.BytesIO(data[DIGEST_BYTES:]), map_location="cpu", weights_only=True)
        found = content["key"]
        if found == key:
            training.model.load_state_dict(content["model"])
            training.optimizer.load_state_dict(content["optimizer"])
            training.best, training.history = content["best"], content["history"]
    except Exception as error:  # what is no such file ends in any of a dozen kinds
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"cannot go on from {state}, it is damaged: delete it to start anew ({reason})"
        ) from error
    if found != key:
        raise CheckpointError(
            f"{state} is an unfinished training with other settings or data: give those again, or delete the file"
        )
