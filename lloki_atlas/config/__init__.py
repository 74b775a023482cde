"""Every setting of an atlas as frozen dataclasses, their digest, and TOML in and out.

The digest of a settings object is part of the content key of whatever was computed with it, so a field's
default may only change together with the version of the stage that reads it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lloki_atlas.config.autoencoder import AutoencoderConfig
from lloki_atlas.config.checks import require
from lloki_atlas.config.propagation import PropagationConfig
from lloki_atlas.errors import InputError


@dataclass(frozen=True)
class TileConfig:
    """How the work on a slice is cut: no stored number depends on it.

    The cells of a slice, in spatial order, are cut into tiles of `tile_cells` (unit of IO, retry and memory). A step
    that needs the whole slice keeps it in memory while that is projected to take at most `slice_memory_mb`
    (2^20 bytes), and streams it from disk in blocks beyond. Slices of more than `search_cells` cells are searched for
    neighbours in ranges of that size, by as many tasks.
    """

    tile_cells: int = 4096
    slice_memory_mb: int = 1024
    search_cells: int = 32768

    def __post_init__(self) -> None:
        require(self.tile_cells >= 1, "tile_cells", self.tile_cells, "at least 1")
        require(self.slice_memory_mb >= 0, "slice_memory_mb", self.slice_memory_mb, "not negative")
        require(self.search_cells >= 1, "search_cells", self.search_cells, "at least 1")


@dataclass(frozen=True)
class EmbedderConfig:
    """Which embedder turns a diffused cell into 512 numbers, and its settings.

    `reference` needs no weights: `n_factors` components of the scRNA-seq reference and, for each panel, a
    ridge map of strength `ridge` onto them. `scgpt` reads a checkpoint folder (`args.json`, `vocab.json`,
    `best_model.pt`).

    Of `scgpt`: with `mode` `default` a cell's equal values share one bin and the largest values are kept of a cell
    with more genes than the model takes; `reference` draws both at random, as published, keyed by `random_state` and
    the cell's content. `precision` is the type of its matrix products. `device` is a torch device or `auto`, CUDA
    where there is one; `device_memory_mb` (2^20 bytes) is what batches on a GPU
    are planned to fit in. Neither decides a number
    beyond the tolerance of the arithmetic.
    """

    name: str = "reference"
    n_factors: int = 50
    ridge: float = 500.0
    checkpoint: str | None = None
    device: str = "auto"
    device_memory_mb: int = 2048
    mode: Literal["default", "reference"] = "default"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    random_state: int = 0

    def __post_init__(self) -> None:
        require(1 <= self.n_factors <= 512, "n_factors", self.n_factors, "between 1 and 512")
        require(self.ridge > 0, "ridge", self.ridge, "positive")
        require(self.device_memory_mb >= 1, "device_memory_mb", self.device_memory_mb, "at least 1")
        require(self.mode in ("default", "reference"), "mode", self.mode, "'default' or 'reference'")
        precisions = ("float32", "bfloat16", "float16")
        require(self.precision in precisions, "precision", self.precision, "one of " + ", ".join(precisions))
        if self.name == "scgpt" and not self.checkpoint:
            raise InputError(
                "the scgpt embedder needs a checkpoint folder: say `scgpt:DIR`, or set embedder.checkpoint"
            )


@dataclass(frozen=True)
class AtlasConfig:
    """Every setting of an atlas; the sections of `[settings.*]` in a manifest."""

    tile: TileConfig = field(default_factory=TileConfig)
    propagation: PropagationConfig = field(default_factory=PropagationConfig)
    embedder: EmbedderConfig = field(default_factory=EmbedderConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)

    @classmethod
    def from_dict(cls, sections: Mapping[str, Any]) -> AtlasConfig:
        """Build from nested tables.

        Raises
        ------
        InputError
            On a section or a key that does not exist, or a value out of range.
        """
        if not isinstance(sections, Mapping):
            raise InputError(f"[settings] is {sections!r}: give tables such as [settings.propagation]")
        parts: dict[str, Any] = {}
        for section, values in sections.items():
            if section not in _SECTIONS:
                raise InputError(f"unknown settings section '{section}': choose from {', '.join(sorted(_SECTIONS))}")
            parts[section] = settings_from_dict(_SECTIONS[section], values, where=f"settings.{section}")
        return cls(**parts)


_SECTIONS: dict[str, type] = {
    "tile": TileConfig,
    "propagation": PropagationConfig,
    "embedder": EmbedderConfig,
    "autoencoder": AutoencoderConfig,
}


def settings_from_dict(kind: type, values: Mapping[str, Any], *, where: str) -> Any:
    """Build one settings dataclass from a table, refusing keys that it does not have and values of another type."""
    if not isinstance(values, Mapping):
        raise InputError(f"[{where}] is {values!r}: give a table of settings")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    defaults = kind()
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            raise InputError(f"unknown key '{name}' in [{where}]: choose from {', '.join(sorted(fields))}")
        default = getattr(defaults, name)
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        wanted = str if default is None else type(default)
        if type(value) is not wanted and not (default is None and value is None):
            raise InputError(f"'{name}' in [{where}] is {value!r}, a {type(value).__name__}: give a {wanted.__name__}")
        checked[name] = value
    return kind(**checked)


def to_dict(settings: Any) -> dict[str, Any]:
    """Turn a settings object into plain nested tables (JSON and TOML friendly)."""
    return dataclasses.asdict(settings)


def digest(value: Any) -> str:
    """Content digest of JSON-like values, dataclasses, bytes or text: 32 hexadecimal characters of SHA-256.

    Equal content gives an equal digest on every machine: keys are sorted and floats are written with `repr`.
    """
    data = value if isinstance(value, bytes) else canonical_json(value)
    return hashlib.sha256(data).hexdigest()[:32]


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain).encode()


def load_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises
    ------
    InputError
        If the file is missing or is not TOML.
    """
    try:
        with open(path, "rb") as handle:
            return tomllib.load(handle)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"no canonical JSON form for {type(value).__name__}")
