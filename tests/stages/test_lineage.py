"""Content keys: each changes exactly with what its stage is made of, and nothing else decides what runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lloki_atlas.config import AtlasConfig, to_dict
from lloki_atlas.stages import lineage
from lloki_atlas.stages.lineage import (
    STAGES,
    atlas_config,
    encoder_key,
    expected_objects,
    integrate_key,
    model_key,
    platform_name,
    stage_status,
    token_key,
    token_name,
)
from lloki_atlas.store.catalog import Catalog
from lloki_atlas.store.records import STAGE_KINDS, CatalogState, SliceRecord

CONFIG = AtlasConfig()
FROM_TILE = {"tile", "propagate", "embed", "integrate"}
FROM_PROPAGATE = {"propagate", "embed", "integrate"}
FROM_EMBED = {"embed", "integrate"}
FROM_PANEL = {"reference", "embed", "integrate"}
# (section, setting, another value) -> stages whose output becomes stale
SETTINGS = [
    ("tile", "tile_cells", 7, set()),
    ("tile", "slice_memory_mb", 7, set()),
    ("tile", "search_cells", 7, set()),
    ("propagation", "n_bandwidth_pairs", 7, FROM_TILE),
    ("propagation", "random_state", 7, FROM_TILE),
    ("propagation", "mode", "paper", FROM_PROPAGATE),
    ("propagation", "graph_space", "counts", FROM_PROPAGATE),
    ("propagation", "n_components", 7, FROM_PROPAGATE),
    ("propagation", "n_neighbors", 7, FROM_PROPAGATE),
    ("propagation", "search", "approximate", FROM_PROPAGATE),
    ("propagation", "approximate_from", 7, FROM_PROPAGATE),
    ("propagation", "self_loops", False, FROM_PROPAGATE),
    ("propagation", "bandwidth", "cross", FROM_PROPAGATE),
    ("propagation", "sparsity_cdf", "upper", FROM_PROPAGATE),
    ("propagation", "sparsity_match", "argsort", FROM_PROPAGATE),
    ("propagation", "sparsity_genes", "all", FROM_PROPAGATE),
    ("propagation", "support", "redrawn", FROM_PROPAGATE),
    ("propagation", "stopping", "absolute", FROM_PROPAGATE),
    ("propagation", "max_iterations", 7, FROM_PROPAGATE),
    ("propagation", "tolerance", 0.5, FROM_PROPAGATE),
    ("propagation", "split", "stripes", FROM_PROPAGATE),
    ("propagation", "storage", "float16", FROM_PROPAGATE),
    ("propagation", "alpha", 0.5, FROM_EMBED),
    ("propagation", "keep_observed", True, FROM_EMBED),
    ("propagation", "cap_final", True, FROM_EMBED),
    ("propagation", "diffuse", "embedding", FROM_EMBED),
    ("embedder", "device", "cpu", set()),
    ("autoencoder", "n_epochs", 7, set()),
]


def make_catalog(config=CONFIG, **state):
    values = {"reference": "ref", "models": {"embedder": "emb", "autoencoder": "enc"}, **state}
    return Catalog(Path("/nowhere"), 1, CatalogState(config=to_dict(config), **values))


def make_record(**parts):
    values = {"technology": "MERFISH", "organism": "mouse", "panel": "p1", "n_cells": 9, "n_genes": 4, **parts}
    return SliceRecord(
        slice_id=values.pop("slice_id", "one"), objects=values.pop("objects", {"ingest": "i1"}), **values
    )


def changed(first, second):
    assert set(first) == set(second) == set(STAGES)
    return {stage for stage in STAGES if first[stage] != second[stage]}


BASE = expected_objects(make_catalog(), make_record())


@pytest.mark.parametrize(("section", "name", "value", "stale"), SETTINGS)
def test_a_setting_makes_exactly_the_stages_stale_that_read_it(section, name, value, stale):
    # an absolute change never gets small while a frozen support is the rule
    needed = {"support": "largest"} if name == "stopping" else {}
    base = dataclasses.replace(CONFIG, **{section: dataclasses.replace(getattr(CONFIG, section), **needed)})
    part = dataclasses.replace(getattr(base, section), **{name: value})
    other = dataclasses.replace(CONFIG, **{section: part})
    before = expected_objects(make_catalog(base), make_record())
    assert changed(before, expected_objects(make_catalog(other), make_record())) == stale


def test_the_table_above_has_every_setting_that_propagation_and_tiles_have():
    fields = {(s, f.name) for s in ("tile", "propagation") for f in dataclasses.fields(getattr(CONFIG, s))}
    assert fields == {row[:2] for row in SETTINGS if row[0] in ("tile", "propagation")}


@pytest.mark.parametrize(
    ("catalog", "record", "stale"),
    [
        ({"reference": "another"}, {}, {"tile", *FROM_PROPAGATE, "reference"}),
        ({"models": {"embedder": "another", "autoencoder": "enc"}}, {}, FROM_PANEL),
        ({"models": {"embedder": "emb", "autoencoder": "another"}}, {}, {"integrate"}),
        ({}, {"objects": {"ingest": "i2"}}, {"ingest", *FROM_TILE}),
        ({}, {"panel": "p2"}, FROM_PANEL),
        ({}, {"slice_id": "two"}, set()),
        ({}, {"label_columns": ("type",)}, set()),
    ],
    ids=["reference", "embedder", "autoencoder", "counts", "panel", "name alone", "label columns"],
)
def test_an_input_makes_exactly_the_stages_stale_that_are_made_of_it(catalog, record, stale):
    assert changed(BASE, expected_objects(make_catalog(**catalog), make_record(**record))) == stale


@pytest.mark.parametrize(
    ("stage", "stale"),
    [("tile", FROM_TILE), ("reference", FROM_PANEL), ("propagate", FROM_PROPAGATE), ("integrate", {"integrate"})],
)
def test_a_new_version_of_a_stage_makes_it_and_what_follows_stale(monkeypatch, stage, stale):
    monkeypatch.setitem(lineage.VERSIONS, stage, lineage.VERSIONS[stage] + 1)
    assert changed(BASE, expected_objects(make_catalog(), make_record())) == stale


def test_slices_of_one_panel_share_what_it_takes_from_the_reference():
    other = make_record(slice_id="two", objects={"ingest": "i2"})
    assert expected_objects(make_catalog(), other)["reference"] == BASE["reference"]


def test_keys_of_different_stages_differ():
    assert len(set(BASE.values())) == len(STAGES)


def test_without_an_autoencoder_no_integration_is_expected():
    assert "integrate" not in expected_objects(make_catalog(models={"embedder": "emb"}), make_record())


def test_what_a_record_holds_of_later_stages_does_not_change_what_is_expected():
    record = make_record(objects={"ingest": "i1", "embed": "something-old"})
    assert expected_objects(make_catalog(), record) == BASE


def test_every_stage_has_a_kind_of_object():
    assert set(STAGES) == set(STAGE_KINDS)


def test_settings_come_back_from_the_catalog_as_they_went_in():
    config = AtlasConfig.from_dict({"propagation": {"alpha": 0.25}, "tile": {"tile_cells": 3}})
    assert atlas_config(make_catalog(config)) == config


KEYS = {"a": "k1", "b": "k2"}
MODEL = model_key(CONFIG, KEYS, None)


CHOICES = {
    "preset": "paper",
    "start": {"isometric": "random", "random": "isometric"},
    "equations": "paper",
    "negatives": {"none": "slice", "slice": "none"},
    "pair_space": {"latent": "embedding", "embedding": "latent"},
    "pairing": "published",
    "token_by": "slice",
    "chunks": "fixed",
    "held_out": 0.2,
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(CONFIG.autoencoder)])
def test_a_model_has_another_key_with_another_setting_of_the_autoencoder(name):
    value = getattr(CONFIG.autoencoder, name)
    choice = CHOICES.get(name)
    changed = choice.get(value) if isinstance(choice, dict) else choice or value + 1
    other = dataclasses.replace(CONFIG.autoencoder, **{name: changed})
    assert other != CONFIG.autoencoder
    assert model_key(dataclasses.replace(CONFIG, autoencoder=other), KEYS, None) != MODEL


@pytest.mark.parametrize(
    ("keys", "label_key"),
    [({"a": "k1"}, None), ({"a": "k1", "b": "k3"}, None), ({"a": "k1", "c": "k2"}, None), (KEYS, "cell_type")],
    ids=["fewer slices", "another embedding", "another slice", "labels"],
)
def test_a_model_has_another_key_with_another_training_set(keys, label_key):
    assert model_key(CONFIG, keys, label_key) != MODEL


@pytest.mark.parametrize("section", ["tile", "propagation", "embedder"])
def test_settings_that_training_does_not_read_leave_the_model_as_it_is(section):
    other = AtlasConfig.from_dict(
        {"tile": {"tile_cells": 3}, "propagation": {"alpha": 0.1}, "embedder": {"ridge": 1.0}}
    )
    config = dataclasses.replace(CONFIG, **{section: getattr(other, section)})
    assert model_key(config, KEYS, None) == MODEL


@settings(deadline=None, max_examples=20)
@given(st.permutations(["a", "b", "c", "d"]))
def test_the_order_in_which_slices_are_named_does_not_change_a_model(names):
    assert model_key(CONFIG, {n: f"key {n}" for n in names}, None) == model_key(
        CONFIG, {n: f"key {n}" for n in "abcd"}, None
    )


def test_an_integration_is_keyed_by_its_embedding_and_its_model():
    assert len({integrate_key(*pair) for pair in (("e", "m"), ("e2", "m"), ("e", "m2"), ("m", "e"))}) == 4


# tokens

MODELS = {"embedder": "emb", "autoencoder": "enc"}


def test_without_a_token_of_its_own_a_slice_is_keyed_as_it_was_before_there_were_any():
    # the key of a finished atlas: another one would have every slice encoded anew
    other = make_catalog(models={**MODELS, "token:MERFISH|another panel": "tok"})
    assert expected_objects(other, make_record()) == BASE
    assert BASE["integrate"] == integrate_key(BASE["embed"], "enc")
    assert encoder_key(other, make_record()) == "enc"


def test_a_token_of_its_platform_encodes_a_slice():
    adapted = make_catalog(models={**MODELS, "token:MERFISH|p1": "tok"})
    assert encoder_key(adapted, make_record()) == "tok"
    assert changed(BASE, expected_objects(adapted, make_record())) == {"integrate"}
    assert expected_objects(adapted, make_record(panel="p2"))["integrate"] == integrate_key(
        expected_objects(make_catalog(), make_record(panel="p2"))["embed"], "enc"
    )


def test_where_tokens_are_of_slices_that_of_another_slice_encodes_nothing():
    config = dataclasses.replace(CONFIG, autoencoder=dataclasses.replace(CONFIG.autoencoder, token_by="slice"))
    adapted = make_catalog(config, models={**MODELS, "token:MERFISH|p1|one": "tok"})
    assert [encoder_key(adapted, make_record(slice_id=name)) for name in ("one", "two")] == ["tok", "enc"]


def test_a_token_is_named_by_its_platform_or_by_its_slice():
    record = make_record()
    assert platform_name(record) == token_name(record, "platform") == "MERFISH|p1"
    assert token_name(record, "slice") == "MERFISH|p1|one"


TOKEN = {"model": "enc", "platform": "MERFISH|p1", "embed_keys": KEYS, "atlas": ["x", "y"], "random_state": 0}


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("model", "another"),
        ("platform", "MERFISH|p2"),
        ("embed_keys", {"a": "k1"}),
        ("embed_keys", {"a": "k1", "b": "k3"}),
        ("atlas", ["x"]),
        ("random_state", 1),
    ],
)
def test_a_token_has_another_key_when_it_is_made_of_something_else(part, value):
    assert token_key(**{**TOKEN, part: value}) != token_key(**TOKEN)


def test_the_order_of_slices_does_not_change_a_token():
    turned = {"embed_keys": dict(reversed(KEYS.items())), "atlas": ["y", "x"]}
    assert token_key(**{**TOKEN, **turned}) == token_key(**TOKEN)


def test_a_new_version_of_adapting_makes_tokens_and_no_autoencoder_stale(monkeypatch):
    before = token_key(**TOKEN), model_key(CONFIG, KEYS, None)
    monkeypatch.setitem(lineage.VERSIONS, "adapt", lineage.VERSIONS["adapt"] + 1)
    after = token_key(**TOKEN), model_key(CONFIG, KEYS, None)
    assert (before[0] == after[0], before[1] == after[1]) == (False, True)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_stage_is_missing_done_or_stale(stage):
    catalog = make_catalog()
    held = {"missing": None, "done": BASE[stage], "stale": "made-of-something-else"}
    for status, key in held.items():
        record = make_record(objects={"ingest": "i1", **({stage: key} if key else {})})
        assert stage_status(catalog, record)[stage] == status


def test_what_was_ingested_is_always_done():
    assert stage_status(make_catalog(), make_record())["ingest"] == "done"


def test_an_integration_without_a_model_is_stale():
    record = make_record(objects={"ingest": "i1", "integrate": "left-over"})
    assert stage_status(make_catalog(models={"embedder": "emb"}), record)["integrate"] == "stale"
