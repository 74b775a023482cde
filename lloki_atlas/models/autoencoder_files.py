"""A trained autoencoder as safetensors and JSON: no code in them, every weight accounted for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from lloki_atlas.config import AutoencoderConfig, canonical_json, digest, settings_from_dict, to_dict
from lloki_atlas.errors import CheckpointError, InputError
from lloki_atlas.models.autoencoder import ConditionalAutoencoder
from lloki_atlas.models.encoder import FrozenEncoder

FORMAT_VERSION = 1
WEIGHTS_FILE = "weights.safetensors"
DESCRIPTION_FILE = "autoencoder.json"


def save_checkpoint(
    folder: str | Path,
    model: ConditionalAutoencoder,
    *,
    config: AutoencoderConfig,
    history: Sequence[Mapping[str, float]],
    lineage: Mapping[str, Any],
) -> None:
    """Write `weights.safetensors` and `autoencoder.json`; equal models give equal bytes.

    Parameters
    ----------
    folder : path
        Made if it does not exist.
    model : ConditionalAutoencoder
    config : AutoencoderConfig
        The settings it was trained with.
    history : sequence of dict
    lineage : mapping
        What the model was made from; JSON-like.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    data = safetensors.torch.save(weights)
    description = {
        "format": FORMAT_VERSION,
        "config": to_dict(config),
        "platforms": list(model.platforms),
        "shapes": {name: list(value.shape) for name, value in weights.items()},
        "weights_digest": digest(data),
        "history": [dict(losses) for losses in history],
        "lineage": dict(lineage),
    }
    (folder / WEIGHTS_FILE).write_bytes(data)
    (folder / DESCRIPTION_FILE).write_bytes(canonical_json(description) + b"\n")


def load_encoder(folder: str | Path) -> FrozenEncoder:
    """Read the encoder of a checkpoint.

    Raises
    ------
    CheckpointError
        If a file is missing or unreadable, a weight is missing, unknown, or of another type or shape than the
        description says, or the weights are not those that were saved.
    """
    folder = Path(folder)
    description = _description(folder / DESCRIPTION_FILE)
    path = folder / WEIGHTS_FILE
    try:
        data = path.read_bytes()
        weights = safetensors.torch.load(data)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the weights {path} ({error}): restore the file or train again") from error
    try:
        config = settings_from_dict(AutoencoderConfig, description["config"], where="config")
        model = ConditionalAutoencoder(description["platforms"], token_size=config.token_size)
    except InputError as error:
        raise CheckpointError(f"{folder / DESCRIPTION_FILE} describes no model: {error}") from error
    expected = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        found, wanted = _kind(weights.get(name)), _kind(expected.get(name))
        if found != wanted:
            raise CheckpointError(f"weight '{name}' in {path}: found {found}, expected {wanted}; restore the file")
    if digest(data) != description["weights_digest"]:
        raise CheckpointError(
            f"{path} has digest {digest(data)}, expected {description['weights_digest']}: "
            "the weights are not those that were saved, restore the file"
        )
    model.load_state_dict(weights)
    return FrozenEncoder(model)


def _description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path} ({error}): restore the file or train again") from error
    wanted = {"format": int, "config": dict, "platforms": list, "weights_digest": str}
    if not isinstance(description, dict):
        raise CheckpointError(f"{path} holds a {type(description).__name__}, expected an object: restore the file")
    for name, kind in wanted.items():
        found = description.get(name)
        if not isinstance(found, kind):
            raise CheckpointError(
                f"'{name}' in {path}: found {type(found).__name__}, expected {kind.__name__}; restore the file"
            )
    if description["format"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {description['format']}, this version reads {FORMAT_VERSION}: update lloki-atlas"
        )
    return description


def _kind(value: torch.Tensor | None) -> str:
    return "nothing" if value is None else f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.")
