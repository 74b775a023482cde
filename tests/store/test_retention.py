"""Collecting garbage: what is needed stays whatever happens, what is not goes, and half of nothing is left."""

from __future__ import annotations

import json
import multiprocessing
import os

import pytest
from support.folders import folder_digest
from support.housekeeping import (
    collect_in_process,
    grow_old,
    needed,
    object_names,
    quick_disk,
    record_of,
    tree,
    write_in_process,
)
from support.stores import commit_slice, publish_object, slice_record, tiny_catalog

from lloki_atlas.errors import ConflictError, FormatError, InputError, NotFoundError
from lloki_atlas.store import retention
from lloki_atlas.store.catalog import commit, history, list_versions, open_catalog, verify
from lloki_atlas.store.leases import collecting, writing
from lloki_atlas.store.objects import is_complete
from lloki_atlas.store.publishing import publish
from lloki_atlas.store.records import KINDS, RECORD_FORMAT, Change
from lloki_atlas.store.retention import gc
from lloki_atlas.store.verification import verify_deep

__all__ = ["quick_disk"]
pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture
def catalog(tmp_path):
    """Versions 2 to 4 hold three contents of one slice, version 5 a second slice; all of it is two days old."""
    catalog = tiny_catalog(tmp_path / "atlas")
    for content in ("one", "two", "three"):
        catalog = commit_slice(catalog, "s1", content=content)
    catalog = commit_slice(catalog, "s2")
    grow_old(catalog.root)
    return catalog


def test_without_garbage_nothing_changes(catalog):
    before = tree(catalog.root)
    collected = gc(catalog)
    assert (collected.objects, collected.leftovers, collected.n_bytes, collected.versions) == ((), (), 0, ())
    assert tree(catalog.root) == before
    assert open_catalog(catalog.root, mode="r+") == catalog


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("finished", [True, False])
def test_an_object_that_no_version_reaches_goes_with_its_receipt(catalog, kind, finished):
    before = tree(catalog.root)
    key = publish_object(catalog, kind, "garbage", finished=finished)
    grow_old(catalog.root)
    collected = gc(catalog)
    assert collected.objects == (f"{kind}/{catalog.path(kind, key).name}",)
    assert collected.n_bytes >= 50 * len("garbage")
    assert tree(catalog.root) == before


def test_a_receipt_without_its_folder_goes(catalog):
    before = tree(catalog.root)
    path = catalog.path("graphs", publish_object(catalog, "graphs", "garbage"))
    path.rename(catalog.path("staging", "0" * 32))
    grow_old(catalog.root)
    gc(catalog)
    assert tree(catalog.root) == before


def test_every_version_stays_readable_unless_it_is_given_up(catalog):
    gc(catalog, grace_hours=0)
    for version in range(1, 6):
        assert verify(open_catalog(catalog.root, version=version)) == []


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_versions_beyond_the_newest_are_given_up(catalog, keep):
    collected = gc(catalog, keep_versions=keep)
    oldest = 6 - keep
    assert collected.versions == tuple(range(1, oldest))
    head = open_catalog(catalog.root)
    assert (head.version, head.state.oldest) == (6, oldest)
    for version in range(oldest, 7):
        assert verify(open_catalog(catalog.root, version=version)) == []
    for version in range(1, oldest):
        with pytest.raises(NotFoundError, match=f"version {version} .*given up.*choose from {oldest} to 6"):
            open_catalog(catalog.root, version=version)
    kept = {name for version in range(oldest, 7) for name in needed(open_catalog(catalog.root, version=version))}
    assert object_names(catalog.root) == kept
    assert len(history(head)) == 6
    assert list_versions(catalog.root) == list(range(1, 7))
    assert verify_deep(catalog.root) == []


def test_an_unknown_version_is_told_which_there_are(catalog):
    gc(catalog, keep_versions=1)
    with pytest.raises(NotFoundError, match=r"no version 9 .* choose from 5 to 6"):
        open_catalog(catalog.root, version=9)


@pytest.mark.parametrize("keep", [5, 6, 100])
def test_keeping_as_many_as_there_are_commits_nothing(catalog, keep):
    assert gc(catalog, keep_versions=keep).versions == ()
    assert open_catalog(catalog.root).version == 5


def test_collecting_again_does_nothing_more(catalog):
    gc(catalog, keep_versions=2)
    before = tree(catalog.root)
    again = gc(open_catalog(catalog.root, mode="r+"), keep_versions=2)
    assert (again.versions, again.objects, again.leftovers) == ((), (), ())
    assert tree(catalog.root) == before


def test_what_was_given_up_stays_given_up_in_checkpoints_and_after_more_commits(catalog):
    gc(catalog, keep_versions=1)
    catalog = open_catalog(catalog.root, mode="r+")
    for number in range(20):
        catalog = commit(catalog, Change(config={"n": number}), message="")
    assert open_catalog(catalog.root).state.oldest == 5
    assert open_catalog(catalog.root, version=17).state.oldest == 5
    with pytest.raises(NotFoundError, match="given up"):
        open_catalog(catalog.root, version=4)
    assert verify_deep(catalog.root) == []


