"""Taking slices out and earlier states back, as new versions of a history that only grows."""

from __future__ import annotations

import shutil

import pytest
from support.folders import folder_digest
from support.housekeeping import grow_old, quick_disk
from support.stores import commit_slice, publish_object, slice_record, tiny_catalog

from lloki_atlas.errors import ConflictError, FormatError, InputError, NotFoundError
from lloki_atlas.store.catalog import commit, history, open_catalog, verify
from lloki_atlas.store.records import Change
from lloki_atlas.store.retention import gc
from lloki_atlas.store.revert import difference, remove, rollback
from lloki_atlas.store.verification import verify_deep

__all__ = ["quick_disk"]
pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture
def catalog(tmp_path):
    """Version 1 has nothing, 2 slice s1, 3 slice s2 too, 4 a model, a reference and other settings, 5 another s1."""
    catalog = tiny_catalog(tmp_path / "atlas")
    catalog = commit_slice(commit_slice(catalog, "s1"), "s2")
    change = Change(
        config={"tile": {"tile_cells": 8}},
        reference=publish_object(catalog, "references", "r"),
        models={"embedder": publish_object(catalog, "models", "m")},
    )
    return commit_slice(commit(catalog, change, message="more"), "s1", content="second")


def test_a_removed_slice_is_gone_and_its_past_is_not(catalog):
    removed = remove(catalog, ["s1"])
    assert (removed.version, set(removed.state.slices)) == (6, {"s2"})
    assert open_catalog(catalog.root, version=5).state == catalog.state
    assert history(removed)[-1].message == "remove s1"
    assert verify_deep(catalog.root) == []


def test_several_slices_go_in_one_version(catalog):
    removed = remove(catalog, ["s2", "s1", "s2"])
    assert (removed.version, dict(removed.state.slices)) == (6, {})


def test_one_slice_may_be_named_as_text(catalog):
    assert set(remove(catalog, "s1").state.slices) == {"s2"}


def test_an_unknown_slice_is_named_with_the_nearest_and_nothing_is_removed(catalog):
    before = folder_digest(catalog.root)
    with pytest.raises(NotFoundError, match=r"'s3'.*nearest are s1, s2"):
        remove(catalog, ["s1", "s3"])
    assert folder_digest(catalog.root) == before


def test_removing_nothing_is_refused(catalog):
    with pytest.raises(InputError, match="say which"):
        remove(catalog, [])


def test_a_slice_that_another_writer_changed_is_not_removed(catalog):
    commit_slice(catalog, "s1", content="third")
    with pytest.raises(ConflictError, match="s1"):
        remove(catalog, ["s1"])
    assert remove(catalog, ["s2"]).version == 7


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_a_rollback_is_a_new_version_that_says_what_the_old_one_said(catalog, version):
    back = rollback(catalog, version)
    assert back.version == 6
    assert back.state == open_catalog(catalog.root, version=version).state
    assert open_catalog(catalog.root, mode="r+") == back
    assert open_catalog(catalog.root, version=5).state == catalog.state
    assert verify(back) == []
    assert verify_deep(catalog.root) == []
    assert history(back)[-1].message == f"roll back to version {version}"


def test_a_rollback_can_be_rolled_back(catalog):
    back = rollback(catalog, 1)
    assert rollback(back, 5).state == catalog.state


def test_a_rollback_to_what_is_there_makes_no_version(catalog):
    assert rollback(catalog, 5) == catalog
    back = rollback(catalog, 4)
    assert rollback(back, 4) == back
    assert open_catalog(catalog.root).version == 6


def test_the_difference_of_two_states_leads_from_one_to_the_other(catalog):
    states = [open_catalog(catalog.root, version=number).state for number in range(1, 6)]
    for old in states:
        for new in states:
            assert old.apply(difference(old, new)) == new


def test_a_rollback_undoes_no_commit_that_its_caller_has_not_seen(catalog):
    commit_slice(catalog, "s3")
    before = folder_digest(catalog.root)
    with pytest.raises(ConflictError, match="version 6, not 5"):
        rollback(catalog, 1)
    assert folder_digest(catalog.root) == before


def test_a_rollback_that_loses_the_race_for_its_version_is_refused(catalog, monkeypatch):
    def overtaken(root, version):
        monkeypatch.undo()
        commit_slice(open_catalog(root, mode="r+"), "s3")
        return open_catalog(root, version=version).state

    monkeypatch.setattr("lloki_atlas.store.revert.read_state", overtaken)
    with pytest.raises(ConflictError, match="version 6"):
        rollback(catalog, 2)
    assert set(open_catalog(catalog.root).state.slices) == {"s1", "s2", "s3"}


@pytest.mark.parametrize("version", [0, -1, 6])
def test_there_is_no_rollback_to_a_version_that_is_not(catalog, version):
    with pytest.raises(NotFoundError, match="choose from 1 to 5"):
        rollback(catalog, version)


def test_there_is_no_rollback_to_a_version_that_was_given_up_and_what_is_gone_is_named(catalog):
    gone = catalog.state.slices["s1"].objects["ingest"]
    keys = open_catalog(catalog.root, version=2).slice("s1").objects
    grow_old(catalog.root)
    gc(catalog, keep_versions=1)
    head = open_catalog(catalog.root, mode="r+")
    with pytest.raises(NotFoundError, match=r"version 2 .*given up.* are gone: choose from 5 to 6") as caught:
        rollback(head, 2)
    assert all(key in str(caught.value) for key in keys.values())
    assert gone not in str(caught.value)
    with pytest.raises(NotFoundError, match=r"version 4 .*given up"):
        rollback(head, 4)


def test_a_retained_version_whose_objects_are_missing_cannot_come_again(catalog):
    path = catalog.path("slices", open_catalog(catalog.root, version=2).slice("s1").objects["ingest"])
    shutil.rmtree(path)
    before = folder_digest(catalog.root)
    with pytest.raises(FormatError, match=f"version 2 .*slices/{path.stem} is gone"):
        rollback(catalog, 2)
    assert folder_digest(catalog.root) == before


@pytest.mark.parametrize("call", [lambda catalog: remove(catalog, ["s1"]), lambda catalog: rollback(catalog, 1)])
def test_a_reader_takes_nothing_back(catalog, call):
    with pytest.raises(InputError, match="mode='r\\+'"):
        call(open_catalog(catalog.root))


def test_a_removed_slice_may_be_added_again(catalog):
    removed = remove(catalog, ["s1"])
    again = commit(removed, Change(slices={"s1": slice_record(removed, "s1")}), message="")
    assert again.state.slices["s1"] == open_catalog(catalog.root, version=2).state.slices["s1"]
