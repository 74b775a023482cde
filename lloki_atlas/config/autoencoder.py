"""Settings of LLOKI-CAE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lloki_atlas.config.checks import require

# what a preset decides for fields that are not given. `paper` is the published form, on the scale of the published
# code, to which the weights that the paper prints belong; `reference` does as that code does, oddities included
_PUBLISHED: dict[str, Any] = {
    "start": "random",
    "reconstruction_weight": 1.0,
    "triplet_weight": 0.2,
    "conservation_weight": 250.0,
    "pair_space": "latent",
    "negatives": "slice",
    "n_neighbors_mutual": 40,
    "n_neighbors_mean": 0,
    "n_neighbors_conservation": 30,
    "n_distant": 0,
    "n_epochs": 50,
    "chunk_cells": 4000,
}
_PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "start": "isometric",
        "reconstruction_weight": 1.0,
        "triplet_weight": 1.0,
        "conservation_weight": 5.0,
        "pair_space": "embedding",
        "negatives": "none",
        "n_neighbors_mutual": 10,
        "n_neighbors_mean": 15,
        "n_neighbors_conservation": 10,
        "n_distant": 5,
        "n_epochs": 20,
        "chunk_cells": 4000,
    },
    "paper": _PUBLISHED,
    "reference": {**_PUBLISHED, "pairing": "published", "token_by": "slice", "chunks": "fixed"},
    "mouse-brain": _PUBLISHED,
    "ovarian": {**_PUBLISHED, "conservation_weight": 500.0, "chunk_cells": 16_000},
}
_RULES: dict[str, Any] = {"pairing": "symmetric", "token_by": "platform", "chunks": "redrawn"}
_CHOICES: dict[str, tuple[str, ...]] = {
    "start": ("isometric", "random"),
    "equations": ("code", "paper"),
    "pair_space": ("latent", "embedding"),
    "negatives": ("none", "slice"),
    "pairing": ("symmetric", "published"),
    "token_by": ("platform", "slice"),
    "chunks": ("redrawn", "fixed"),
}


@dataclass(frozen=True)
class AutoencoderConfig:
    """LLOKI-CAE: weights of the three losses (equation 9) and the training of the encoder.

    `preset` decides every field that is not given: `default`, which keeps what neighbours say while it mixes
    platforms; `paper`, also called `mouse-brain`, and `ovarian`, the published form with the weights published for
    each; `reference`, the behaviour of the published code.
    (A changed preset needs new settings: `dataclasses.replace` keeps the fields that the old one decided.)
    The conservation loss is quadratic in the scale of the embedding and the triplet margin is not, so a weight means
    something only together with an embedder: the published 250 belongs to scGPT.

    Losses: `equations` is their scale: `code`, means over dimensions and neighbours and plain triplet distances, or
    `paper`, sums over dimensions and neighbours and squared triplet distances, as printed. Conserved are the distances
    to `n_neighbors_conservation` nearest cells and to `n_distant` random cells of the slice.

    Pairs: `n_neighbors_mutual` neighbours are searched across platforms in the `latent` space as it is, as published,
    or in that of the `embedding` (`pair_space`). With `n_neighbors_mean` above 0 they are searched and pulled between
    means of cells and so many of their neighbours. `negatives` are random cells of the anchor's `slice`, or there are
    `none`, and pairs are pulled by their distance alone. `pairing` is `symmetric`, or as `published`: the anchor is of
    the platform with the lower number, and a random negative may be the anchor. `token_by` is what a token stands for:
    a `platform`, which is a technology and a panel, or a `slice`. `chunks` are `redrawn` in every epoch or `fixed`.

    Training: it starts from `random` weights, or from `isometric` ones, which keep the geometry of the embeddings. An
    epoch draws at most `max_cells_per_technology` cells of each platform. With `patience` above 0 training ends after
    so many epochs in which the loss of the held-out cells has not improved, and the best epoch's weights are kept.
    `search` trains with 0.4, 1 and 2.5 times the conservation weight, and keeps the weights of the epoch that scores
    best on the held-out cells: 0.6 times the neighbours kept (or, with labels, the agreement of neighbours) and 0.4
    times the mixing of platforms. Either leaves out a share `held_out` of the cells.
    """

    preset: Literal["default", "paper", "reference", "mouse-brain", "ovarian"] = "default"
    start: Literal["isometric", "random"] = None  # type: ignore[assignment]
    equations: Literal["code", "paper"] = "code"
    reconstruction_weight: float = None  # type: ignore[assignment]
    triplet_weight: float = None  # type: ignore[assignment]
    conservation_weight: float = None  # type: ignore[assignment]
    margin: float = 1.0
    pair_space: Literal["latent", "embedding"] = None  # type: ignore[assignment]
    negatives: Literal["none", "slice"] = None  # type: ignore[assignment]
    pairing: Literal["symmetric", "published"] = None  # type: ignore[assignment]
    token_by: Literal["platform", "slice"] = None  # type: ignore[assignment]
    chunks: Literal["redrawn", "fixed"] = None  # type: ignore[assignment]
    n_neighbors_mutual: int = None  # type: ignore[assignment]
    n_neighbors_mean: int = None  # type: ignore[assignment]
    n_neighbors_conservation: int = None  # type: ignore[assignment]
    n_distant: int = None  # type: ignore[assignment]
    token_size: int = 10
    learning_rate: float = 5e-4
    weight_decay: float = 1e-4
    n_epochs: int = None  # type: ignore[assignment]
    chunk_cells: int = None  # type: ignore[assignment]
    max_cells_per_technology: int = 20_000
    held_out: float = 0.1
    patience: int = 0
    search: bool = False
    random_state: int = 0

    def __post_init__(self) -> None:
        require(self.preset in _PRESETS, "preset", self.preset, "one of " + ", ".join(_PRESETS))
        for name, value in {**_RULES, **_PRESETS[self.preset]}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, choices in _CHOICES.items():
            require(getattr(self, name) in choices, name, getattr(self, name), "one of " + ", ".join(choices))
        for name in ("reconstruction_weight", "triplet_weight", "conservation_weight", "margin", "weight_decay"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "not negative")
        for name in ("n_neighbors_mutual", "n_neighbors_conservation", "token_size", "n_epochs"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "positive")
        for name in ("chunk_cells", "max_cells_per_technology"):
            require(getattr(self, name) >= 2, name, getattr(self, name), "at least 2")
        require(0 < self.held_out < 1, "held_out", self.held_out, "between 0 and 1")
        for name in ("n_neighbors_mean", "n_distant", "patience"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "not negative")
