"""LLOKI-CAE as stages: the sample, labels, the checkpoint that training leaves, and encoding tile by tile."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.atlases import CONFIG, N_CELLS, SLICES, embedding

from lloki_atlas.config import AutoencoderConfig, to_dict
from lloki_atlas.errors import InputError
from lloki_atlas.models import training as models_training
from lloki_atlas.models.autoencoder import ConditionalAutoencoder
from lloki_atlas.models.autoencoder_files import load_encoder
from lloki_atlas.models.encoder import FrozenEncoder
from lloki_atlas.stages import train as stage
from lloki_atlas.stages.integrate import LATENT_SIZE, run_tile
from lloki_atlas.stages.lineage import expected_objects
from lloki_atlas.stages.train import (
    checkpoint_description,
    label_codes,
    plan_training,
    platform_name,
    sample_cells,
    train,
)
from lloki_atlas.store.catalog import open_catalog


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 60), st.integers(1, 80), st.text(max_size=5))
def test_a_sample_is_a_sorted_subset_of_at_most_the_size_asked_for(n_cells, size, key):
    candidates = np.arange(n_cells) * 3
    drawn = sample_cells(candidates, size=size, key=key)
    assert len(drawn) == min(size, n_cells)
    assert (np.diff(drawn) > 0).all()
    assert np.isin(drawn, candidates).all()


def test_a_sample_follows_from_its_key():
    cells = np.arange(1000)
    draws = [sample_cells(cells, size=50, key=key).tobytes() for key in ("a/0", "a/0", "a/1", "b/0")]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


def test_labels_are_numbered_in_alphabetical_order_and_gaps_are_negative():
    labels = np.array(["T", "nan", "B", "", "T", "None", "Unassigned", "unlabelled"], dtype=object)
    np.testing.assert_array_equal(label_codes(labels), [1, -1, 0, -1, 1, -1, -1, -1])


def test_no_labels_at_all_are_all_gaps():
    np.testing.assert_array_equal(label_codes(np.array(["", "nan"], dtype=object)), [-1, -1])


@pytest.fixture(scope="module")
def catalog(built):
    return open_catalog(built)


@pytest.fixture(scope="module")
def records(catalog):
    return [catalog.slice(slice_id) for slice_id in SLICES]


@pytest.fixture(scope="module")
def keys(catalog, records):
    return {record.slice_id: expected_objects(catalog, record) for record in records}


@pytest.fixture(scope="module")
def encoder(catalog):
    return load_encoder(catalog.path("models", catalog.state.models["autoencoder"]))


def test_a_platform_is_a_technology_and_a_panel(records):
    assert platform_name(records[0]) == f"SimFISH|{records[0].panel}"


def test_slices_of_one_technology_with_other_panels_are_other_platforms(records):
    other = dataclasses.replace(records[0], panel="p" * 32)
    assert platform_name(other) != platform_name(records[0])


def test_a_cell_without_a_vector_has_none_after_encoding(catalog, encoder):
    rows = embedding(catalog, "simfish_1").copy()
    rows[[0, 5]] = np.nan
    encoded = run_tile(rows, platform_name(catalog.slice("simfish_1")), encoder)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(encoded).any(axis=1)), [0, 5])


def test_encoding_gives_128_numbers_a_cell(catalog, encoder):
    encoded = run_tile(embedding(catalog, "simfish_1"), platform_name(catalog.slice("simfish_1")), encoder)
    assert (encoded.shape, encoded.dtype) == ((N_CELLS, LATENT_SIZE), np.float32)


@settings(deadline=None, max_examples=10)
@given(st.integers(1, N_CELLS - 1))
def test_any_split_of_a_slice_is_encoded_to_the_same_bytes(cut):
    rows, encoder = np.random.default_rng(0).normal(size=(N_CELLS, 512)).astype(np.float16), random_encoder()
    parts = [run_tile(part, "a|b", encoder) for part in (rows[:cut], rows[cut:])]
    assert np.concatenate(parts).tobytes() == run_tile(rows, "a|b", encoder).tobytes()


def random_encoder():
    return FrozenEncoder(ConditionalAutoencoder(["a|b"], random_state=1))


def test_stored_vectors_are_those_of_the_whole_slice_at_once(catalog, encoder):
    for slice_id in SLICES:
        whole = run_tile(embedding(catalog, slice_id), platform_name(catalog.slice(slice_id)), encoder)
        assert whole.tobytes() == embedding(catalog, slice_id, "X_lloki").tobytes()


def training(catalog, records, keys, **options):
    return plan_training(catalog, records, keys, **{"model_key": "model", "label_key": None, **options})


def trained(catalog, records, keys, folder, label_key=None, **config):
    task = training(catalog, records, keys)
    values = to_dict(dataclasses.replace(CONFIG.autoencoder, n_epochs=1, **config))
    train(str(folder), task.arguments["samples"], values, label_key)
    return folder


def test_a_checkpoint_says_what_it_was_made_of(catalog, keys):
    lineage = checkpoint_description(catalog, catalog.state.models["autoencoder"])["lineage"]
    assert lineage == {
        "slices": {slice_id: keys[slice_id]["embed"] for slice_id in SLICES},
        "label_key": None,
        "n_cells": 2 * N_CELLS,
    }


def test_training_again_gives_the_same_bytes(catalog, records, keys, tmp_path):
    one, two = (trained(catalog, records, keys, tmp_path / name) for name in "ab")
    files = sorted(path.name for path in one.iterdir())
    assert [(one / name).read_bytes() for name in files] == [(two / name).read_bytes() for name in files]


def test_the_order_of_slices_does_not_change_the_samples(catalog, records, keys):
    tasks = [training(catalog, chosen, keys) for chosen in (records, records[::-1])]
    assert tasks[0].arguments == tasks[1].arguments


def test_labels_change_what_is_learned(catalog, records, keys, tmp_path):
    without = trained(catalog, records, keys, tmp_path / "without")
    labelled = trained(catalog, records, keys, tmp_path / "with", "cell_type_coarse")
    weights = [(folder / "weights.safetensors").read_bytes() for folder in (without, labelled)]
    assert weights[0] != weights[1]


def test_a_label_column_that_a_slice_lacks_counts_as_no_labels(catalog, records, keys, tmp_path):
    without = trained(catalog, records, keys, tmp_path / "without")
    unknown = trained(catalog, records, keys, tmp_path / "unknown", "no such column")
    weights = [(folder / "weights.safetensors").read_bytes() for folder in (without, unknown)]
    assert weights[0] == weights[1]


def test_no_technology_gives_more_cells_than_its_share(catalog, records, keys, tmp_path, monkeypatch):
    seen = {}

    def note(embeddings, platform, slice_codes, platforms, *, original=models_training.train_autoencoder_on, **options):
        seen.update(zip(platforms, np.bincount(platform).tolist(), strict=True))
        return original(embeddings, platform, slice_codes, platforms, **options)

    monkeypatch.setattr(models_training, "train_autoencoder_on", note)
    trained(catalog, records, keys, tmp_path / "model", max_cells_per_technology=20)
    assert seen == {platform_name(record): 20 for record in records}


def test_cells_without_a_vector_are_not_trained_on(catalog, records, keys, tmp_path, monkeypatch):
    rows = {record.slice_id: embedding(catalog, record.slice_id).copy() for record in records}
    rows["simfish_1"][:7] = np.nan
    by_path = {str(catalog.path("embeddings", keys[name]["embed"])): values for name, values in rows.items()}
    monkeypatch.setattr(stage, "read_arrays", lambda path, names: {"X_fp": by_path[path]})
    folder = trained(catalog, records, keys, tmp_path / "model")
    assert json.loads((folder / "autoencoder.json").read_bytes())["lineage"]["n_cells"] == 2 * N_CELLS - 7


def test_training_on_no_slice_is_refused(catalog, keys):
    with pytest.raises(InputError, match="no slice to train the autoencoder on: ingest some first"):
        training(catalog, [], keys)


def test_labels_that_no_slice_has_are_refused_with_those_there_are(catalog, records, keys):
    with pytest.raises(InputError, match="no slice to train on has the label column 'clas': choose from cell_type_co"):
        training(catalog, records, keys, label_key="clas")


def test_training_counts_the_cells_it_samples(catalog, records, keys):
    assert training(catalog, records, keys).n_cells == 2 * N_CELLS


def test_memory_of_training_holds_the_largest_slice(catalog, records, keys):
    small = training(catalog, records, keys).projected_memory
    large = [dataclasses.replace(records[0], n_cells=10**7), records[1]]
    assert training(catalog, large, keys).projected_memory - small > 10**7 * 512 * 2 * 0.99


def test_training_needs_the_sample_alone_where_slices_are_large(catalog, records, keys):
    large = [dataclasses.replace(record, n_cells=10**7) for record in records]
    assert training(catalog, large, keys).n_cells == 2 * AutoencoderConfig().max_cells_per_technology
