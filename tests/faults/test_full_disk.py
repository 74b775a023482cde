"""A disk that is full, or out of files: a clear sentence, the old head intact, the rest done once there is room."""

from __future__ import annotations

import json
import shutil

import pytest
from support.aftermath import reachable_files, strange_names
from support.atlases import CONFIG, add_slice, new_catalog, run_here
from support.commands import run_main
from support.full_disk import leave, leave_inodes, small_disk

from lloki_atlas.engine.plan import run_task
from lloki_atlas.errors import LlokiAtlasError
from lloki_atlas.stages.create import create_catalog
from lloki_atlas.stages.pipeline import plan
from lloki_atlas.store.catalog import list_versions, open_catalog, verify
from lloki_atlas.store.durable import describe_os_error

PLENTY = 12 * 2**20
FULL = "the disk is full or the quota is used up"


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as mounted:
        yield mounted


def assert_says_full(error):
    assert isinstance(error, OSError | LlokiAtlasError), repr(error)
    assert FULL in describe_os_error(error), repr(error)


def assert_whole(catalog, undisturbed):
    assert catalog.state == undisturbed.state
    assert reachable_files(catalog) == reachable_files(undisturbed)
    assert verify(catalog) == []
    assert strange_names(catalog.root) == []


def contents(root):
    return {str(path) for path in root.rglob("*") if path.is_file()}


def little_by_little(step, disk, root, make_room):
    """Take a step on a full disk again and again, each time with more room; how often it failed.

    `make_room(n)` leaves n units free; where more room let nothing more be written, twice as much more comes next.
    """
    room, more, failures = 0, 1, 0
    before = open_catalog(root) if root.exists() else None
    while True:
        make_room(room)
        files = contents(root)
        try:
            return step(), failures
        except (OSError, LlokiAtlasError) as error:
            assert_says_full(error)
            failures += 1
        if before is not None:
            head = open_catalog(root)
            assert head.version >= before.version
            assert verify(head) == []
            assert open_catalog(root, version=before.version).state == before.state
        more = 1 if contents(root) != files else 2 * more
        room += more
        assert failures < 60


def test_a_run_on_a_full_disk_is_finished_little_by_little(disk, ingested, built):
    root = disk / "atlas"
    shutil.copytree(ingested, root)
    catalog, failures = little_by_little(
        lambda: run_here(plan(open_catalog(root, mode="r+"))), disk, root, lambda n: leave(disk, n * 48 * 1024)
    )
    assert failures >= 5
    assert_whole(catalog, open_catalog(built))
    assert list((root / "staging").iterdir()) == []


def test_a_run_without_files_to_spare_is_finished_little_by_little(tmp_path, ingested, built):
    with small_disk(tmp_path / "disk", inodes=1500) as disk:
        root = disk / "atlas"
        shutil.copytree(ingested, root)
        catalog, failures = little_by_little(
            lambda: run_here(plan(open_catalog(root, mode="r+"))), disk, root, lambda n: leave_inodes(disk, 8 * n)
        )
        assert failures >= 5
        assert_whole(catalog, open_catalog(built))


def test_making_a_catalog_and_ingesting_on_a_full_disk_is_finished_little_by_little(disk, sources, profile, tmp_path):
    undisturbed = new_catalog(tmp_path / "atlas", sources, slices=("simfish_1",))
    root = disk / "atlas"

    def make():
        return create_catalog(root, reference=profile, config=CONFIG)

    with pytest.raises(LlokiAtlasError, match="no catalog"):
        open_catalog(root)
    leave(disk, 0)
    with pytest.raises(OSError, match="No space") as refused:
        make()
    assert_says_full(refused.value)
    leave(disk, 64 * 1024)
    with pytest.raises(OSError, match="No space"):
        make()
    leave(disk, PLENTY)
    assert make().version == 1
    catalog, failures = little_by_little(
        lambda: add_slice(open_catalog(root, mode="r+"), sources, "simfish_1"),
        disk,
        root,
        lambda n: leave(disk, n * 48 * 1024),
    )
    assert failures >= 2
    assert list_versions(root) == [1, 2]
    assert_whole(catalog, undisturbed)


@pytest.mark.parametrize("free", [0, 128 * 1024])
def test_the_command_to_ingest_says_that_the_disk_is_full_and_changes_nothing(disk, ingested, sources, free):
    root = disk / "atlas"
    shutil.copytree(ingested, root)
    files = contents(root)
    leave(disk, free)
    command = ["ingest", root, sources / "simish_1.h5ad", "--technology", "SimISH", "--organism", "mouse"]
    result = run_main(*command, "--unit", "micrometer", "--json")
    assert result.code == 3
    assert result.out == ""
    # a library may warn of what it makes of the data before
    assert result.err.splitlines()[-1].startswith(f"error: {FULL}")
    assert contents(root) == files
    leave(disk, PLENTY)
    result = run_main(*command, "--unit", "micrometer", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["version"] == 4


def test_a_commit_that_does_not_fit_is_made_when_there_is_room(disk, ingested):
    root = disk / "atlas"
    shutil.copytree(ingested, root)
    catalog = run_here(plan(open_catalog(root, mode="r+"), until="tile"))
    tasks = plan(open_catalog(root, mode="r+"), until="reference")
    for task in tasks.tasks:
        run_task(task)
    leave(disk, 0)
    with pytest.raises(OSError, match="No space") as refused:
        run_here(tasks)
    assert_says_full(refused.value)
    assert open_catalog(root).version == catalog.version
    leave(disk, PLENTY)
    assert run_here(plan(open_catalog(root, mode="r+"), until="reference")).version == catalog.version + 1


@pytest.mark.slow
@pytest.mark.parametrize("free", [0, 200 * 1024, 2 * 2**20])
def test_the_command_to_run_says_that_the_disk_is_full_and_goes_on_when_there_is_room(disk, ingested, built, free):
    root = disk / "atlas"
    shutil.copytree(ingested, root)
    leave(disk, free)
    result = run_main("run", root, "--workers", 2, "--quiet", "--json")
    assert result.code == 3
    assert result.out == ""
    assert result.err.splitlines()[-1].startswith(f"error: {FULL}")
    before, head = open_catalog(ingested), open_catalog(root)
    assert head.version in (3, 4)  # what was finished is committed where there is room for that
    assert verify(head) == []
    assert open_catalog(root, version=3).state == before.state
    leave(disk, PLENTY)
    result = run_main("run", root, "--workers", 2, "--quiet", "--json")
    assert result.code == 0, result.err
    assert_whole(open_catalog(root), open_catalog(built))
