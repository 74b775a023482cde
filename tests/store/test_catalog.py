"""Catalog: making, opening, committing, reading an old version; what is refused leaves no trace."""

from __future__ import annotations

import json
import pickle

import pytest
from support.folders import folder_digest
from support.stores import commit_slice, publish_object, slice_record, tiny_catalog

from lloki_atlas.errors import ConflictError, FormatError, InputError, NotFoundError
from lloki_atlas.store import log
from lloki_atlas.store.catalog import commit, create_store, history, list_versions, open_catalog, verify
from lloki_atlas.store.records import Change


@pytest.fixture
def catalog(tmp_path):
    return tiny_catalog(tmp_path / "atlas")


def test_a_new_catalog_is_version_one_with_its_settings(catalog):
    assert (catalog.version, catalog.mode) == (1, "r+")
    assert catalog.state.config == {"tile": {"tile_cells": 4}}
    assert open_catalog(catalog.root, mode="r+") == catalog


def test_the_identity_names_the_format(catalog):
    content = json.loads((catalog.root / "catalog.json").read_bytes())
    assert content["format_version"] == 1
    assert len(content["id"]) == 32


def test_an_empty_folder_becomes_a_catalog(tmp_path):
    assert tiny_catalog(tmp_path).root == tmp_path


def test_a_catalog_may_start_with_objects_published_before(tmp_path, catalog):
    key = publish_object(catalog, "references", "profile")
    (catalog.root / "references").rename(tmp_path / "references")
    first = create_store(tmp_path / "new", Change(), message="").root
    for path in (first / "catalog.json", first / "versions" / "00000001.json"):
        path.unlink()
    (tmp_path / "references").rename(first / "references")
    created = create_store(first, Change(reference=key), message="")
    assert created.state.reference == key


def test_a_catalog_is_not_made_over_another(catalog):
    before = folder_digest(catalog.root)
    with pytest.raises(InputError, match="exists already"):
        tiny_catalog(catalog.root)
    assert folder_digest(catalog.root) == before


def test_a_catalog_is_not_made_among_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="exists already"):
        tiny_catalog(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_catalog_is_not_made_at_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="exists already"):
        tiny_catalog(tmp_path / "file")


@pytest.mark.parametrize("call", [open_catalog, tiny_catalog, list_versions])
def test_an_address_of_another_kind_is_no_location(call):
    with pytest.raises(InputError, match="use a folder, or one of s3://"):
        call("https://host/atlas")


@pytest.mark.parametrize("call", [open_catalog, tiny_catalog, list_versions])
def test_a_whole_bucket_is_no_location(call):
    with pytest.raises(InputError, match="name a folder in it"):
        call("s3://bucket")


@pytest.mark.parametrize("call", [open_catalog, list_versions])
@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_what_is_no_catalog_is_not_found_and_the_message_tells_how_to_make_one(tmp_path, call, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotFoundError, match="make one with `lloki-atlas create"):
        call(tmp_path / name)


def test_an_unknown_mode_is_refused(catalog):
    with pytest.raises(InputError, match="mode is 'w'"):
        open_catalog(catalog.root, mode="w")


def test_a_commit_is_seen_by_who_opens_afterwards(catalog):
    committed = commit_slice(catalog, "s1")
    assert committed.version == 2
    assert open_catalog(catalog.root, mode="r+") == committed


def test_an_opened_catalog_does_not_move(catalog):
    reader = open_catalog(catalog.root)
    commit_slice(catalog, "s1")
    assert reader.state.slices == {}
    with pytest.raises(NotFoundError):
        reader.slice("s1")


def test_every_old_version_can_be_read(catalog):
    states = [catalog.state]
    for number in range(20):
        catalog = commit_slice(catalog, f"s{number % 7}", content=str(number))
        states.append(catalog.state)
    for number, state in enumerate(states, start=1):
        assert open_catalog(catalog.root, version=number).state == state


@pytest.mark.parametrize("version", [0, -1, 3])
def test_an_unknown_version_is_not_found(catalog, version):
    commit_slice(catalog, "s1")
    with pytest.raises(NotFoundError, match="from 1 to 2"):
        open_catalog(catalog.root, version=version)


def test_versions_are_listed_in_order(catalog):
    for number in range(3):
        catalog = commit_slice(catalog, f"s{number}")
    assert list_versions(catalog.root) == [1, 2, 3, 4]


def test_history_tells_who_did_what_oldest_first(catalog):
    catalog = commit_slice(catalog, "s1")
    first, second = history(catalog)
    assert (first.message, second.message) == ("made for a test", "slice s1")
    assert (first.version, second.version, second.parent) == (1, 2, 1)
    assert first.owner != second.owner
    assert second.time.endswith("+00:00")


def test_history_ends_at_the_version_opened(catalog):
    commit_slice(catalog, "s1")
    assert len(history(catalog)) == 1


def test_version_one_and_every_sixteenth_hold_the_whole_state(catalog):
    for number in range(33):
        catalog = commit(catalog, Change(config={"n": number}), message="")
    assert [record.version for record in history(catalog) if record.state] == [1, 16, 32]