def test_records_have_the_first_form_until_something_is_given_up(catalog):
    gc(catalog, keep_versions=1)
    commit(open_catalog(catalog.root, mode="r+"), Change(config={}), message="")
    forms = [json.loads(file.read_bytes())["format"] for file in sorted((catalog.root / "versions").iterdir())]
    assert forms == [1, 1, 1, 1, 1, RECORD_FORMAT, RECORD_FORMAT]


def test_a_dry_run_says_what_a_collection_does_and_does_nothing(catalog):
    publish_object(catalog, "graphs", "garbage")
    (catalog.root / "staging" / ("0" * 32)).mkdir()
    grow_old(catalog.root)
    before = folder_digest(catalog.root)
    said = gc(open_catalog(catalog.root), keep_versions=2, dry_run=True)
    assert folder_digest(catalog.root) == before
    done = gc(catalog, keep_versions=2)
    assert said.dry_run
    assert {**done.to_json(), "dry_run": True} == said.to_json()
    assert len(done.objects) == 5


def test_what_is_younger_than_the_grace_period_stays(catalog):
    publish_object(catalog, "graphs", "young")
    publish_object(catalog, "graphs", "half", finished=False)
    (catalog.root / "staging" / f"{'0' * 32}.tiles").mkdir()
    before = tree(catalog.root)
    collected = gc(catalog)
    assert (collected.objects, collected.leftovers, collected.n_young) == ((), (), 3)
    assert tree(catalog.root) == before
    assert len(gc(catalog, grace_hours=0).objects) == 2


def test_one_young_file_keeps_all_of_an_unfinished_write(catalog):
    folder = catalog.root / "staging" / ("0" * 32)
    (folder / "c").mkdir(parents=True)
    (folder / "c" / "0").write_text("old")
    grow_old(catalog.root)
    (folder / "c" / "1").write_text("young")
    os.utime(folder / "c", (0, 0))
    gc(catalog)
    assert (folder / "c" / "0").exists()


def test_leftovers_of_killed_writers_go(catalog):
    root, hexadecimal = catalog.root, "0" * 32
    before = tree(root)
    left = [
        f"staging/{hexadecimal}.tiles/0.json",
        f"staging/{hexadecimal}-12345678/zarr.json",
        f"staging/{hexadecimal}",
        f".catalog.json.{hexadecimal}.tmp",
        f"versions/.00000006.json.{hexadecimal}.tmp",
        "versions/00000006.json#1",
        f"slices/.{hexadecimal}.zarr.json.{hexadecimal}.tmp",
        f"writers/.{hexadecimal}.json.{hexadecimal}.tmp",
        f"graphs/.c.{hexadecimal}.partial",
    ]
    for name in left:
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_text("half")
    grow_old(root)
    collected = gc(catalog)
    assert len(collected.leftovers) == len(left)
    assert collected.n_bytes == len(left) * 4
    assert tree(root) == before


def test_what_has_another_form_than_our_names_is_never_touched(catalog):
    root = catalog.root
    mine = ["notes.txt", "slices/readme.md", "models/mine/weights.bin", "staging/todo.txt", "versions/notes.txt"]
    for name in mine:
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_text("mine")
    grow_old(root)
    gc(catalog, keep_versions=1, grace_hours=0)
    assert all((root / name).read_text() == "mine" for name in mine)


def test_nothing_is_removed_while_somebody_writes(catalog):
    publish_object(catalog, "graphs", "about to be named")
    before = tree(catalog.root)
    with writing(catalog.root, "a run"), pytest.raises(ConflictError, match="a run"):
        gc(catalog, keep_versions=1, grace_hours=0)
    assert tree(catalog.root) == before
    assert open_catalog(catalog.root).version == 5


def test_of_two_collections_at_once_one_refuses(catalog):
    with collecting(catalog.root), pytest.raises(ConflictError, match="collecting garbage"):
        gc(catalog)


@pytest.mark.parametrize("settings", [{"keep_versions": 0}, {"keep_versions": -1}, {"grace_hours": -1.0}])
def test_settings_without_sense_are_refused(catalog, settings):
    with pytest.raises(InputError, match=r"keep at least one|use 0 or more"):
        gc(catalog, **settings)


def test_a_reader_cannot_collect(catalog):
    with pytest.raises(InputError, match="mode='r\\+'"):
        gc(open_catalog(catalog.root))


def test_nothing_is_removed_while_a_retained_record_is_damaged(catalog):
    publish_object(catalog, "graphs", "garbage")
    before = object_names(catalog.root)
    (catalog.root / "versions" / "00000003.json").write_text("{}")
    with pytest.raises(FormatError, match=r"00000003\.json"):
        gc(catalog, grace_hours=0)
    assert object_names(catalog.root) == before


class Died(BaseException):
    """As a kill: nobody handles it."""


