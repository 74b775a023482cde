"""Training as a task: what it reads and leaves, that it goes on where it was stopped, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.atlases import CONFIG, N_CELLS, SLICES
from support.embeddings import draw_embeddings, write_samples
from support.stores import tiny_slice, write_slice

from lloki_atlas.config import AutoencoderConfig, to_dict
from lloki_atlas.errors import CheckpointError, InputError
from lloki_atlas.models.autoencoder_files import load_encoder
from lloki_atlas.stages import train as stage
from lloki_atlas.stages.lineage import expected_objects
from lloki_atlas.stages.train import checkpoint_description, plan_training, platform_name, token_name, train
from lloki_atlas.stages.train_report import TERMS
from lloki_atlas.store.catalog import open_catalog

SMALL = AutoencoderConfig(
    preset="paper", n_epochs=3, chunk_cells=300, n_neighbors_mutual=10, n_neighbors_conservation=5
)
FILES = ("weights.safetensors", "autoencoder.json", "loss_curves.svg")


# --- on the atlas of the tests


@pytest.fixture(scope="module")
def catalog(built):
    return open_catalog(built)


@pytest.fixture(scope="module")
def records(catalog):
    return [catalog.slice(slice_id) for slice_id in SLICES]


@pytest.fixture(scope="module")
def keys(catalog, records):
    return {record.slice_id: expected_objects(catalog, record) for record in records}


def training(catalog, records, keys, **options):
    return plan_training(catalog, records, keys, **{"model_key": "model", "label_key": None, **options})


def trained(catalog, records, keys, folder, label_key=None, **config):
    task = training(catalog, records, keys)
    values = to_dict(dataclasses.replace(CONFIG.autoencoder, n_epochs=1, **config))
    train(str(folder), task.arguments["samples"], values, label_key)
    return folder


def content(folder):
    return {name: (Path(folder) / name).read_bytes() for name in FILES}


def test_a_platform_is_a_technology_and_a_panel(records):
    assert platform_name(records[0]) == f"SimFISH|{records[0].panel}"


def test_slices_of_one_technology_with_other_panels_are_other_platforms(records):
    other = dataclasses.replace(records[0], panel="p" * 32)
    assert platform_name(other) != platform_name(records[0])


def test_a_token_is_that_of_the_platform_or_of_the_slice(records):
    platform = platform_name(records[0])
    assert token_name(records[0], "platform") == platform
    assert token_name(records[0], "slice") == f"{platform}|simfish_1"


def test_a_checkpoint_says_what_it_was_made_of(catalog, keys):
    lineage = checkpoint_description(catalog, catalog.state.models["autoencoder"])["lineage"]
    assert lineage == {
        "slices": {slice_id: keys[slice_id]["embed"] for slice_id in SLICES},
        "label_key": None,
        "n_cells": 2 * N_CELLS,
    }


def test_the_order_of_slices_does_not_change_the_samples(catalog, records, keys):
    tasks = [training(catalog, chosen, keys) for chosen in (records, records[::-1])]
    assert tasks[0].arguments == tasks[1].arguments


def test_labels_change_what_is_learned(catalog, records, keys, tmp_path):
    without = trained(catalog, records, keys, tmp_path / "without")
    labelled = trained(catalog, records, keys, tmp_path / "with", "cell_type_coarse")
    assert content(without)["weights.safetensors"] != content(labelled)["weights.safetensors"]


def test_a_label_column_that_a_slice_lacks_counts_as_no_labels(catalog, records, keys, tmp_path):
    without = trained(catalog, records, keys, tmp_path / "without")
    with pytest.warns(UserWarning, match="no cell has a label"):
        unknown = trained(catalog, records, keys, tmp_path / "unknown", "no such column")
    assert content(without)["weights.safetensors"] == content(unknown)["weights.safetensors"]


def test_training_on_no_slice_is_refused(catalog, keys):
    with pytest.raises(InputError, match="no slice to train the autoencoder on: ingest some first"):
        training(catalog, [], keys)


def test_labels_that_no_slice_has_are_refused_with_those_there_are(catalog, records, keys):
    with pytest.raises(InputError, match="no slice to train on has the label column 'clas': choose from cell_type_co"):
        training(catalog, records, keys, label_key="clas")


def test_training_counts_the_cells_of_an_epoch(catalog, records, keys):
    assert training(catalog, records, keys).n_cells == 2 * N_CELLS
    large = [dataclasses.replace(record, n_cells=10**7) for record in records]
    assert training(catalog, large, keys).n_cells == 2 * AutoencoderConfig().max_cells_per_technology


def test_memory_of_training_does_not_follow_the_size_of_slices(catalog, records, keys):
    def projected(n_cells, label_key=None):
        sized = [dataclasses.replace(record, n_cells=n_cells) for record in records]
        return training(catalog, sized, keys, label_key=label_key).projected_memory

    assert projected(10**8) == projected(10**6) < 2 * 2**30
    by_label = projected(10**8, "cell_type_coarse") - projected(10**6, "cell_type_coarse")
    assert by_label == 2 * 2 * (10**8 - 10**6)


def test_a_checkpoint_between_epochs_lies_where_cleaning_up_finds_it(catalog, records, keys):
    task = training(catalog, records, keys)
    state = Path(task.arguments["state"])
    assert state.parent == catalog.root / "staging"
    assert state.match("model.*")


# --- on embeddings alone


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Three slices of two platforms, in three blocks or more each; some cells have no embedding."""
    values = {"a": [draw_embeddings(700, 0, seed=0), draw_embeddings(300, 0, seed=1)]}
    values["b"] = [draw_embeddings(600, 1, seed=0)]
    values["a"][0][5:9] = np.nan
    return write_samples(tmp_path_factory.mktemp("embeddings"), values)