@pytest.mark.parametrize("version", [1, 15, 16, 31, 32, 34])
def test_opening_reads_at_most_sixteen_records(catalog, monkeypatch, version):
    for number in range(33):
        catalog = commit(catalog, Change(config={"n": number}), message="")
    reads, real = [], log.read_record
    monkeypatch.setattr(log, "read_record", lambda *where: (reads.append(where), real(*where))[1])
    open_catalog(catalog.root, version=version)
    assert 1 <= len(reads) <= 16


def test_reading_writes_nothing(catalog):
    catalog = commit_slice(catalog, "s1")
    before = folder_digest(catalog.root)
    reader = open_catalog(catalog.root)
    history(reader), verify(reader), list_versions(catalog.root), reader.path("slices", "k"), reader.slice("s1")
    assert folder_digest(catalog.root) == before


def test_a_reader_cannot_commit(catalog):
    before = folder_digest(catalog.root)
    with pytest.raises(InputError, match="mode='r\\+'"):
        commit(open_catalog(catalog.root), Change(config={}), message="")
    assert folder_digest(catalog.root) == before


def test_a_catalog_pickles(catalog):
    assert pickle.loads(pickle.dumps(commit_slice(catalog, "s1"))).slice("s1").n_cells == 11


@pytest.mark.parametrize(
    ("kind", "name"),
    [("slices", "k.zarr"), ("references", "k.zarr"), ("graphs", "k.zarr"), ("models", "k"), ("staging", "k")],
)
def test_an_object_lives_in_the_folder_of_its_kind(catalog, kind, name):
    assert catalog.path(kind, "k") == catalog.root / kind / name


@pytest.mark.parametrize(("kind", "key"), [("things", "k"), ("slices", "../k"), ("slices", ""), ("slices", "a/b")])
def test_a_path_outside_the_catalog_cannot_be_named(catalog, kind, key):
    with pytest.raises(InputError):
        catalog.path(kind, key)


def test_an_unknown_slice_is_not_found_and_the_nearest_are_named(catalog):
    catalog = commit_slice(commit_slice(catalog, "brain-1"), "liver")
    with pytest.raises(NotFoundError, match="nearest are brain-1"):
        catalog.slice("brain-2")


def test_a_stale_writer_of_another_slice_is_rebased(catalog):
    commit_slice(catalog, "s1")
    committed = commit_slice(catalog, "s2")
    assert committed.version == 3
    assert set(committed.state.slices) == {"s1", "s2"}
    assert open_catalog(catalog.root, mode="r+") == committed


def _changes(catalog):
    return {
        "slice 's1'": Change(slices={"s1": slice_record(catalog, "s1")}),
        "model 'embedder'": Change(models={"embedder": publish_object(catalog, "models", "m")}),
        "the reference": Change(reference=publish_object(catalog, "references", "r")),
        "the settings": Change(config={"other": {}}),
    }


@pytest.mark.parametrize("what", ["slice 's1'", "model 'embedder'", "the reference", "the settings"])
def test_a_stale_writer_of_the_same_thing_conflicts_and_changes_nothing(catalog, what):
    change = _changes(catalog)[what]
    commit(catalog, change, message="first")
    before = folder_digest(catalog.root)
    with pytest.raises(ConflictError, match=what):
        commit(catalog, change, message="second")
    assert folder_digest(catalog.root) == before


def test_changes_of_different_things_never_conflict(catalog):
    for change in _changes(catalog).values():
        commit(catalog, change, message="")
    state = open_catalog(catalog.root).state
    assert state.config == {"other": {}}
    assert state.reference
    assert state.models
    assert state.slices


def test_removing_conflicts_with_replacing(catalog):
    catalog = commit_slice(catalog, "s1")
    commit_slice(catalog, "s1", content="second")
    with pytest.raises(ConflictError, match="s1"):
        commit(catalog, Change(slices={"s1": None}), message="")


def test_who_opens_the_head_may_change_it_again(catalog):
    catalog = commit_slice(catalog, "s1")
    catalog = commit_slice(catalog, "s1", content="second")
    assert commit(catalog, Change(slices={"s1": None}), message="").state.slices == {}


@pytest.mark.parametrize("finished", [False, None])
def test_an_object_that_is_not_complete_cannot_be_committed(catalog, finished):
    key = "0" * 32 if finished is None else publish_object(catalog, "models", "m", finished=False)
    before = folder_digest(catalog.root)
    with pytest.raises(FormatError, match=f"models/{key}.*not complete"):
        commit(catalog, Change(models={"embedder": key}), message="")
    assert folder_digest(catalog.root) == before


def test_an_object_with_another_digest_than_announced_cannot_be_committed(catalog):
    key = publish_object(catalog, "models", "m")
    with pytest.raises(FormatError, match="not the one announced"):
        commit(catalog, Change(models={"embedder": key}, objects={f"models/{key}": "0" * 32}), message="")


def test_digests_left_out_are_looked_up(catalog):
    catalog = commit_slice(catalog, "s1")
    assert set(catalog.state.objects) == catalog.state.references()
    assert history(catalog)[-1].change.objects == catalog.state.objects
