"""Lists of sources: what a folder, a pattern and a sheet name, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.slices import make_adata, write_h5ad

from lloki_atlas.errors import InputError
from lloki_atlas.stages.manifest import SliceSource
from lloki_atlas.stages.source_lists import find_sources

SAID = {"technology": "MERFISH", "organism": "mouse", "coordinate_unit": "um"}


def names(entries):
    return [(Path(entry.source).name, entry.slice_id) for entry in entries]


@pytest.fixture
def folder(tmp_path):
    """Two files and a store among things that are no sources."""
    for name in ("b.h5ad", "a.h5ad", "notes.txt", ".hidden"):
        (tmp_path / name).write_text("")
    (tmp_path / "c.zarr").mkdir()
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "d.h5ad").write_text("")
    return tmp_path


ALL = [("a.h5ad", "a"), ("b.h5ad", "b"), ("c.zarr", "c")]


def test_a_folder_holds_its_files_and_stores_by_name(folder):
    assert names(find_sources(folder, **SAID)) == ALL


def test_a_folder_holds_the_output_folders_of_vendors(folder):
    (folder / "run_1").mkdir()
    for name in ("cell_by_gene.csv", "cell_metadata.csv"):
        (folder / "run_1" / name).write_text("")
    assert names(find_sources(folder, **SAID)) == [*ALL, ("run_1", "run_1")]
    assert names(find_sources(folder / "run_1", **SAID)) == [("run_1", "run_1")]


def test_a_vendors_folder_that_lacks_a_file_is_a_source_of_its_own(folder):
    (folder / "cell_by_gene.csv").write_text("")
    assert names(find_sources(folder, **SAID)) == [(folder.name, folder.name)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("*.h5ad", ALL[:2]), ("*/*.h5ad", [("d.h5ad", "d")]), ("[ab].h5ad", ALL[:2]), ("c.z*", ALL[2:])],
)
def test_a_pattern_is_what_it_matches_by_name(folder, pattern, expected):
    assert names(find_sources(str(folder / pattern), **SAID)) == expected


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(folder):
    (folder / "x[1].h5ad").write_text("")
    assert names(find_sources(folder / "x[1].h5ad", **SAID)) == [("x[1].h5ad", "x[1]")]


def test_several_are_taken_in_their_order(folder):
    given = [folder / "b.h5ad", folder / "deeper", SliceSource(str(folder / "a.h5ad"), "T", "human", "mm", "x")]
    found = find_sources(given, **SAID)
    assert names(found) == [("b.h5ad", "b"), ("d.h5ad", "d"), ("a.h5ad", "x")]
    assert [entry.technology for entry in found] == ["MERFISH", "MERFISH", "T"]


def test_paths_are_absolute(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert [entry.source for entry in find_sources(["a.h5ad", "deeper"], **SAID)] == [
        str(folder / "a.h5ad"),
        str(folder / "deeper" / "d.h5ad"),
    ]


def test_what_is_not_there_is_handed_on(folder):
    assert names(find_sources(folder / "gone.h5ad", **SAID)) == [("gone.h5ad", "gone")]


SHEET = """source,slice_id,technology,organism,unit,um_per_unit,label_key,accept_normalized,gene_map
a.h5ad,one,STARmap,human,pixel,0.5,class;subclass,true,genes.tsv
deeper/d.h5ad,,,,,,class,no,
"""


def test_a_sheet_says_what_options_do_not(folder):
    (folder / "sheet.csv").write_text(SHEET)
    one, two = find_sources(folder / "sheet.csv", **SAID, layer="raw")
    assert one == SliceSource(
        str(folder / "a.h5ad"),
        "STARmap",
        "human",
        "pixel",
        "one",
        um_per_unit=0.5,
        label_key=["class", "subclass"],
        layer="raw",
        accept_normalized=True,
        gene_map=str(folder / "genes.tsv"),
    )
    assert two == SliceSource(
        str(folder / "deeper" / "d.h5ad"), "MERFISH", "mouse", "um", "d", label_key="class", layer="raw"
    )


def test_a_sheet_may_have_tabs(folder):
    (folder / "sheet.tsv").write_text("source\tslice_id\na.h5ad\tone, two\n")
    assert names(find_sources(folder / "sheet.tsv", **SAID)) == [("a.h5ad", "one, two")]


def test_a_sheet_may_be_toml(folder):
    (folder / "sheet.toml").write_text('[[slices]]\nsource = "a.h5ad"\nslice_id = "one"\nunit = "mm"\n')
    (entry,) = find_sources(folder / "sheet.toml", **SAID)
    assert (entry.source, entry.slice_id, entry.coordinate_unit) == (str(folder / "a.h5ad"), "one", "mm")


@pytest.mark.parametrize(
    ("given", "slices"),
    [
        ({}, [("one", "one"), ("two", "two")]),
        ({"slice_id": "s"}, [("s_one", "one"), ("s_two", "two")]),
        ({"slice_value": "two"}, [("two", "two")]),
        ({"slice_value": "two", "slice_id": "x"}, [("x", "two")]),
    ],
    ids=str,
)
def test_values_of_a_column_are_slices(tmp_path, given, slices):
    source = write_h5ad(tmp_path / "x.h5ad", make_adata())
    found = find_sources(SliceSource(str(source), **SAID, slice_key="section", **given))
    assert [(entry.slice_id, entry.slice_value) for entry in found] == slices


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("s.csv", "source,colour\na.h5ad,red\n", "slice 1 of .*s.csv has an unknown key 'colour'"),
        ("s.csv", "slice_id\none\n", "slice 1 of .* lacks 'source'"),
        ("s.csv", "source,um_per_unit\na.h5ad,half\n", "'um_per_unit' of slice 1 of .* is 'half': give a number"),
        ("s.csv", "source,accept_normalized\na.h5ad,maybe\n", "is 'maybe': give true or false"),
        ("s.csv", "source,slice_id\na.h5ad\n", "slice 1 of .* has not as many columns as the head"),
        ("s.csv", "source\na.h5ad,one\n", "slice 1 of .* has not as many columns as the head"),
        ("s.csv", "source\n", "the sheet .* has no slice"),
        ("s.csv", "", "the sheet .* has no slice"),
        ("s.toml", "[atlas]\nname = 'x'\n", r"has to be \[\[slices\]\] alone"),
        ("s.toml", "slices = 1\n", r"has to be \[\[slices\]\] alone"),
        ("s.toml", "", "the sheet .* has no slice"),
        ("s.toml", "[[slices]\n", "is not valid TOML"),
    ],
)
def test_a_sheet_that_cannot_be_used_is_refused(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=message):
        find_sources(folder / name, **SAID)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "there is no source to ingest"),
        (["*.loom"], r"nothing is called like .*\*\.loom: check the pattern"),
        (["a.h5ad", "a.h5ad"], r"two slices are called 'a', of .*a\.h5ad and of .*a\.h5ad: give each its own id"),
        (["none.csv"], r"cannot read the sheet .*none\.csv"),
    ],
    ids=str,
)
def test_a_list_that_cannot_be_used_is_refused(folder, given, message):
    with pytest.raises(InputError, match=message):
        find_sources([str(folder / part) for part in given], **SAID)


def test_a_source_of_which_too_little_is_said_is_refused(folder):
    with pytest.raises(InputError, match=r"a\.h5ad lacks 'technology': it needs"):
        find_sources(folder / "a.h5ad", organism="mouse", coordinate_unit="um")