@pytest.fixture(scope="module")
def whole(samples, tmp_path_factory):
    """Folder of an undisturbed training with early stopping."""
    folder = tmp_path_factory.mktemp("whole")
    train(str(folder), samples, settings_of(), None)
    return folder


def settings_of(**changes):
    return to_dict(dataclasses.replace(SMALL, **{"patience": 5, "held_out": 0.3, **changes}))


def test_training_leaves_weights_their_description_and_the_loss_curves(whole):
    assert {path.name for path in whole.iterdir()} == set(FILES)
    assert load_encoder(whole).platforms == ("a|panel", "b|panel")


def test_the_description_holds_the_history_with_the_held_out_cells(whole):
    description = json.loads((whole / "autoencoder.json").read_bytes())
    assert [losses["epoch"] for losses in description["history"]] == [1, 2, 3]
    for losses in description["history"]:
        assert {f"held_out_{name}" for name in TERMS} < set(losses)
        assert losses["best_epoch"] <= losses["epoch"]
    assert description["lineage"]["n_held_out"] > 0
    assert description["lineage"]["n_cells"] < 1600 - 4


def test_training_again_gives_the_same_bytes(samples, whole, tmp_path):
    train(str(tmp_path), samples, settings_of(), None)
    assert content(tmp_path) == content(whole)


@pytest.mark.parametrize("tile_cells", [64, 333, 5000])
def test_tiles_change_no_byte(whole, tmp_path, tile_cells):
    values = {"a": [draw_embeddings(700, 0, seed=0), draw_embeddings(300, 0, seed=1)]}
    values["b"] = [draw_embeddings(600, 1, seed=0)]
    values["a"][0][5:9] = np.nan
    tiled = write_samples(tmp_path / "stores", values, tile_cells=tile_cells)
    train(str(tmp_path / "model"), tiled, settings_of(), None)
    assert content(tmp_path / "model") == content(whole)


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_threads_change_no_byte(samples, whole, tmp_path, n_threads):
    train(str(tmp_path), samples, settings_of(), None, n_threads=n_threads)
    assert content(tmp_path) == content(whole)


