"""A trained autoencoder, or the token of one platform, as safetensors and JSON: no code in them, every weight checked.

A token belongs to one autoencoder, which lies in the folder beside it: what is loaded is both together.
"""

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
from lloki_atlas.models.platform_token import Token, with_token

FORMAT_VERSION = 1
WEIGHTS_FILE = "weights.safetensors"
DESCRIPTION_FILE = "autoencoder.json"
TOKEN_FILE = "token.safetensors"
TOKEN_DESCRIPTION_FILE = "token.json"

# name of a weight -> field of a token
_TOKEN_WEIGHTS = {"encoder_token": "encoder", "decoder_token": "decoder"}
_FIELDS: dict[str, dict[str, type]] = {
    DESCRIPTION_FILE: {"format": int, "config": dict, "platforms": list, "weights_digest": str},
    TOKEN_DESCRIPTION_FILE: {
        "format": int,
        "platform": str,
        "model": str,
        "model_digest": str,
        "weights_digest": str,
        "lineage": dict,
    },
}


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


def save_token(
    folder: str | Path,
    token: Token,
    *,
    model: str | Path,
    settings: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    evidence: Mapping[str, float],
    lineage: Mapping[str, Any],
) -> None:
    """Write `token.safetensors` and `token.json`; equal tokens give equal bytes.

    Parameters
    ----------
    folder : path
        Made if it does not exist. To be loaded it has to lie beside that of the autoencoder.
    token : Token
    model : path
        Checkpoint of the autoencoder that it belongs to.
    settings : mapping
        What it was trained with, beside the settings of the autoencoder.
    history : sequence of dict
    evidence : mapping
        What was measured of it.
    lineage : mapping
        What it was made from; JSON-like.
    """
    folder, model = Path(folder), Path(model)
    folder.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save(
        {name: torch.from_numpy(getattr(token, part)) for name, part in _TOKEN_WEIGHTS.items()}
    )
    description = {
        "format": FORMAT_VERSION,
        "platform": token.platform,
        "model": model.name,
        "model_digest": _description(model / DESCRIPTION_FILE)["weights_digest"],
        "weights_digest": digest(data),
        "settings": dict(settings),
        "history": [dict(losses) for losses in history],
        "evidence": dict(evidence),
        "lineage": dict(lineage),
    }
    (folder / TOKEN_FILE).write_bytes(data)
    (folder / TOKEN_DESCRIPTION_FILE).write_bytes(canonical_json(description) + b"\n")


def load_encoder(folder: str | Path) -> FrozenEncoder:
    """Read the encoder of a checkpoint: of an autoencoder, or of one with a token more. As `load_model`."""
    return FrozenEncoder(load_model(folder))


def load_settings(folder: str | Path) -> AutoencoderConfig:
    """Read the settings that an autoencoder was trained with; a search has chosen some of them.

    Raises
    ------
    CheckpointError
        If the description is missing or unreadable, or its settings are none.
    """
    path = Path(folder) / DESCRIPTION_FILE
    try:
        settings: AutoencoderConfig = settings_from_dict(
            AutoencoderConfig, _description(path)["config"], where="config"
        )
    except InputError as error:
        raise CheckpointError(f"{path} describes no model: {error}") from error
    return settings


def load_model(folder: str | Path) -> ConditionalAutoencoder:
    """Read a checkpoint: an autoencoder, or a token together with the autoencoder beside it.

    Raises
    ------
    CheckpointError
        If a file is missing or unreadable, a weight is missing, unknown, or of another type or shape than the
        description says, the weights are not those that were saved, or a token belongs to another autoencoder.
    """
    folder = Path(folder)
    if not (folder / TOKEN_DESCRIPTION_FILE).exists():
        return _load_autoencoder(folder)
    description = _description(folder / TOKEN_DESCRIPTION_FILE)
    beside = folder.parent / description["model"]
    found = _description(beside / DESCRIPTION_FILE)["weights_digest"]
    if found != description["model_digest"]:
        raise CheckpointError(
            f"the token {folder} belongs to an autoencoder with digest {description['model_digest']}, that in {beside} "
            f"has {found}: restore the folder"
        )
    model = _load_autoencoder(beside)
    size = model.encoder_tokens.embedding_dim
    weights = _weights(
        folder / TOKEN_FILE, {name: torch.empty(size) for name in _TOKEN_WEIGHTS}, description["weights_digest"]
    )
    rows = {part: weights[name].numpy() for name, part in _TOKEN_WEIGHTS.items()}
    return with_token(model, Token(description["platform"], **rows))


def token_description(folder: str | Path) -> dict[str, Any]:
    """Read the JSON beside a token's numbers.

    Raises
    ------
    CheckpointError
        If it is missing or garbled.
    """
    return _description(Path(folder) / TOKEN_DESCRIPTION_FILE)


def weight_files(folder: str | Path) -> list[Path]:
    """Files that decide what `load_encoder` gives: where one of them changes, it has to be called again."""
    folder = Path(folder)
    if not (folder / TOKEN_DESCRIPTION_FILE).exists():
        return [folder / WEIGHTS_FILE]
    return [folder / TOKEN_FILE, folder.parent / token_description(folder)["model"] / WEIGHTS_FILE]


def base_of(folder: str | Path) -> str | None:
    """Name of the folder of the autoencoder that a token belongs to, which lies beside it; None of an autoencoder."""
    if not (Path(folder) / TOKEN_DESCRIPTION_FILE).exists():
        return None
    return str(token_description(folder)["model"])


def _load_autoencoder(folder: Path) -> ConditionalAutoencoder:
    description = _description(folder / DESCRIPTION_FILE)
    try:
        config = settings_from_dict(AutoencoderConfig, description["config"], where="config")
        model = ConditionalAutoencoder(description["platforms"], token_size=config.token_size)
    except InputError as error:
        raise CheckpointError(f"{folder / DESCRIPTION_FILE} describes no model: {error}") from error
    model.load_state_dict(_weights(folder / WEIGHTS_FILE, model.state_dict(), description["weights_digest"]))
    return model


def _weights(path: Path, expected: Mapping[str, torch.Tensor], weights_digest: str) -> dict[str, torch.Tensor]:
    """Read weights and hold them against those that are expected, by name, and against their digest."""
    try:
        data = path.read_bytes()
        weights: dict[str, torch.Tensor] = safetensors.torch.load(data)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the weights {path} ({error}): restore the file or train again") from error
    for name in sorted(expected.keys() | weights.keys()):
        found, wanted = _kind(weights.get(name)), _kind(expected.get(name))
        if found != wanted:
            raise CheckpointError(f"weight '{name}' in {path}: found {found}, expected {wanted}; restore the file")
    if digest(data) != weights_digest:
        raise CheckpointError(
            f"{path} has digest {digest(data)}, expected {weights_digest}: "
            "the weights are not those that were saved, restore the file"
        )
    return weights


def _description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path} ({error}): restore the file or train again") from error
    if not isinstance(description, dict):
        raise CheckpointError(f"{path} holds a {type(description).__name__}, expected an object: restore the file")
    for name, kind in _FIELDS[path.name].items():
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
