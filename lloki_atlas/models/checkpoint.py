"""Read an official scGPT checkpoint folder, and refuse every file, setting and parameter that does not fit."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lloki_atlas.config import digest
from lloki_atlas.errors import CheckpointError, InputError
from lloki_atlas.models.tokens import Vocabulary, build_vocabulary

CHECKPOINT_FILES = ("args.json", "vocab.json", "best_model.pt")

# parameters of published checkpoints that the embedding does not pass through
UNUSED_PARAMETERS = ("decoder.", "cls_decoder.", "mvc_decoder.", "flag_encoder.")

_INTEGERS = ("embsize", "nheads", "d_hid", "nlayers", "n_bins", "max_seq_len")
# `embed_data` has these in its code; every other setting has to be in the file
_DEFAULTS = {"n_bins": 51, "max_seq_len": 1200}


@dataclass(frozen=True)
class ScGPTSettings:
    """What `args.json` says about the encoder; `max_seq_len` counts `<cls>`."""

    embsize: int
    nheads: int
    d_hid: int
    nlayers: int
    n_bins: int
    max_seq_len: int
    pad_token: str
    pad_value: float

    def __post_init__(self) -> None:
        if min(self.embsize, self.nheads, self.d_hid, self.nlayers) < 1 or self.embsize % self.nheads:
            raise CheckpointError(
                f"args.json has embsize {self.embsize}, nheads {self.nheads}, d_hid {self.d_hid} and nlayers "
                f"{self.nlayers}: each has to be positive, and embsize a multiple of nheads"
            )
        if self.n_bins < 3 or self.max_seq_len < 2:
            raise CheckpointError(
                f"args.json has n_bins {self.n_bins} and max_seq_len {self.max_seq_len}: at least 3 and 2 are needed"
            )


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checked folder: `weights` are float32 on the CPU under torch's attention names, `digest` its content."""

    digest: str
    settings: ScGPTSettings
    vocabulary: Vocabulary
    weights: dict[str, torch.Tensor]


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read `args.json`, `vocab.json` and `best_model.pt`, and hold them against each other.

    Parameters
    ----------
    folder
        Folder of the three files. Attention weights may be named `in_proj_*` (torch), `Wqkv.*` or `_impl.Wqkv.*`
        (flash attention).

    Returns
    -------
    Checkpoint
        Every parameter of the encoder, each of the shape that the two descriptions ask for.

    Raises
    ------
    InputError
        If the folder or a file is missing or cannot be read.
    CheckpointError
        If a file is damaged or holds anything but weights, or a setting or parameter is missing, unknown, of another
        shape, or not finite.
    """
    folder = Path(folder)
    files = {name: _read(folder, name) for name in CHECKPOINT_FILES}
    settings = _settings(_json(files["args.json"], folder / "args.json"))
    vocabulary = build_vocabulary(_json(files["vocab.json"], folder / "vocab.json"), pad_token=settings.pad_token)
    state = _state(files["best_model.pt"], folder / "best_model.pt")
    weights = _match(state, _expected_shapes(settings, n_tokens=len(vocabulary)))
    return Checkpoint(_content(files), settings, vocabulary, weights)


def _content(files: Mapping[str, bytes]) -> str:
    return digest({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})


def _read(folder: Path, name: str) -> bytes:
    if not folder.is_dir():
        raise InputError(f"there is no checkpoint folder {folder}: give the one that holds {name}")
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {folder / name}: {error.strerror or error}") from error


def _json(data: bytes, path: Path) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}: copy the file of the checkpoint again") from error


def _settings(args: Any) -> ScGPTSettings:
    if not isinstance(args, Mapping):
        raise CheckpointError("args.json is not a table of settings: take the file of the same checkpoint")
    args = {**_DEFAULTS, **args}
    found: dict[str, Any] = {}
    for name in (*_INTEGERS, "pad_token", "pad_value"):
        if name not in args:
            raise CheckpointError(f"args.json has no '{name}': take the file that was written with the weights")
        kinds = (int,) if name in _INTEGERS else (str,) if name == "pad_token" else (int, float)
        if type(args[name]) not in kinds:
            raise CheckpointError(f"'{name}' of args.json is {args[name]!r}: it has to be a {kinds[-1].__name__}")
        found[name] = args[name]
    # both would go through unnoticed: the parameters have the same names and shapes
    for name, wanted in (("input_emb_style", "continuous"), ("pre_norm", False)):
        if args.get(name, wanted) != wanted:
            raise CheckpointError(f"'{name}' of args.json is {args[name]!r}: only {wanted!r} can be embedded")
    return ScGPTSettings(**found)


def _state(data: bytes, path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file ends in any of a dozen kinds
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"cannot read {path} as a file of weights, it is damaged or holds other objects: {reason}"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is not a plain table of parameters: save the model's state_dict()")
    return dict(state)


def _expected_shapes(settings: ScGPTSettings, *, n_tokens: int) -> dict[str, tuple[int, ...]]:
    width, hidden = settings.embsize, settings.d_hid
    shapes: dict[str, tuple[int, ...]] = {"encoder.embedding.weight": (n_tokens, width)}

    def linear(name: str, n_in: int, n_out: int, joint: str = ".") -> None:
        shapes[f"{name}{joint}weight"], shapes[f"{name}{joint}bias"] = (n_out, n_in), (n_out,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    norm("encoder.enc_norm")
    linear("value_encoder.linear1", 1, width)
    linear("value_encoder.linear2", width, width)
    norm("value_encoder.norm")
    for layer in range(settings.nlayers):
        name = f"transformer_encoder.layers.{layer}"
        linear(f"{name}.self_attn.in_proj", width, 3 * width, "_")
        linear(f"{name}.self_attn.out_proj", width, width)
        linear(f"{name}.linear1", width, hidden)
        linear(f"{name}.linear2", hidden, width)
        norm(f"{name}.norm1")
        norm(f"{name}.norm2")
    return shapes


def _match(state: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Take exactly the expected parameters, whatever their attention layers are called."""
    names: dict[str, str] = {}
    for name in state:
        if name.startswith(UNUSED_PARAMETERS):
            continue
        common = name.replace(".self_attn._impl.", ".self_attn.").replace(".self_attn.Wqkv.", ".self_attn.in_proj_")
        if common not in shapes:
            raise CheckpointError(
                f"best_model.pt has the parameter '{name}', which the encoder that args.json describes does not have"
            )
        if common in names:
            raise CheckpointError(f"best_model.pt has both '{names[common]}' and '{name}', which are one parameter")
        names[common] = name
    weights: dict[str, torch.Tensor] = {}
    for common, shape in shapes.items():
        if common not in names:
            flash = common.replace(".in_proj_", ".Wqkv.")
            also = f" (or '{flash}')" if flash != common else ""
            raise CheckpointError(f"best_model.pt lacks the parameter '{common}'{also} of shape {shape}")
        value, name = state[names[common]], names[common]
        if tuple(value.shape) != shape:
            raise CheckpointError(
                f"'{name}' of best_model.pt has the shape {tuple(value.shape)}, "
                f"but args.json and vocab.json ask for {shape}: take all three files of one checkpoint"
            )
        if not value.is_floating_point() or not torch.isfinite(value).all():
            raise CheckpointError(f"'{name}' of best_model.pt holds values that are not finite numbers: it is damaged")
        weights[common] = value.to(torch.float32)
    return weights
