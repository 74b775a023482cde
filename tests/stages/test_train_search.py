"""Choosing settings on held-out cells: what is compared, what is kept, and what is told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.embeddings import draw_embeddings, write_samples

from lloki_atlas.config import AutoencoderConfig, to_dict
from lloki_atlas.errors import InputError
from lloki_atlas.stages.train import train
from lloki_atlas.stages.train_search import FACTORS, candidates, search

CONFIG = AutoencoderConfig(n_epochs=2, chunk_cells=600, held_out=0.3, conservation_weight=2.0, search=True)


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[dict[str, Any]]:
    values = {name: [draw_embeddings(900, code, seed=0)] for code, name in enumerate(("A", "B"))}
    return write_samples(tmp_path_factory.mktemp("embeddings"), values)


def checkpoint(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "autoencoder.json").read_text())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def searched(samples, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("searched")
    train(str(folder), samples, to_dict(CONFIG), None, n_threads=1)
    return folder


def test_candidates_differ_in_the_conservation_weight_alone():
    found = candidates(CONFIG)
    assert [config.conservation_weight for config in found] == [2.0 * factor for factor in FACTORS]
    assert {dataclasses.replace(config, conservation_weight=0.0) for config in found} == {
        dataclasses.replace(CONFIG, conservation_weight=0.0)
    }


def test_a_weight_of_zero_leaves_one_candidate():
    assert len(candidates(dataclasses.replace(CONFIG, conservation_weight=0.0))) == 1


def made_up(scores: dict[float, list[float]]):
    def trained(config: AutoencoderConfig, suffix: str):
        history = []
        for epoch, score in enumerate(scores[config.conservation_weight], start=1):
            best = 1 + int(np.argmax(scores[config.conservation_weight][:epoch]))
            held_out = {"held_out_biology": score, "held_out_batch": score, "held_out_score": score}
            history.append({"epoch": epoch, "best_epoch": best, **held_out})
        return f"model{suffix}", history

    return trained


@pytest.mark.parametrize(
    ("scores", "weight", "epoch"),
    [
        ({0.8: [0.1, 0.5], 2.0: [0.6, 0.4], 5.0: [0.2, 0.3]}, 2.0, 1),
        ({0.8: [0.1, 0.7], 2.0: [0.6, 0.4], 5.0: [0.2, 0.7]}, 0.8, 2),  # the first of equals
    ],
)
def test_the_best_epoch_of_the_best_candidate_is_kept(scores, weight: float, epoch: int):
    config, (model, _), table = search(CONFIG, made_up(scores))
    number = list(scores).index(weight)
    assert config.conservation_weight == weight
    assert model == f"model.{number}"
    assert table[number]["epoch"] == epoch
    assert [row["conservation_weight"] for row in table] == list(scores)
    assert table[number]["score"] == max(max(values) for values in scores.values())


def test_the_checkpoint_tells_what_was_compared_and_holds_the_settings_chosen(searched: Path):
    description = checkpoint(searched)
    table = description["lineage"]["search"]
    best = max(table, key=lambda row: row["score"])
    assert description["config"]["conservation_weight"] == best["conservation_weight"]
    assert len(table) == len(FACTORS)
    for row in table:
        assert row["score"] == pytest.approx(0.6 * row["biology"] + 0.4 * row["batch"])
    assert description["history"][best["epoch"] - 1]["held_out_score"] == best["score"]


def test_what_is_scored_is_not_trained_on(searched: Path):
    lineage = checkpoint(searched)["lineage"]
    assert lineage["n_held_out"] > 0
    assert lineage["n_cells"] + lineage["n_held_out"] == 1800


def test_a_search_that_goes_on_from_its_states_ends_in_the_same_bytes(samples, searched: Path, tmp_path: Path):
    for attempt in ("first", "second"):
        folder = tmp_path / attempt
        train(str(folder), samples, to_dict(CONFIG), None, state=str(tmp_path / "state"), n_threads=2)
        assert content(folder) == content(searched)


def test_too_few_cells_to_hold_any_out_are_refused(tmp_path: Path):
    samples = write_samples(tmp_path, {"A": [draw_embeddings(60, 0, seed=0)], "B": [draw_embeddings(60, 1, seed=0)]})
    with pytest.raises(InputError, match=r"leave autoencoder\.search off"):
        train(str(tmp_path / "model"), samples, to_dict(CONFIG), None)