def _die_at(monkeypatch, number):
    """Let the system die at the `number`-th call that removes or moves something."""
    calls = []

    def dying(real):
        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) > number:
                raise Died
            return real(*args, **kwargs)

        return call

    for name in ("unlink", "rename", "rmdir"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    monkeypatch.setattr(retention, "remove_tree", dying(retention.remove_tree))


@pytest.mark.parametrize("number", range(14))
def test_a_collection_that_dies_anywhere_leaves_garbage_and_no_half_objects(catalog, monkeypatch, number):
    with monkeypatch.context() as patch:
        _die_at(patch, number)
        try:
            gc(catalog, keep_versions=1)
            pytest.fail("there are more calls to die at")
        except Died:
            pass
    for file in (catalog.root / "writers").iterdir():
        file.unlink()  # of a process that is gone
    head = open_catalog(catalog.root, mode="r+")
    assert verify(head) == []
    assert verify_deep(catalog.root) == []
    for version in range(head.state.oldest, head.version + 1):
        assert verify(open_catalog(catalog.root, version=version)) == []
    # what is made anew in the place of an object that was being removed is whole
    key = publish_object(head, "slices", "s1one")
    assert is_complete(head.path("slices", key))
    assert (head.path("slices", key) / "part" / "0").read_bytes() == b"s1one" * 50
    assert verify_deep(catalog.root) == []
    gc(head, keep_versions=1, grace_hours=0)
    assert object_names(catalog.root) == needed(open_catalog(catalog.root))


def test_an_object_leaves_its_place_whole(catalog, monkeypatch):
    path = catalog.path("graphs", publish_object(catalog, "graphs", "garbage"))
    grow_old(catalog.root)
    monkeypatch.setattr(retention, "remove_tree", lambda folder: None)
    gc(catalog)
    assert not path.exists()
    assert not path.with_name(f"{path.name}.json").exists()
    (aside,) = (catalog.root / "staging").glob("*.collected")
    monkeypatch.undo()
    gc(catalog, grace_hours=0)
    assert not aside.exists()


def test_links_are_removed_and_not_followed(catalog, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.txt").write_text("mine")
    (catalog.root / "graphs").mkdir()
    for name in (f"staging/{'0' * 32}", f"graphs/{'1' * 32}.zarr"):
        (catalog.root / name).symlink_to(outside)
    (catalog.root / "staging" / ("2" * 32)).mkdir()
    (catalog.root / "staging" / ("2" * 32) / "in").symlink_to(outside)
    grow_old(catalog.root)
    gc(catalog, grace_hours=0)
    assert (outside / "thesis.txt").read_text() == "mine"
    assert not any(entry.is_symlink() for entry in catalog.root.rglob("*"))


def test_a_writer_that_began_at_a_version_given_up_still_commits(catalog):
    stale = open_catalog(catalog.root, version=2, mode="r+")
    gc(catalog, keep_versions=1)
    committed = commit(stale, Change(slices={"s3": slice_record(stale, "s3")}), message="")
    assert (committed.version, committed.state.oldest) == (7, 5)
    assert record_of(catalog.root / "versions" / "00000007.json").oldest == 5
    assert set(committed.state.slices) == {"s1", "s2", "s3"}


def test_an_object_that_was_collected_cannot_be_committed_again(catalog):
    record = open_catalog(catalog.root, version=2).slice("s1")
    gc(catalog, keep_versions=1)
    head = open_catalog(catalog.root, mode="r+")
    with pytest.raises(FormatError, match="not complete: run the stage"):
        commit(head, Change(slices={"s1": record}), message="")


def test_an_object_made_again_after_it_was_collected_is_committed(catalog):
    gc(catalog, keep_versions=1)
    head = commit_slice(open_catalog(catalog.root, mode="r+"), "s1", content="one")
    assert verify(head) == []
    assert publish(head.path("staging", "0" * 32), head.path("slices", head.slice("s1").objects["ingest"]), lineage={})


def test_writers_that_name_garbage_and_a_collector_that_hardly_rests_lose_nothing(tmp_path):
    tiny_catalog(tmp_path)
    context = multiprocessing.get_context("spawn")
    start, end, made, collected = context.Barrier(3), context.Event(), context.Queue(), context.Queue()
    work = [(write_in_process, (tmp_path, number, start, made)) for number in range(2)]
    work.append((collect_in_process, (tmp_path, start, end, collected)))
    *writers, collector = (context.Process(target=target, args=args, daemon=True) for target, args in work)
    for process in (*writers, collector):
        process.start()
    versions = [version for _ in writers for version in made.get(timeout=90)]
    end.set()
    done, refused, _ = collected.get(timeout=90)
    for process in (*writers, collector):
        process.join()
    head = open_catalog(tmp_path)
    assert sorted(versions) == list(range(2, 18))
    assert set(head.state.slices) == {f"w{writer}-{step}" for writer in range(2) for step in range(8)}
    assert verify_deep(tmp_path) == []
    assert done + refused > 0
