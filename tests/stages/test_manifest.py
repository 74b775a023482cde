"""Manifests: what they say, where their data lies, and every mistake with the sentence that mends it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lloki_atlas.errors import InputError
from lloki_atlas.stages.manifest import ReferenceSource, Simulation, SliceSource, read_manifest

ATLAS = '[atlas]\nname = "cortex"\n'
REFERENCE = '[reference]\nsource = "ref.h5ad"\norganism = "mouse"\n'
SLICE = '[[slices]]\nsource = "a.h5ad"\ntechnology = "MERFISH"\norganism = "mouse"\ncoordinate_unit = "micrometer"\n'
WHOLE = ATLAS + REFERENCE + SLICE
CATALOGS = Path(__file__).parent.parent.parent / "catalogs"


@pytest.fixture
def read(tmp_path):
    def write_and_read(text):
        path = tmp_path / "atlas.toml"
        path.write_text(text, encoding="utf-8")
        return read_manifest(path)

    return write_and_read


def test_a_manifest_says_its_name_reference_and_slices(read):
    manifest = read(WHOLE)
    assert (manifest.name, manifest.reference) == ("cortex", ReferenceSource("ref.h5ad", "mouse"))
    assert manifest.slices == (SliceSource("a.h5ad", "MERFISH", "mouse", "micrometer"),)


def test_slices_keep_their_order(read):
    manifest = read(WHOLE + SLICE.replace("a.h5ad", "b.h5ad") + SLICE.replace("a.h5ad", "0.h5ad"))
    assert [entry.source for entry in manifest.slices] == ["a.h5ad", "b.h5ad", "0.h5ad"]


def test_every_key_of_a_slice_is_taken(read):
    options = {
        "slice_id": '"one"',
        "slice_key": '"section"',
        "slice_value": '"3"',
        "um_per_unit": "0.1",
        "spatial_key": '"xy"',
        "label_key": '["type", "layer"]',
        "layer": '"counts"',
        "table": '"cells"',
        "empty_cells": '"keep"',
        "accept_normalized": "true",
        "gene_map": '"map.tsv"',
        "url": '"https://example.org"',
    }
    (entry,) = read(WHOLE + "".join(f"{name} = {value}\n" for name, value in options.items())).slices
    assert entry.um_per_unit == 0.1
    assert entry.accept_normalized is True
    assert entry.label_key == ["type", "layer"]
    named = ("slice_id", "slice_key", "slice_value", "spatial_key", "layer", "table", "empty_cells", "gene_map", "url")
    assert [f'"{getattr(entry, name)}"' for name in named] == [options[name] for name in named]


def test_a_whole_number_is_taken_where_a_fraction_is_wanted(read):
    assert read(WHOLE + "um_per_unit = 2\n").slices[0].um_per_unit == 2


def test_settings_are_those_of_the_sections(read):
    config = read(WHOLE + "[settings.propagation]\nalpha = 0.5\n[settings.tile]\ntile_cells = 7\n").config
    assert (config.propagation.alpha, config.tile.tile_cells) == (0.5, 7)


def test_a_simulation_needs_neither_reference_nor_slices(read):
    manifest = read(ATLAS + "[simulate]\nn_cells = 50\n")
    assert manifest.simulation == Simulation(n_cells=50)
    assert (manifest.reference, manifest.slices) == (None, ())


MISTAKES = {
    "no name": (WHOLE.replace('name = "cortex"', ""), r'has no name: begin with \[atlas\] and name = "..."'),
    "no atlas": (REFERENCE + SLICE, "has no name"),
    "a name that climbs": (WHOLE.replace('"cortex"', '"../cortex"'), "use letters, digits"),
    "a name that is a path": (WHOLE.replace('"cortex"', '"/tmp/cortex"'), "use letters, digits"),
    "a name that is an address": (WHOLE.replace('"cortex"', '"s3://bucket/cortex"'), "use letters, digits"),
    "empty name": (WHOLE.replace('"cortex"', '""'), "has no name"),
    "name of another type": (WHOLE.replace('"cortex"', "5"), r"'name' in .*\[atlas\] is 5: give a str"),
    "data of another type": (WHOLE.replace("[reference]", "data = 3\n[reference]", 1), r"'data' in .* give a str"),
    "unknown key in atlas": (WHOLE.replace("[reference]", "dta = 3\n[reference]", 1), "unknown key 'dta'.*name, data"),
    "unknown sections": (WHOLE + "[slice]\n[setting]\n", "unknown sections: setting, slice$"),
    "no reference": (ATLAS + SLICE, r"needs \[reference\] and at least one \[\[slices\]\], or \[simulate\]"),
    "no slices": (ATLAS + REFERENCE, r"at least one \[\[slices\]\]"),
    "one table of slices": (WHOLE.replace("[[slices]]", "[slices]"), r"one table \[slices\]: write \[\[slices\]\]"),
    "slices of text": ('slices = ["a"]\n' + ATLAS + REFERENCE, r"\[\[slices\]\] number 1 is 'a': give a table"),
    "several references": (WHOLE.replace("[reference]", "[[reference]]"), r"\[reference\] is \[.*give a table"),
    "atlas of text": ('atlas = "cortex"\n' + REFERENCE + SLICE, r"\[atlas\] is 'cortex': give a table"),
    "simulate of text": ('simulate = "yes"\n' + ATLAS, r"\[simulate\] is 'yes': give a table"),
    "settings of text": ('settings = "fast"\n' + WHOLE, r"\[settings\] is 'fast': give tables"),
    "setting outside a section": (WHOLE + "[settings]\ntile = 4\n", r"\[settings.tile\] is 4: give a table"),
    "unknown key in a slice": (WHOLE + 'unit = "um"\n', r"\[\[slices\]\] number 1 has an unknown key 'unit': choose"),
    "unknown key in the second slice": (WHOLE + SLICE + "x = 1\n", r"\[\[slices\]\] number 2 has an unknown key 'x'"),
    "unknown key in reference": (ATLAS + REFERENCE + "x = 1\n" + SLICE, r"\[reference\] has an unknown key 'x'"),
    "slice without source": (
        WHOLE.replace('source = "a.h5ad"\n', ""),
        r"number 1 lacks 'source': it needs source, tec",
    ),
    "slice without technology": (WHOLE.replace('technology = "MERFISH"\n', ""), "number 1 lacks 'technology'"),
    "slice without unit": (WHOLE.replace('coordinate_unit = "micrometer"\n', ""), "lacks 'coordinate_unit'"),
    "reference without organism": (WHOLE.replace('organism = "mouse"\n', "", 1), r"\[reference\] lacks 'organism'"),
    "source of another type": (WHOLE.replace('"a.h5ad"', "3"), r"'source' in .*number 1 is 3: give a str"),
    "value of another type": (WHOLE + "slice_value = 3\n", r"'slice_value' in .*is 3: give a str"),
    "truth of another type": (WHOLE + 'accept_normalized = "yes"\n', r"'accept_normalized' .*: give a bool"),
    "number of another type": (WHOLE + 'um_per_unit = "0.1"\n', r"'um_per_unit' in .*: give a float"),
    "truth for a number": (WHOLE + "um_per_unit = true\n", r"'um_per_unit' in .*is True: give a float"),
    "cells of another type": (
        ATLAS + '[simulate]\nn_cells = "8k"\n',
        r"'n_cells' in .*\[simulate\] is '8k': give a int",
    ),
    "unknown key of a simulation": (ATLAS + "[simulate]\ncells = 3\n", r"\[simulate\] has an unknown key 'cells'"),
    "unknown setting": (WHOLE + "[settings.tile]\ncells = 3\n", r"unknown key 'cells' in \[settings.tile\]"),
    "unknown settings section": (WHOLE + "[settings.tiles]\n", "unknown settings section 'tiles'"),
    "setting out of range": (WHOLE + "[settings.tile]\ntile_cells = 0\n", "tile_cells is 0: it has to be at least 1"),
    "no TOML": ("atlas: name\n", "is not valid TOML"),
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_refused_with_a_sentence_that_mends_it(read, text, message):
    with pytest.raises(InputError, match=message):
        read(text)


def test_a_mistake_names_the_file_it_is_in(read, tmp_path):
    with pytest.raises(InputError, match=f"^{tmp_path / 'atlas.toml'} "):
        read(ATLAS)


def test_a_missing_manifest_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*none\.toml"):
        read_manifest(tmp_path / "none.toml")


def with_data(text):
    return WHOLE.replace("[reference]", f'data = "{text}"\n[reference]', 1)


def test_without_a_data_folder_sources_lie_beside_the_manifest(read, tmp_path):
    assert read(WHOLE).data.resolve() == tmp_path.resolve()


def test_a_relative_data_folder_is_relative_to_the_manifest(read, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    assert read(with_data("../files")).data == tmp_path.resolve() / "../files"


@pytest.mark.parametrize(
    ("text", "value", "folder"),
    [
        ("${ATLAS_TEST_DATA}", "/data", "/data"),
        ("${ATLAS_TEST_DATA}/mouse", "/data", "/data/mouse"),
        ("${ATLAS_TEST_DATA:-/other}", "/data", "/data"),
        ("${ATLAS_TEST_DATA:-/other}", None, "/other"),
        ("${ATLAS_TEST_DATA:-/other}", "", "/other"),
        ("${ATLAS_TEST_DATA:-/other}/${ATLAS_TEST_DATA:-mouse}", None, "/other/mouse"),
        ("/plain", None, "/plain"),
    ],
)
def test_a_data_folder_may_name_variables_with_defaults(read, monkeypatch, text, value, folder):
    if value is None:
        monkeypatch.delenv("ATLAS_TEST_DATA", raising=False)
    else:
        monkeypatch.setenv("ATLAS_TEST_DATA", value)
    assert read(with_data(text)).data == Path(folder)


def test_a_relative_default_is_relative_to_the_manifest(read, monkeypatch, tmp_path):
    monkeypatch.delenv("ATLAS_TEST_DATA", raising=False)
    assert read(with_data("${ATLAS_TEST_DATA:-files}")).data == tmp_path.resolve() / "files"


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_without_a_value_or_default_is_refused_by_name(read, monkeypatch, value):
    monkeypatch.delenv("ATLAS_TEST_DATA", raising=False)
    if value is not None:
        monkeypatch.setenv("ATLAS_TEST_DATA", value)
    with pytest.raises(InputError, match=r"looks for its data in \$ATLAS_TEST_DATA: set it to the folder"):
        read(with_data("${ATLAS_TEST_DATA}"))


def test_a_data_folder_may_lie_in_the_home(read):
    assert read(with_data("~/files")).data == Path.home() / "files"


@pytest.mark.parametrize("name", sorted(path.name for path in CATALOGS.glob("*.toml")))
def test_every_catalog_of_the_repository_is_a_manifest(name, monkeypatch):
    monkeypatch.delenv("LLOKI_ATLAS_DATA", raising=False)
    manifest = read_manifest(CATALOGS / name)
    assert manifest.name == Path(name).stem


def test_the_manifest_of_the_simulator_is_a_manifest(sources):
    manifest = read_manifest(sources / "atlas.toml")
    assert len(manifest.slices) == 6
    assert all((manifest.data / entry.source).exists() for entry in manifest.slices)