@pytest.mark.parametrize("n_before", [1, 2, 3])
def test_a_training_that_was_stopped_after_an_epoch_goes_on_to_the_same_bytes(
    samples, whole, tmp_path, monkeypatch, n_before
):
    class StopError(Exception):
        pass

    written = []

    def stopping(path, data, *, original=stage.write_durable):
        original(path, data)
        written.append(path)
        if len(written) == n_before:
            raise StopError

    state = tmp_path / "key.training"
    monkeypatch.setattr(stage, "write_durable", stopping)
    with pytest.raises(StopError):
        train(str(tmp_path / "model"), samples, settings_of(), None, state=str(state))
    assert not (tmp_path / "model").exists()
    train(str(tmp_path / "model"), samples, settings_of(), None, state=str(state))
    assert content(tmp_path / "model") == content(whole)
    assert len(written) == max(3, n_before)


def test_a_training_that_was_killed_goes_on_to_the_same_bytes(samples, tmp_path):
    settings = settings_of(n_epochs=15, patience=50)
    program = "import json, sys; from lloki_atlas.stages.train import train; train(**json.load(sys.stdin))"
    arguments = {"samples": samples[1:], "settings": settings, "label_key": None}
    state = tmp_path / "key.training"
    killed = {**arguments, "folder": str(tmp_path / "killed"), "state": str(state)}
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    try:
        process.stdin.write(json.dumps(killed).encode())
        process.stdin.close()
        deadline = time.monotonic() + 100
        while not state.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert state.exists()
    assert not (tmp_path / "killed").exists()
    train(**killed)
    train(**arguments, folder=str(tmp_path / "whole"))
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


@pytest.mark.parametrize("changed", ["settings", "slices", "held out"])
def test_the_state_of_another_training_is_refused_and_kept(samples, tmp_path, changed):
    state = tmp_path / "key.training"
    train(str(tmp_path / "one"), samples, settings_of(n_epochs=1), None, state=str(state))
    before = state.read_bytes()
    settings = settings_of(n_epochs=1, **({"learning_rate": 1e-3} if changed == "settings" else {}))
    chosen = samples[1:] if changed == "slices" else samples
    hold_out = False if changed == "held out" else None
    with pytest.raises(CheckpointError, match="other settings or data"):
        train(str(tmp_path / "two"), chosen, settings, None, state=str(state), hold_out=hold_out)
    assert state.read_bytes() == before
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_state_is_refused_and_kept(samples, tmp_path, damage):
    state = tmp_path / "key.training"
    train(str(tmp_path / "one"), samples, settings_of(n_epochs=1), None, state=str(state))
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes({"cut": bytes(data[:-500]), "changed": bytes(data), "empty": b""}[damage])
    before = state.read_bytes()
    with pytest.raises(CheckpointError, match=r"key\.training, it is damaged: delete it to start anew"):
        train(str(tmp_path / "two"), samples, settings_of(n_epochs=1), None, state=str(state))
    assert state.read_bytes() == before


def test_a_file_beside_the_state_tells_of_the_progress(samples, whole, tmp_path):
    train(str(tmp_path / "model"), samples, settings_of(), None, state=str(tmp_path / "key.training"))
    told = json.loads((tmp_path / "key.training.progress").read_bytes())
    history = json.loads((whole / "autoencoder.json").read_bytes())["history"]
    assert (told["epoch"], told["n_epochs"], told["losses"]) == (3, 3, history[-1])


def test_every_epoch_is_logged_in_a_line(samples, tmp_path, caplog):
    caplog.set_level("INFO", logger="lloki_atlas")
    train(str(tmp_path), samples, settings_of(), None)
    lines = [record.message for record in caplog.records if record.message.startswith("train epoch")]
    assert [line.split(":")[0] for line in lines] == [f"train epoch {epoch}/3" for epoch in (1, 2, 3)]
    assert all("held out" in line for line in lines)


