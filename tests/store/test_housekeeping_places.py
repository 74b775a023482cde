"""Housekeeping of a catalog in a bucket: what holds in a folder holds there."""

from __future__ import annotations

import pytest
from support.housekeeping import quick_disk
from support.stores import commit_slice, publish_object, tiny_catalog

from lloki_atlas.errors import ConflictError, FormatError, NotFoundError
from lloki_atlas.store.catalog import commit, open_catalog, verify
from lloki_atlas.store.durable import files_below
from lloki_atlas.store.leases import at_work, collecting, writing
from lloki_atlas.store.portable import export_version, import_version
from lloki_atlas.store.records import Change
from lloki_atlas.store.retention import gc
from lloki_atlas.store.revert import remove, rollback
from lloki_atlas.store.verification import verify_deep, verify_quick

__all__ = ["quick_disk"]
pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture
def catalog(bucket):
    """Version 2 has a model and slice s1, 3 slice s2 too, 4 another s1."""
    catalog = tiny_catalog(f"{bucket}/folder/atlas")
    catalog = commit(catalog, Change(models={"embedder": publish_object(catalog, "models", "m")}), message="")
    return commit_slice(commit_slice(catalog, "s1"), "s1", content="second")


def names(root):
    return sorted(name for name in files_below(root) if not name.startswith("versions/"))


def test_leases_keep_writers_and_collectors_apart(catalog):
    root = catalog.root
    with writing(root, "a run"):
        assert [lease["what"] for lease in at_work(root)] == ["a run"]
        with pytest.raises(ConflictError, match="a run"):
            collecting(root).__enter__()
    with (
        collecting(root),
        pytest.raises(ConflictError, match="being collected"),
        writing(root, "a test", wait_seconds=0),
    ):
        pytest.fail("it wrote")
    assert at_work(root) == []
    assert names(root / "writers") == []


def test_a_commit_costs_three_requests_for_its_lease(catalog, bucket):
    bucket.faults()
    commit(catalog, Change(config={"n": 1}), message="")
    asked = [(method, path.partition(bucket.name)[2]) for method, path, *_ in bucket.requests()]
    announced, listed, *between, withdrawn = asked
    assert announced[0] == "PUT"
    assert announced[1].startswith("/folder/atlas/writers/")
    assert (listed, withdrawn) == (("GET", ""), ("POST", ""))
    assert [method for method, _ in between].count("PUT") == 1
    assert len(between) <= 5


def test_garbage_goes_and_what_is_needed_stays(catalog):
    before = names(catalog.root)
    publish_object(catalog, "graphs", "garbage")
    publish_object(catalog, "graphs", "half", finished=False)
    (catalog.root / "staging" / ("0" * 32) / "c" / "0").write_bytes(b"left")
    said = gc(catalog, grace_hours=0, dry_run=True)
    assert gc(catalog).objects == ()
    done = gc(catalog, grace_hours=0)
    assert (len(done.objects), len(done.leftovers)) == (2, 1)
    assert (said.objects, said.leftovers, said.n_bytes) == (done.objects, done.leftovers, done.n_bytes)
    assert names(catalog.root) == before
    assert verify_deep(str(catalog.root)) == []


def test_versions_are_given_up(catalog):
    assert gc(catalog, keep_versions=1, grace_hours=0).versions == (1, 2, 3)
    head = open_catalog(str(catalog.root), mode="r+")
    assert verify(head) == verify_quick(head) == verify_deep(head.root) == []
    with pytest.raises(NotFoundError, match="choose from 4 to 5"):
        open_catalog(str(catalog.root), version=3)
    with pytest.raises(NotFoundError, match=r"given up.*are gone"):
        rollback(head, 3)


def test_slices_leave_and_come_back(catalog):
    back = rollback(remove(catalog, "s1"), 3)
    assert back.state == open_catalog(str(catalog.root), version=3).state


def test_versions_travel_between_buckets_and_folders(catalog, bucket, tmp_path):
    exported = export_version(catalog, tmp_path / "out")
    assert exported.state == catalog.state
    assert verify_deep(exported.root) == []
    other = tiny_catalog(f"{bucket}/other")
    assert import_version(other, exported.root).state.objects == catalog.state.objects
    third = tiny_catalog(f"{bucket}/third")
    assert import_version(third, str(catalog.root)).state.objects == catalog.state.objects
    assert verify_deep(str(third.root)) == verify_deep(str(other.root)) == []
    folder = tiny_catalog(tmp_path / "folder")
    assert import_version(folder, str(third.root)).state.objects == catalog.state.objects


def test_damage_is_named_and_does_not_travel(catalog, bucket, tmp_path):
    path = catalog.path("slices", catalog.slice("s1").objects["ingest"])
    content = (path / "part" / "0").read_bytes()
    (path / "part" / "0").write_bytes(b"x" + content[1:])
    assert verify_quick(catalog) == []
    (problem,) = verify_deep(catalog.root)
    assert f"{path.name}: file part/0 was altered" in problem
    for travel in (
        lambda: export_version(catalog, tmp_path / "out"),
        lambda: import_version(tiny_catalog(f"{bucket}/other"), str(catalog.root)),
    ):
        with pytest.raises(FormatError, match="part/0"):
            travel()
    assert list(tmp_path.iterdir()) == []
