"""`adapt`: what it prints for people and for machines, what it leaves behind, and how `status` shows it."""

from __future__ import annotations

import json

import pytest
from support.adapted import NEW, TECHNOLOGY, role_of, tokens
from support.atlases import N_CELLS, SLICES, copied
from support.commands import run_main

from lloki_atlas.cli import autoencoders
from lloki_atlas.errors import InputError
from lloki_atlas.stages import adapt
from lloki_atlas.store.catalog import open_catalog


@pytest.fixture(scope="module")
def done(grown, client, tmp_path_factory):
    """The answers for machines and for people, of a first and of a second call; and the atlas."""
    root = copied(grown, tmp_path_factory.mktemp("adapt") / "atlas").root
    options = ["--technology", TECHNOLOGY, "--cluster", client.scheduler.address, "--quiet"]
    return run_main("adapt", root, *options, "--json"), run_main("adapt", root, *options), root


def test_it_says_the_version_and_what_was_measured(done):
    result, _, root = done
    assert (result.code, result.err) == (0, "")
    catalog = open_catalog(root)
    assert result.json["version"] == catalog.version
    (part,) = result.json["platforms"]
    assert part["token"] == tokens(catalog)[role_of(catalog)]
    assert (part["slices"], part["n_cells"], part["n_atlas_cells"]) == ([NEW], N_CELLS, 2 * N_CELLS)
    assert {"paired", "similarity", "moved", "mixing_before", "mixing", "structure", "path"} <= set(part)


def test_for_people_it_is_a_table_for_each_platform(done):
    _, result, root = done
    catalog = open_catalog(root)
    lines = result.out.splitlines()
    assert (result.code, result.err) == (0, "")
    assert lines[0] == f"version {catalog.version}"
    assert lines[1] == role_of(catalog).removeprefix("token:")
    heads = ["slices", "adapted on", "shared structure", "with a mutual neighbour", "moved", "mixing", "token"]
    assert [line.split("  ")[0] for line in lines[2:9]] == heads
    assert "60 cells, beside 120 of the atlas" in lines[3]


def test_a_second_call_changes_nothing(done):
    first, second, root = done
    assert second.out.startswith(f"version {first.json['version']}\n")
    assert open_catalog(root).version == first.json["version"]


def test_the_status_shows_which_models_encoded_each_slice(done):
    root = done[2]
    catalog = open_catalog(root)
    base, token = catalog.state.models["autoencoder"][:8], tokens(catalog)[role_of(catalog)][:8]
    lines = run_main("status", root).out.splitlines()
    assert lines[1].split()[-2:] == ["autoencoder", "token"]
    rows = {line.split()[0]: line.split()[-2:] for line in lines[2:]}
    assert rows == {NEW: [base, token], **{name: [base, "-"] for name in SLICES}}
    found = json.loads(run_main("status", root, "--json").out)
    assert {part["slice_id"]: part["token"] for part in found["slices"]} == {NEW: token, **dict.fromkeys(SLICES)}


def test_a_technology_that_the_autoencoder_knows_is_refused_in_one_line(done):
    result = run_main("adapt", done[2], "--technology", "SimFISH", "--quiet")
    assert result.code == 3
    assert result.err.startswith("error: the autoencoder already has a token for every panel of 'SimFISH'")
    assert len(result.err.splitlines()) == 1


def test_a_technology_has_to_be_named(done):
    assert run_main("adapt", done[2]).code == 2


def test_doubtful_structure_is_said(done):
    (part,) = done[0].json["platforms"]
    weak = {**part, "structure": 0.1, "structure_error": 0.02, "structure_of_atlas": 0.3}
    assert "shares less structure than any platform of the atlas: check gene symbols" in autoencoders._adapted(weak)
    fine = {**weak, "structure": 0.27}
    assert "shares less" not in autoencoders._adapted(fine)


def test_options_are_handed_on(root, monkeypatch):
    seen = {}

    def stop(catalog, **options):
        seen.update(options)
        raise InputError("seen enough")

    monkeypatch.setattr(adapt, "adapt_autoencoder", stop)
    options = ["--technology", "T", "--slices", "a", "--slices", "b", "--seed", 5, "--gpus", 2, "--device-memory", 900]
    result = run_main("adapt", root, *options, "--workers", 3)
    assert result.err.strip().endswith("seen enough")
    assert (seen["technology"], seen["slices"], seen["random_state"]) == ("T", ["a", "b"], 5)
    assert (seen["n_gpus"], seen["device_memory_mb"], seen["n_workers"]) == (2, 900, 3)
