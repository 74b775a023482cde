"""Crashes between steps, leftovers, damage: the old head stays, a retry succeeds, damage is named."""

from __future__ import annotations

import errno
import json
import os

import pytest
from support.folders import folder_digest
from support.stores import commit_slice, publish_object, slice_record, tiny_catalog

from lloki_atlas.config import canonical_json
from lloki_atlas.errors import FormatError, NotFoundError
from lloki_atlas.store.catalog import commit, list_versions, open_catalog, verify
from lloki_atlas.store.records import Change


@pytest.fixture
def catalog(tmp_path):
    return commit_slice(tiny_catalog(tmp_path / "atlas"), "s1")


def _crash(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_a_commit_that_dies_leaves_the_old_head_and_its_retry_succeeds(catalog, monkeypatch, call):
    change = Change(slices={"s2": slice_record(catalog, "s2")})
    before = folder_digest(catalog.root)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, _crash)
        with pytest.raises(OSError, match="No space"):
            commit(catalog, change, message="")
    assert folder_digest(catalog.root) == before
    assert commit(catalog, change, message="").version == 3


def test_a_publication_that_dies_leaves_the_catalog_as_it_was(catalog, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", _crash)
        with pytest.raises(OSError, match="No space"):
            publish_object(catalog, "graphs", "g")
    assert verify(open_catalog(catalog.root)) == []
    assert not (catalog.root / "graphs").exists() or not any((catalog.root / "graphs").iterdir())
    key = publish_object(catalog, "graphs", "g")
    assert catalog.path("graphs", key).is_dir()


@pytest.mark.parametrize("n_links", [0, 1])
def test_a_making_that_dies_is_finished_by_a_retry(tmp_path, monkeypatch, n_links):
    calls, real = [], os.link

    def die(*args):
        calls.append(args)
        if len(calls) > n_links:
            _crash()
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", die)
        with pytest.raises(OSError, match="No space"):
            tiny_catalog(tmp_path)
    with pytest.raises(NotFoundError, match="create"):
        open_catalog(tmp_path)
    assert tiny_catalog(tmp_path).version == 1


def test_leftover_temporary_files_do_not_matter(catalog):
    versions = catalog.root / "versions"
    (versions / f".00000003.json.{'0' * 32}.tmp").write_text("half")
    (versions / "00000003.json#1").write_text("half")
    (versions / "notes.txt").write_text("x")
    (catalog.root / "staging" / "dead").mkdir()
    assert open_catalog(catalog.root, mode="r+") == catalog
    assert list_versions(catalog.root) == [1, 2]
    assert commit_slice(catalog, "s2").version == 3


def test_a_catalog_of_a_newer_format_is_refused(catalog):
    (catalog.root / "catalog.json").write_text(json.dumps({"format_version": 2, "id": "x"}))
    with pytest.raises(FormatError, match="update lloki-atlas"):
        open_catalog(catalog.root)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format_version": "1"}'])
def test_a_damaged_identity_is_a_format_error_that_names_it(catalog, text):
    (catalog.root / "catalog.json").write_text(text)
    with pytest.raises(FormatError, match=r"catalog\.json is damaged"):
        open_catalog(catalog.root)


def _cut(path):
    os.truncate(path, path.stat().st_size // 2)


def _flip(path):
    path.write_text(path.read_text().replace("merfish", "merfisj"))


def _newer(path):
    path.write_bytes(canonical_json({**json.loads(path.read_bytes()), "format": 3}))


RECORD_DAMAGE = {
    "cut": (_cut, "is damaged"),
    "empty": (lambda path: path.write_text(""), "is damaged"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "is damaged"),
    "letter": (_flip, "is damaged"),
    "swapped": (lambda path: path.write_bytes(path.with_name("00000001.json").read_bytes()), "says it is version 1"),
    "newer": (_newer, "update lloki-atlas"),
}


@pytest.mark.parametrize("damage", RECORD_DAMAGE)
def test_a_damaged_version_record_is_a_format_error_that_names_it(catalog, damage):
    apply, sentence = RECORD_DAMAGE[damage]
    apply(catalog.root / "versions" / "00000002.json")
    with pytest.raises(FormatError, match=f"00000002.json.*{sentence}"):
        open_catalog(catalog.root)


def test_nobody_commits_on_top_of_a_damaged_record(catalog):
    stale = open_catalog(catalog.root, version=1, mode="r+")
    _cut(catalog.root / "versions" / "00000002.json")
    with pytest.raises(FormatError, match="00000002"):
        commit(stale, Change(config={}), message="")
    assert list_versions(catalog.root) == [1, 2]


def test_a_version_before_the_damage_still_opens(catalog):
    _cut(catalog.root / "versions" / "00000002.json")
    assert open_catalog(catalog.root, version=1).state.slices == {}


def test_a_missing_record_is_a_format_error_that_names_it(catalog):
    commit_slice(catalog, "s2")
    (catalog.root / "versions" / "00000002.json").unlink()
    with pytest.raises(FormatError, match=r"00000002\.json is missing"):
        open_catalog(catalog.root)


def test_a_checkpoint_spares_a_reader_the_damage_before_it(catalog):
    for number in range(16):
        catalog = commit(catalog, Change(config={"n": number}), message="")
    _cut(catalog.root / "versions" / "00000002.json")
    head = open_catalog(catalog.root)
    assert head.state.config == {"n": 15}
    assert [problem for problem in verify(head) if "00000002.json" in problem]


def test_a_whole_catalog_has_no_problems(catalog):
    assert verify(catalog) == []


def _object_damage():
    return {
        "was altered": lambda folder: (folder / "zarr.json").write_text('{"content": "s1firsT"}'),
        "bytes where": lambda folder: os.truncate(folder / "part" / "0", 3),
        "is missing": lambda folder: (folder / "part" / "0").unlink(),
        "is not in its receipt": lambda folder: (folder / "part" / "1").write_text("x"),
        "has no receipt": lambda folder: folder.with_name(folder.name + ".json").unlink(),
    }


@pytest.mark.parametrize("kind", ["slices", "embeddings"])
@pytest.mark.parametrize("sentence", _object_damage())
def test_verify_names_the_object_and_the_damage(catalog, kind, sentence):
    (folder,) = (entry for entry in (catalog.root / kind).iterdir() if entry.is_dir())
    _object_damage()[sentence](folder)
    (problem,) = verify(catalog)
    assert problem.startswith(f"{kind}/{folder.name}: ")
    assert sentence in problem


def test_verify_sees_an_object_exchanged_together_with_its_receipt(catalog):
    (folder,) = (entry for entry in (catalog.root / "slices").iterdir() if entry.is_dir())
    receipt = folder.with_name(folder.name + ".json")
    receipt.write_text(receipt.read_text().replace("s1first", "s1other"))
    (problem,) = verify(catalog)
    assert "not the receipt that was committed" in problem


def test_verify_reads_what_this_version_reaches_and_nothing_else(catalog):
    newer = commit_slice(catalog, "s1", content="second")
    (folder,) = {newer.path("slices", newer.slice("s1").objects["ingest"])}
    os.truncate(folder / "part" / "0", 3)
    assert verify(catalog) == []
    assert len(verify(newer)) == 1
