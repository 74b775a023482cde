"""Settings: what is refused and how it is said, tables in and out, digests."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lloki_atlas.config import (
    AtlasConfig,
    AutoencoderConfig,
    EmbedderConfig,
    PropagationConfig,
    TileConfig,
    canonical_json,
    digest,
    load_toml,
    settings_from_dict,
    to_dict,
)
from lloki_atlas.errors import InputError

KINDS = {
    "tile": TileConfig,
    "propagation": PropagationConfig,
    "embedder": EmbedderConfig,
    "autoencoder": AutoencoderConfig,
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(), part, max_size=3),
    max_leaves=10,
)


def test_defaults_survive_tables():
    assert AtlasConfig.from_dict(to_dict(AtlasConfig())) == AtlasConfig()


@pytest.mark.parametrize("section", KINDS)
def test_settings_cannot_be_changed_in_place(section):
    part = getattr(AtlasConfig(), section)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(part, dataclasses.fields(part)[0].name, 1)


def test_a_section_that_is_left_out_has_its_defaults():
    config = AtlasConfig.from_dict({"propagation": {"alpha": 0.5}})
    assert config == dataclasses.replace(AtlasConfig(), propagation=PropagationConfig(alpha=0.5))


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("tile", "tile_cells", 0),
        ("tile", "slice_memory_mb", -1),
        ("tile", "search_cells", 0),
        ("propagation", "mode", "published"),
        ("propagation", "graph_space", "other"),
        ("propagation", "search", "fast"),
        ("propagation", "approximate_from", -1),
        ("propagation", "bandwidth", "other"),
        ("propagation", "sparsity_cdf", "lower"),
        ("propagation", "sparsity_match", "other"),
        ("propagation", "sparsity_genes", "some"),
        ("propagation", "support", "drawn"),
        ("propagation", "stopping", "never"),
        ("propagation", "stopping", "absolute"),
        ("propagation", "split", "tiles"),
        ("propagation", "storage", "float64"),
        ("propagation", "diffuse", "both"),
        ("propagation", "n_neighbors", 0),
        ("propagation", "n_components", 0),
        ("propagation", "max_iterations", 0),
        ("propagation", "tolerance", 0.0),
        ("propagation", "alpha", -0.1),
        ("propagation", "alpha", 1.1),
        ("propagation", "n_bandwidth_pairs", -1),
        ("embedder", "n_factors", 0),
        ("embedder", "n_factors", 513),
        ("embedder", "ridge", 0.0),
        ("autoencoder", "reconstruction_weight", -1.0),
        ("autoencoder", "triplet_weight", -1.0),
        ("autoencoder", "conservation_weight", -1.0),
        ("autoencoder", "margin", -1.0),
        ("autoencoder", "weight_decay", -1.0),
        ("autoencoder", "n_neighbors_mutual", 0),
        ("autoencoder", "n_neighbors_conservation", 0),
        ("autoencoder", "token_size", 0),
        ("autoencoder", "n_epochs", 0),
        ("autoencoder", "learning_rate", 0.0),
        ("autoencoder", "chunk_cells", 1),
        ("autoencoder", "max_cells_per_technology", 1),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(section, name, value):
    with pytest.raises(InputError, match=f"^{name} is .*it has to be"):
        AtlasConfig.from_dict({section: {name: value}})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("section", "name"),
    [("propagation", "alpha"), ("propagation", "tolerance"), ("embedder", "ridge"), ("autoencoder", "margin")],
)
def test_a_number_that_is_not_finite_is_refused(section, name, value):
    with pytest.raises(InputError, match=f"^{name} is"):
        AtlasConfig.from_dict({section: {name: value}})


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("tile", {"tile_cells": 1, "slice_memory_mb": 0, "search_cells": 1}),
        ("propagation", {"support": "redrawn", "stopping": "absolute"}),
        ("propagation", {"support": "largest", "stopping": "relative"}),
        ("propagation", {"alpha": 0.0, "n_neighbors": 1, "n_components": 1, "max_iterations": 1}),
        ("propagation", {"alpha": 1.0, "graph_space": "counts"}),
        ("embedder", {"n_factors": 512}),
        ("autoencoder", {"triplet_weight": 0.0, "n_epochs": 1, "chunk_cells": 2, "max_cells_per_technology": 2}),
    ],
)
def test_values_at_the_edge_of_their_range_are_taken(section, values):
    config = getattr(AtlasConfig.from_dict({section: values}), section)
    assert {name: getattr(config, name) for name in values} == values


@pytest.mark.parametrize(
    ("section", "name", "value", "wanted"),
    [
        ("tile", "tile_cells", "64", "int"),
        ("tile", "tile_cells", 64.0, "int"),
        ("tile", "tile_cells", True, "int"),
        ("propagation", "self_loops", 1, "bool"),
        ("propagation", "mode", 1, "str"),
        ("propagation", "bandwidth", 30.0, "str"),
        ("propagation", "n_bandwidth_pairs", "many", "int"),
        ("propagation", "alpha", "half", "float"),
        ("propagation", "alpha", True, "float"),
        ("embedder", "name", 3, "str"),
        ("embedder", "checkpoint", 5, "str"),
        ("autoencoder", "n_epochs", [1], "int"),
    ],
)
def test_a_value_of_another_type_is_refused_with_the_one_wanted(section, name, value, wanted):
    with pytest.raises(InputError, match=rf"'{name}' in \[settings.{section}\].*give a {wanted}"):
        AtlasConfig.from_dict({section: {name: value}})


def test_whole_numbers_are_taken_where_fractions_are_wanted():
    config = AtlasConfig.from_dict({"propagation": {"alpha": 1}})
    assert type(config.propagation.alpha) is float


def test_an_unknown_section_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="'tiles': choose from autoencoder, embedder, propagation, tile"):
        AtlasConfig.from_dict({"tiles": {}})


@pytest.mark.parametrize("section", KINDS)
def test_an_unknown_key_is_refused_with_the_known_ones(section):
    names = ", ".join(sorted(field.name for field in dataclasses.fields(KINDS[section])))
    with pytest.raises(InputError, match=rf"'n_neighbours' in \[settings.{section}\]: choose from {names}$"):
        AtlasConfig.from_dict({section: {"n_neighbours": 3}})


@pytest.mark.parametrize("sections", [3, "tile", [], {"tile": 4}, {"propagation": []}])
def test_settings_that_are_no_tables_are_refused(sections):
    with pytest.raises(InputError, match="table"):
        AtlasConfig.from_dict(sections)


def test_scgpt_without_a_checkpoint_is_refused_with_advice():
    with pytest.raises(InputError, match="scgpt:DIR"):
        EmbedderConfig(name="scgpt")


def test_settings_of_a_function_name_the_place_they_came_from():
    with pytest.raises(InputError, match=r"\[propagation\]"):
        settings_from_dict(PropagationConfig, {"beta": 1}, where="propagation")


@settings(deadline=None, max_examples=20)
@given(st.dictionaries(st.text(), JSON, max_size=5), st.randoms())
def test_the_order_of_keys_does_not_change_a_digest(values, random):
    items = list(values.items())
    random.shuffle(items)
    assert digest(dict(items)) == digest(values)


@settings(deadline=None, max_examples=20)
@given(JSON)
def test_canonical_json_reads_back_as_the_value(value):
    assert json.loads(canonical_json(value)) == value


@settings(deadline=None, max_examples=20)
@given(JSON, JSON)
def test_values_of_other_json_have_other_digests(first, second):
    assert (digest(first) == digest(second)) == (canonical_json(first) == canonical_json(second))


def test_a_digest_is_the_first_half_of_sha256_of_the_json():
    assert digest({"b": [1, 0.5], "a": None}) == hashlib.sha256(b'{"a":null,"b":[1,0.5]}').hexdigest()[:32]


def test_bytes_are_digested_as_they_are():
    assert digest(b"\x00\xff") == hashlib.sha256(b"\x00\xff").hexdigest()[:32]


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (PropagationConfig(), to_dict(PropagationConfig())),
        (np.float64(0.25), 0.25),
        (np.arange(3), [0, 1, 2]),
        (Path("a/b"), "a/b"),
        ((1, 2), [1, 2]),
    ],
    ids=["dataclass", "numpy scalar", "array", "path", "tuple"],
)
def test_a_value_has_the_digest_of_its_plain_form(value, plain):
    assert digest({"part": value}) == digest({"part": plain})


def another(name, value):
    """Another value that the field takes."""
    choices = {
        "graph_space": "counts",
        "search": "approximate",
        "bandwidth": "cross",
        "sparsity_cdf": "upper",
        "sparsity_match": "argsort",
        "sparsity_genes": "all",
        "support": "redrawn",
        "stopping": "absolute",
        "split": "stripes",
        "storage": "float16",
        "diffuse": "embedding",
        "name": "other",
        "checkpoint": "x",
        "device": "cpu",
        "precision": "bfloat16",
        "mode": "reference",
        "preset": "ovarian",
        "equations": "paper",
        "start": "random",
        "negatives": "slice",
        "pair_space": "latent",
        "pairing": "published",
        "token_by": "slice",
        "chunks": "fixed",
    }
    if name in choices:
        return choices[name]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value / 2


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, field.name) for kind in KINDS.values() for field in dataclasses.fields(kind)]
)
def test_every_field_of_the_settings_changes_their_digest(kind, name):
    before = kind(support="largest") if name == "stopping" else kind()
    assert digest(dataclasses.replace(before, **{name: another(name, getattr(before, name))})) != digest(before)


MODES = {
    "default": ("scaled", "pairs", 10_000, "midrank", "rank", "shared", "frozen", "relative", "none"),
    "paper": ("counts", "pairs", 100, "upper", "rank", "shared", "frozen", "relative", "none"),
    "reference": ("counts", "cross", 100, "linspace", "argsort", "all", "redrawn", "absolute", "stripes"),
}
DECIDED = (
    "graph_space",
    "bandwidth",
    "n_bandwidth_pairs",
    "sparsity_cdf",
    "sparsity_match",
    "sparsity_genes",
    "support",
    "stopping",
    "split",
)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_decides_what_is_not_given(mode):
    config = AtlasConfig.from_dict({"propagation": {"mode": mode}}).propagation
    assert tuple(getattr(config, name) for name in DECIDED) == MODES[mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in DECIDED if name not in ("support", "stopping")])
def test_what_is_given_wins_over_the_mode(mode, name):
    value = another(name, getattr(PropagationConfig(mode=mode), name))
    config = PropagationConfig(mode=mode, **{name: value})
    assert getattr(config, name) == value
    for other in set(DECIDED) - {name}:
        assert getattr(config, other) == getattr(PropagationConfig(mode=mode), other)


@pytest.mark.parametrize("mode", MODES)
def test_settings_of_a_mode_survive_tables(mode):
    config = AtlasConfig(propagation=PropagationConfig(mode=mode))
    assert AtlasConfig.from_dict(json.loads(canonical_json(config))) == config


def test_no_field_is_left_open_by_any_mode():
    for mode in MODES:
        assert None not in to_dict(PropagationConfig(mode=mode)).values()


def test_an_absolute_stop_with_a_frozen_support_is_refused_with_advice():
    with pytest.raises(InputError, match="support='redrawn' or 'largest' with 'absolute'"):
        PropagationConfig(mode="reference", support="frozen")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_does_not_have_get_no_digest(value):
    with pytest.raises(ValueError, match="JSON"):
        digest([value])


def test_values_without_a_json_form_get_no_digest():
    with pytest.raises(TypeError, match="no canonical JSON form for set"):
        digest({"a": {1, 2}})


def test_settings_read_from_toml_are_those_that_were_written(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text("[propagation]\nalpha = 0.5\nn_neighbors = 7\n[embedder]\nname = 'reference'\n")
    config = AtlasConfig.from_dict(load_toml(path))
    assert (config.propagation.alpha, config.propagation.n_neighbors) == (0.5, 7)


def test_a_missing_toml_file_is_an_input_error_that_names_it(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*none\.toml: No such file"):
        load_toml(tmp_path / "none.toml")


def test_text_that_is_not_toml_is_refused_with_the_place(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("[atlas\n")
    with pytest.raises(InputError, match=r"bad\.toml is not valid TOML.*line 1"):
        load_toml(path)


@pytest.mark.parametrize("name", sorted(path.name for path in Path(__file__).parent.parent.glob("catalogs/*.toml")))
def test_settings_of_every_catalog_in_the_repository_are_valid(name):
    content = tomllib.loads((Path(__file__).parent.parent / "catalogs" / name).read_text())
    assert isinstance(AtlasConfig.from_dict(content.get("settings", {})), AtlasConfig)
