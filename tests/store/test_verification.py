"""Verification: every flipped byte of a catalog is found by reading all of it, and the quick look finds the coarse."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from support.folders import folder_digest
from support.housekeeping import grow_old, quick_disk, rewrite_record, tree
from support.stores import commit_slice, publish_object, tiny_catalog

from lloki_atlas.config import canonical_json
from lloki_atlas.errors import NotFoundError
from lloki_atlas.store.catalog import commit, open_catalog
from lloki_atlas.store.log import CHECKPOINT_EVERY
from lloki_atlas.store.records import Change
from lloki_atlas.store.retention import gc
from lloki_atlas.store.verification import verify_deep, verify_quick

__all__ = ["quick_disk"]
pytestmark = pytest.mark.usefixtures("quick_disk")

PATTERNS = (0x01, 0x20, 0x80, 0xFF)


def _small_catalog(root):
    """A slice in two contents, a model, a reference, and so many versions that there are two checkpoints."""
    catalog = commit_slice(tiny_catalog(root), "é 1")
    change = Change(
        reference=publish_object(catalog, "references", "r"),
        models={"embedder": publish_object(catalog, "models", "m")},
        slices={"é 1": None},
    )
    catalog = commit(catalog, change, message="a\nlog \N{SNOWMAN}")
    while catalog.version < CHECKPOINT_EVERY + 1:
        catalog = commit(catalog, Change(config={"n": catalog.version / 7}), message="")
    return catalog


@pytest.fixture
def catalog(tmp_path):
    return _small_catalog(tmp_path / "atlas")


def _kept_files(root):
    return sorted(name for name in tree(root) if name.split("/")[0] not in ("staging", "writers"))


def _undetected(root, positions):
    """Files and positions whose flipped byte `verify_deep` does not notice."""
    missed = []
    for name in _kept_files(root):
        file = root / name
        data = file.read_bytes()
        for position, pattern in positions(len(data)):
            broken = bytearray(data)
            broken[position] ^= pattern
            file.write_bytes(broken)
            if not any(file.name in problem for problem in verify_deep(root)):
                missed.append((name, position, pattern, bytes(broken[position - 5 : position + 6])))
        file.write_bytes(data)
    return missed


def test_a_flipped_byte_of_any_file_is_found_and_the_file_is_named(catalog):
    random = np.random.default_rng(0)

    def sampled(size):
        chosen = {0, size - 1, *random.integers(0, size, 10).tolist()}
        return [(position, PATTERNS[position % len(PATTERNS)]) for position in sorted(chosen)]

    assert _undetected(catalog.root, sampled) == []


@pytest.mark.slow
def test_every_flipped_byte_of_every_file_is_found_whatever_the_flip(tmp_path):
    catalog = commit_slice(tiny_catalog(tmp_path), "é 1")
    catalog = commit(catalog, Change(slices={"é 1": None}), message="a\nlog \N{SNOWMAN}")
    missed = _undetected(catalog.root, lambda size: [(at, pattern) for at in range(size) for pattern in PATTERNS])
    assert missed == []


def test_every_flipped_byte_of_the_identity_is_found(catalog):
    file = catalog.root / "catalog.json"
    data = file.read_bytes()
    for position in range(len(data)):
        for bit in range(8):
            file.write_bytes(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
            assert [problem for problem in verify_deep(catalog.root) if "catalog.json" in problem], (position, bit)


@pytest.mark.parametrize("cut", [1, 10, None])
def test_a_file_that_is_cut_short_is_found(catalog, cut):
    for name in _kept_files(catalog.root):
        file = catalog.root / name
        data = file.read_bytes()
        file.write_bytes(data[: -cut if cut else 0])
        assert any(file.name in problem for problem in verify_deep(catalog.root)), name
        file.write_bytes(data)


def test_a_file_that_is_missing_is_found(catalog):
    for name in _kept_files(catalog.root):
        if name == "catalog.json":
            continue
        file = catalog.root / name
        file.rename(catalog.root.parent / "away")
        problems = verify_deep(catalog.root)
        # without the record that named them, nobody can miss the newest version
        if name != f"versions/{catalog.version:08d}.json":
            assert problems, name
        (catalog.root.parent / "away").rename(file)


def test_a_whole_catalog_has_no_problems_and_looking_changes_nothing(catalog):
    before = folder_digest(catalog.root)
    assert verify_deep(catalog.root) == []
    assert verify_deep(str(catalog.root)) == []
    assert verify_quick(catalog) == []
    assert folder_digest(catalog.root) == before


def test_what_is_no_catalog_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match="lloki-atlas create"):
        verify_deep(tmp_path)


@pytest.mark.parametrize("which", ["older version", "no version"])
def test_objects_that_the_head_does_not_reach_are_read_too(catalog, which):
    if which == "no version":
        folder = catalog.path("graphs", publish_object(catalog, "graphs", "of a killed run"))
    else:
        (folder,) = (entry for entry in (catalog.root / "slices").iterdir() if entry.is_dir())
    assert verify_deep(catalog.root) == []
    (folder / "zarr.json").write_text((folder / "zarr.json").read_text().replace("t", "T", 1))
    (problem,) = verify_deep(catalog.root)
    assert f"{folder.parent.name}/{folder.name}: file zarr.json was altered" in problem


def test_a_receipt_of_a_version_given_up_is_compared_with_what_was_committed(catalog):
    gc(catalog, keep_versions=1)  # all of it is younger than the grace period
    assert verify_deep(catalog.root) == []
    (receipt,) = (catalog.root / "slices").glob("*.json")
    receipt.write_text(receipt.read_text().replace("first", "fjrst"))
    (problem,) = verify_deep(catalog.root)
    assert receipt.name in problem
    assert "not the receipt that was committed" in problem


def test_what_was_collected_is_not_missed(catalog):
    grow_old(catalog.root)
    assert gc(catalog, keep_versions=1).objects
    assert verify_deep(catalog.root) == []


def test_unfinished_work_and_leftovers_are_no_problem(catalog):
    publish_object(catalog, "graphs", "half", finished=False)
    (catalog.root / "versions" / f".00000018.json.{'0' * 32}.tmp").write_text("half")
    (catalog.root / "staging" / "anything").write_text("half")
    assert verify_deep(catalog.root) == []


@pytest.mark.parametrize("name", ["versions/notes.txt", "versions/1.json", "slices/x.zip", "models/a b", "writers/x"])
def test_what_is_no_part_of_a_catalog_is_named(catalog, name):
    (catalog.root / name).write_text("x")
    (problem,) = verify_deep(catalog.root)
    assert problem.startswith(f"{name}: is no part")


def test_files_beside_the_folders_are_nobodys_business(catalog):
    (catalog.root / "README.md").write_text("mine")
    assert verify_deep(catalog.root) == []


LIES = {
    "parent": (5, lambda content: content.update(parent=3), "follows version 3"),
    "state": (16, lambda content: content["state"].update(config={}), "holds another state"),
    "no state": (16, lambda content: content.pop("state"), "does not hold the whole state"),
    "more state": (5, lambda content: content.update(state=dict(_EMPTY)), "holds another state"),
    "oldest": (5, lambda content: content.update(oldest=2, format=2), "retains versions from 2 on"),
    "form": (5, lambda content: content.update(format=2), "was altered"),
}
_EMPTY = {"config": {}, "models": {}, "objects": {}, "reference": None, "slices": {}}


@pytest.mark.parametrize("lie", LIES)
def test_a_record_that_does_not_follow_from_those_before_is_named(catalog, lie):
    number, edit, sentence = LIES[lie]
    file = catalog.root / "versions" / f"{number:08d}.json"
    rewrite_record(file, edit)
    problems = [problem for problem in verify_deep(catalog.root) if file.name in problem]
    assert any(sentence in problem for problem in problems)


def test_an_identity_written_before_it_had_a_digest_is_fine(catalog):
    file = catalog.root / "catalog.json"
    content = json.loads(file.read_bytes())
    del content["digest"]
    file.write_bytes(canonical_json(content))
    assert verify_deep(catalog.root) == []
    assert open_catalog(catalog.root).version == catalog.version


def _receipt(folder):
    return folder.with_name(f"{folder.name}.json")


QUICK = {
    "has no receipt": lambda folder: _receipt(folder).unlink(),
    "is garbled": lambda folder: _receipt(folder).write_text("{"),
    "not the receipt that was committed": lambda folder: _receipt(folder).write_text(
        _receipt(folder).read_text().replace("mfir", "mFir")
    ),
    "whole folder is missing": shutil.rmtree,
    "file part/0 is missing": lambda folder: (folder / "part" / "0").unlink(),
    "file part/1 is not in its receipt": lambda folder: (folder / "part" / "1").write_text("x"),
    "has 3 bytes where": lambda folder: os.truncate(folder / "part" / "0", 3),
    "is a link": lambda folder: (folder / "part" / "2").symlink_to("/etc/hostname"),
}


@pytest.mark.parametrize("sentence", QUICK)
@pytest.mark.parametrize("look", ["quick", "deep"])
def test_both_looks_find_the_coarse_and_name_the_object(tmp_path, sentence, look):
    catalog = commit_slice(tiny_catalog(tmp_path), "m", content="first")
    folder = catalog.path("slices", catalog.slice("m").objects["ingest"])
    QUICK[sentence](folder)
    (problem,) = verify_quick(catalog) if look == "quick" else verify_deep(catalog.root)
    assert sentence in problem
    assert folder.stem in problem


def test_the_quick_look_reads_the_records_before_this_version_and_no_later_ones(catalog):
    (catalog.root / "versions" / "00000003.json").write_text("{}")
    assert verify_quick(open_catalog(catalog.root, version=2)) == []
    (problem,) = verify_quick(catalog)
    assert "00000003.json" in problem


def test_all_that_is_damaged_is_named_at_once(catalog):
    (folder,) = (entry for entry in (catalog.root / "slices").iterdir() if entry.is_dir())
    os.truncate(folder / "part" / "0", 3)
    (catalog.root / "versions" / "00000005.json").write_text("{}")
    (catalog.root / "versions" / f"{catalog.version:08d}.json").write_text("{}")
    problems = "\n".join(verify_deep(catalog.root))
    assert all(name in problems for name in ("00000005.json", f"{catalog.version:08d}.json", folder.name))
