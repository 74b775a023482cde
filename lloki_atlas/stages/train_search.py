"""Choose the weight of conserved distances and the number of epochs on cells that no candidate is trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from lloki_atlas.config import AutoencoderConfig

if TYPE_CHECKING:
    from lloki_atlas.models.autoencoder import ConditionalAutoencoder

# a model and the losses of its epochs
Trained: TypeAlias = "tuple[ConditionalAutoencoder, list[dict[str, float]]]"

# of the conservation weight that is asked for: it is what trades mixing for exactness
FACTORS = (0.4, 1.0, 2.5)


def candidates(config: AutoencoderConfig) -> list[AutoencoderConfig]:
    """Settings that a search compares."""
    weights = (config.conservation_weight * factor for factor in FACTORS)
    return [dataclasses.replace(config, conservation_weight=weight) for weight in dict.fromkeys(weights)]


def search(
    config: AutoencoderConfig, train: Callable[[AutoencoderConfig, str], Trained]
) -> tuple[AutoencoderConfig, Trained, list[dict[str, float]]]:
    """Train every candidate and keep the one whose best epoch scores highest on the held-out cells.

    Parameters
    ----------
    config
        The settings asked for.
    train
        Trains a candidate; the text sets its files apart.

    Returns
    -------
    The settings chosen, the model and its history, and for each candidate its `conservation_weight`, best `epoch`, and
    that epoch's `biology`, `batch` and `score` of the held-out cells.
    """
    chosen: tuple[AutoencoderConfig, Trained] | None = None
    table: list[dict[str, float]] = []
    for number, candidate in enumerate(candidates(config)):
        found = train(candidate, f".{number}")
        row = _row(candidate, found[1])
        if chosen is None or row["score"] > max(other["score"] for other in table):
            chosen = candidate, found
        table.append(row)
    assert chosen is not None, "there is always a candidate"
    return *chosen, table


def _row(candidate: AutoencoderConfig, history: list[dict[str, float]]) -> dict[str, Any]:
    best = history[int(history[-1]["best_epoch"]) - 1]
    scores = {name: best[f"held_out_{name}"] for name in ("biology", "batch", "score")}
    return {"conservation_weight": candidate.conservation_weight, "epoch": int(best["epoch"]), **scores}
