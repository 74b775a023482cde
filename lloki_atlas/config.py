"""Every setting of an atlas as frozen dataclasses, their digest, and TOML in and out.

The digest of a settings object is part of the content key of whatever was computed with it, so a field's
default may only change together with the version of the stage that reads it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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
        _require(self.tile_cells >= 1, "tile_cells", self.tile_cells, "at least 1")
        _require(self.slice_memory_mb >= 0, "slice_memory_mb", self.slice_memory_mb, "not negative")
        _require(self.search_cells >= 1, "search_cells", self.search_cells, "at least 1")


# what a mode decides for fields that are not given: the equations as printed, and the published code's behaviour
_MODES: dict[str, dict[str, Any]] = {
    "default": {
        "graph_space": "scaled",
        "bandwidth": "pairs",
        "n_bandwidth_pairs": 10_000,
        "sparsity_cdf": "midrank",
        "sparsity_match": "rank",
        "sparsity_genes": "shared",
        "support": "frozen",
        "stopping": "relative",
        "split": "none",
    },
    "paper": {
        "graph_space": "counts",
        "bandwidth": "pairs",
        "n_bandwidth_pairs": 100,
        "sparsity_cdf": "upper",
        "sparsity_match": "rank",
        "sparsity_genes": "shared",
        "support": "frozen",
        "stopping": "relative",
        "split": "none",
    },
    "reference": {
        "graph_space": "counts",
        "bandwidth": "cross",
        "n_bandwidth_pairs": 100,
        "sparsity_cdf": "linspace",
        "sparsity_match": "argsort",
        "sparsity_genes": "all",
        "support": "redrawn",
        "stopping": "absolute",
        "split": "stripes",
    },
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "mode": ("default", "paper", "reference"),
    "graph_space": ("scaled", "counts"),
    "search": ("exact", "approximate"),
    "bandwidth": ("pairs", "cross"),
    "sparsity_cdf": ("midrank", "upper", "linspace"),
    "sparsity_match": ("rank", "argsort"),
    "sparsity_genes": ("shared", "all"),
    "support": ("frozen", "largest", "redrawn"),
    "stopping": ("relative", "absolute"),
    "split": ("none", "stripes"),
    "storage": ("float32", "float16"),
    "diffuse": ("counts", "embedding"),
}


@dataclass(frozen=True)
class PropagationConfig:
    """LLOKI-FP: graph, sparsity target, propagation, diffusion.

    `mode` decides every field that is not given: `default` is correct and deterministic, `paper` the equations as
    printed, `reference` the behaviour of the published code with random parts drawn from the same distribution.
    (A changed mode needs new settings: `dataclasses.replace` keeps the fields that the old mode decided.)

    Neighbours: `graph_space` is where they are searched: `scaled` is the first `n_components` principal components of
    z-scored log counts over every gene of the panel; `counts` is the counts over the genes shared with the reference,
    as published. `search` is `exact`, or `approximate` by nearest-neighbour descent, which slices of `approximate_from`
    cells or more use whatever `search` says (0: never), and which records its measured recall.
    `bandwidth` σ: mean distance of `n_bandwidth_pairs` random `pairs`, or of 100 × 100 `cross` distances drawn anew
    for each graph.

    Sparsity: `sparsity_cdf` is F of equation 3: `midrank`, `upper` (i/n) or `linspace` ((i − 1)/(n − 1)); targets are
    assigned by `rank`, or by `argsort` as published; sparsity of the reference counts the `shared` genes or `all`.

    Propagation: `support` is which genes a full cell keeps: `frozen` (drawn once), `largest` values, or `redrawn` in
    every iteration; `stopping` on the `relative` change (`tolerance`) or on an `absolute` norm of 15 on counts divided
    by their maximum. `split` cuts large slices into `stripes` along x. `storage` is the type of propagated values.

    Diffusion: `alpha` weighs the diffused values against the cell's own (equation 5); `keep_observed` leaves observed
    values as they are; `cap_final` keeps a cell's largest values up to its target; `diffuse` the `counts` before the
    embedder or the `embedding` after it.
    """

    mode: Literal["default", "paper", "reference"] = "default"
    graph_space: Literal["scaled", "counts"] | None = None
    n_components: int = 20
    n_neighbors: int = 40
    search: Literal["exact", "approximate"] = "exact"
    approximate_from: int = 0
    self_loops: bool = True
    bandwidth: Literal["pairs", "cross"] | None = None
    n_bandwidth_pairs: int = 0
    sparsity_cdf: Literal["midrank", "upper", "linspace"] | None = None
    sparsity_match: Literal["rank", "argsort"] | None = None
    sparsity_genes: Literal["shared", "all"] | None = None
    support: Literal["frozen", "largest", "redrawn"] | None = None
    stopping: Literal["relative", "absolute"] | None = None
    max_iterations: int = 40
    tolerance: float = 1e-3
    split: Literal["none", "stripes"] | None = None
    storage: Literal["float32", "float16"] = "float32"
    diffuse: Literal["counts", "embedding"] = "counts"
    alpha: float = 1.0
    keep_observed: bool = False
    cap_final: bool = False
    random_state: int = 0

    def __post_init__(self) -> None:
        _require(self.mode in _MODES, "mode", self.mode, "'default', 'paper' or 'reference'")
        for name, value in _MODES[self.mode].items():
            if getattr(self, name) in (None, 0):
                object.__setattr__(self, name, value)
        for name, choices in _CHOICES.items():
            _require(getattr(self, name) in choices, name, getattr(self, name), "one of " + ", ".join(choices))
        _require(self.n_neighbors >= 1, "n_neighbors", self.n_neighbors, "at least 1")
        _require(self.n_components >= 1, "n_components", self.n_components, "at least 1")
        _require(self.approximate_from >= 0, "approximate_from", self.approximate_from, "not negative")
        _require(self.max_iterations >= 1, "max_iterations", self.max_iterations, "at least 1")
        _require(self.tolerance > 0, "tolerance", self.tolerance, "positive")
        _require(0.0 <= self.alpha <= 1.0, "alpha", self.alpha, "between 0 and 1")
        _require(
            self.support != "frozen" or self.stopping == "relative",
            "stopping",
            self.stopping,
            "'relative' with a frozen support, which settles; give support='redrawn' or 'largest' with 'absolute'",
        )
        _require(self.n_bandwidth_pairs >= 1, "n_bandwidth_pairs", self.n_bandwidth_pairs, "at least 1")


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
        _require(1 <= self.n_factors <= 512, "n_factors", self.n_factors, "between 1 and 512")
        _require(self.ridge > 0, "ridge", self.ridge, "positive")
        _require(self.device_memory_mb >= 1, "device_memory_mb", self.device_memory_mb, "at least 1")
        _require(self.mode in ("default", "reference"), "mode", self.mode, "'default' or 'reference'")
        precisions = ("float32", "bfloat16", "float16")
        _require(self.precision in precisions, "precision", self.precision, "one of " + ", ".join(precisions))
        if self.name == "scgpt" and not self.checkpoint:
            raise InputError(
                "the scgpt embedder needs a checkpoint folder: say `scgpt:DIR`, or set embedder.checkpoint"
            )


@dataclass(frozen=True)
class AutoencoderConfig:
    """LLOKI-CAE: weights of the three losses (equation 9) and the training of the encoder.

    The conservation loss is quadratic in the scale of the embedding and the triplet margin is not, so a weight means
    something only together with an embedder. The default suits the unit vectors of the `reference` embedder; the
    published 250 belongs to scGPT.
    """

    reconstruction_weight: float = 1.0
    triplet_weight: float = 0.2
    conservation_weight: float = 1.0
    margin: float = 1.0
    n_neighbors_mutual: int = 40
    n_neighbors_conservation: int = 30
    token_size: int = 10
    learning_rate: float = 5e-4
    weight_decay: float = 1e-4
    n_epochs: int = 40
    chunk_cells: int = 4000
    max_cells_per_technology: int = 20_000
    random_state: int = 0

    def __post_init__(self) -> None:
        for name in ("reconstruction_weight", "triplet_weight", "conservation_weight", "margin", "weight_decay"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "not negative")
        for name in ("n_neighbors_mutual", "n_neighbors_conservation", "token_size", "n_epochs"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "positive")
        _require(self.chunk_cells >= 2, "chunk_cells", self.chunk_cells, "at least 2")
        _require(
            self.max_cells_per_technology >= 2, "max_cells_per_technology", self.max_cells_per_technology, "at least 2"
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


def _require(condition: bool, name: str, value: Any, wanted: str) -> None:
    if not condition or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(f"{name} is {value!r}: it has to be {wanted}")
