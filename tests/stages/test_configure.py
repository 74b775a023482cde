"""Other settings for a catalog: what runs again, what cannot change, how settings are written."""

from __future__ import annotations

import pytest
from support.atlases import SLICES, all_bytes, copied, run_here, stages
from support.folders import folder_digest

from lloki_atlas.config import to_dict
from lloki_atlas.errors import InputError
from lloki_atlas.stages.configure import configure, parse_settings
from lloki_atlas.stages.lineage import atlas_config
from lloki_atlas.stages.pipeline import plan
from lloki_atlas.stages.status import status
from lloki_atlas.store.catalog import history, open_catalog, verify


@pytest.fixture
def catalog(built, tmp_path):
    """An atlas of the test's own that ran to the end."""
    return copied(built, tmp_path / "atlas")


def test_another_alpha_is_a_version_that_says_so(catalog):
    changed = configure(catalog, {"propagation.alpha": 0.5})
    assert changed.version == catalog.version + 1
    assert atlas_config(changed).propagation.alpha == 0.5
    assert history(changed)[-1].message == "configure: propagation.alpha 1.0 → 0.5"


def test_after_another_alpha_diffusion_and_what_follows_run_again(catalog):
    before = all_bytes(catalog)
    changed = configure(catalog, {"propagation.alpha": 0.5})
    assert set(stages(plan(changed))) == {"embed", "train", "integrate"}
    after = all_bytes(run_here(plan(changed)))
    assert all(after[key] != before[key] for key in before)
    assert all(part["reasons"] == {} for part in status(open_catalog(catalog.root))["slices"])


def test_settings_that_are_those_of_the_catalog_make_no_version(catalog):
    before = folder_digest(catalog.root)
    assert configure(catalog, {"propagation.alpha": 1.0, "tile.tile_cells": 32}) is catalog
    assert folder_digest(catalog.root) == before


def test_settings_that_change_no_number_make_nothing_stale(catalog):
    changed = configure(catalog, {"tile.slice_memory_mb": 7, "tile.search_cells": 9, "embedder.device": "cpu"})
    assert plan(changed).tasks == ()


def test_another_embedder_embeds_again_and_searches_no_neighbours(catalog):
    changed = configure(catalog, {"embedder.ridge": 7.0})
    assert set(stages(plan(changed))) == {"reference", "embed", "train", "integrate"}
    found = status(changed)["slices"][0]["reasons"]
    assert found["reference"] == "the embedder changed"
    assert verify(run_here(plan(changed))) == []


def test_a_mode_decides_again_what_the_former_one_decided(catalog):
    changed = configure(catalog, {"propagation.mode": "paper", "propagation.tolerance": 0.25})
    settings = atlas_config(changed).propagation
    assert (settings.mode, settings.graph_space, settings.sparsity_cdf) == ("paper", "counts", "upper")
    # what was given when the catalog was made stays
    assert (settings.n_neighbors, settings.n_bandwidth_pairs, settings.tolerance) == (8, 200, 0.25)


def test_a_preset_decides_again_what_the_former_one_decided(catalog):
    settings = atlas_config(configure(catalog, {"autoencoder.preset": "ovarian"})).autoencoder
    assert (settings.preset, settings.conservation_weight, settings.n_epochs) == ("ovarian", 500.0, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile.tile_cells": 7}, r"tile\.tile_cells of .*atlas cannot change, its slices are cut into tiles of that"),
        ({"embedder.n_factors": 7}, r"n_factors of .*atlas cannot change, its reference was fitted with it: create"),
        ({"propagation.alpha": 2.0}, "alpha is 2.0: it has to be between 0 and 1"),
        ({"propagation.beta": 2.0}, r"unknown key 'beta' in \[settings.propagation\]"),
        ({"propagation.alpha": "half"}, "'alpha' in .* is 'half', a str: give a float"),
        ({"alpha": 2.0}, "'alpha' is no setting: write section.name with a section of tile, propagation"),
        ({"from_dict.alpha": 2.0}, "'from_dict.alpha' is no setting"),
        ({"embedder.name": "scgpt"}, "the scgpt embedder needs a checkpoint folder"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_and_changes_nothing(catalog, settings, message):
    before = folder_digest(catalog.root)
    with pytest.raises(InputError, match=message):
        configure(catalog, settings)
    assert folder_digest(catalog.root) == before


def test_a_catalog_that_is_open_for_reading_is_not_changed(built):
    with pytest.raises(InputError, match=r"open it with mode='r\+' to change settings"):
        configure(open_catalog(built), {"propagation.alpha": 0.5})


def test_settings_are_written_as_in_a_manifest():
    texts = ["propagation.alpha=0.5", "propagation.mode = paper", "propagation.keep_observed=true", "embedder.name='x'"]
    assert parse_settings(texts) == {
        "propagation.alpha": 0.5,
        "propagation.mode": "paper",
        "propagation.keep_observed": True,
        "embedder.name": "x",
    }


@pytest.mark.parametrize(
    ("texts", "message"),
    [(["alpha"], "'alpha' is no setting"), (["a.b="], "is no setting"), (["a.b=1", "a.b=2"], "a.b is given twice")],
)
def test_settings_that_cannot_be_read_are_refused(texts, message):
    with pytest.raises(InputError, match=message):
        parse_settings(texts)


def test_the_slices_are_as_they_were(catalog):
    changed = configure(catalog, {"propagation.n_neighbors": 6})
    assert sorted(changed.state.slices) == sorted(SLICES)
    assert {**to_dict(atlas_config(changed))["propagation"], "n_neighbors": 8} == catalog.state.config["propagation"]