def test_slices_have_tokens_of_their_own_when_asked_for(tmp_path):
    values = {"a": [draw_embeddings(90, 0, seed=0), draw_embeddings(80, 0, seed=1)]}
    samples = write_samples(tmp_path / "stores", values, token_by="slice")
    train(str(tmp_path / "model"), samples, to_dict(dataclasses.replace(SMALL, token_by="slice")), None)
    assert load_encoder(tmp_path / "model").platforms == ("a|panel|a_0", "a|panel|a_1")


def test_fixed_chunks_are_those_of_the_first_epoch(samples, tmp_path):
    still = {"learning_rate": 1e-30, "triplet_weight": 0.0, "n_epochs": 2, "patience": 0}
    losses = {}
    for chunks in ("fixed", "redrawn"):
        train(str(tmp_path / chunks), samples, settings_of(chunks=chunks, **still), None)
        history = json.loads((tmp_path / chunks / "autoencoder.json").read_bytes())["history"]
        losses[chunks] = [epoch["conservation"] for epoch in history]
    assert losses["fixed"][0] == losses["fixed"][1]
    assert losses["redrawn"][0] != losses["redrawn"][1]


def test_one_platform_is_told_once_and_trained(tmp_path):
    samples = write_samples(tmp_path / "stores", {"a": [draw_embeddings(90, 0, seed=0)]})
    with pytest.warns(UserWarning, match="nothing to mix") as told:
        train(str(tmp_path / "model"), samples, to_dict(SMALL), None)
    assert len([one for one in told if "nothing to mix" in str(one.message)]) == 1
    history = json.loads((tmp_path / "model" / "autoencoder.json").read_bytes())["history"]
    assert history[-1]["total"] < history[0]["total"]
    assert {losses["triplet"] for losses in history} == {0.0}


def test_patience_without_cells_to_hold_out_is_told(tmp_path):
    samples = write_samples(tmp_path / "stores", {"a": [draw_embeddings(90, 0, seed=0)]})
    with pytest.warns(UserWarning, match="patience has no effect"):
        train(str(tmp_path / "model"), samples, settings_of(patience=1), None)
    history = json.loads((tmp_path / "model" / "autoencoder.json").read_bytes())["history"]
    assert len(history) == 3


def test_a_platform_without_an_embedding_is_refused_by_name(tmp_path):
    values = {"a": [draw_embeddings(90, 0, seed=0)], "b": [np.full((40, 512), np.nan, np.float16)]}
    samples = write_samples(tmp_path / "stores", values)
    with pytest.raises(InputError, match=r"no cell of 'b\|panel' that could be trained on has an embedding"):
        train(str(tmp_path / "model"), samples, to_dict(SMALL), None)
    assert not (tmp_path / "model").exists()


def test_losses_that_are_not_finite_name_the_setting_and_leave_no_state(samples, tmp_path):
    state = tmp_path / "key.training"
    with pytest.raises(InputError, match=r"autoencoder\.learning_rate"):
        train(str(tmp_path / "model"), samples, settings_of(learning_rate=1e18, patience=0), None, state=str(state))
    assert not (tmp_path / "model").exists()


def test_labels_of_one_class_are_told_and_change_nothing(samples, whole, tmp_path):
    data = tiny_slice(700)
    data.obs["cell_type"] = "T"
    store = write_slice(tmp_path / "slice.zarr", data, label_columns=["cell_type"])
    labelled = [sample | {"slice_path": str(store)} for sample in samples]
    with pytest.warns(UserWarning, match="all labels are the same"):
        train(str(tmp_path / "model"), labelled, settings_of(), "cell_type")
    assert content(tmp_path / "model")["weights.safetensors"] == content(whole)["weights.safetensors"]
