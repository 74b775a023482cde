"""What a killed run left in the staging area, and damaged on top: the next run copes with it, to the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.aftermath import reachable_files
from support.atlases import copied, run_here

from lloki_atlas.engine.plan import run_task
from lloki_atlas.errors import CheckpointError, FormatError
from lloki_atlas.stages.pipeline import plan
from lloki_atlas.store.catalog import open_catalog, verify


@pytest.fixture(scope="module")
def unpublished(ingested, tmp_path_factory):
    """A catalog whose run ended when every tile of the first slice was there and its embedding was to be published."""
    root = tmp_path_factory.mktemp("unpublished") / "atlas"
    for task in plan(copied(ingested, root)).tasks:
        if not task.function:
            return root
        run_task(task)
    raise AssertionError("no task publishes tiles")


@pytest.fixture
def left(unpublished, tmp_path):
    """A copy of it, its folder of rows, and the markers of its tiles."""
    root = copied(unpublished, tmp_path / "atlas").root
    (markers,) = (root / "staging").glob("*.tiles")
    return root, root / "staging" / markers.stem, sorted(markers.iterdir())


def finish(root):
    return run_here(plan(open_catalog(root, mode="r+")))


def assert_whole(catalog, undisturbed: Path):
    other = open_catalog(undisturbed)
    assert catalog.state == other.state
    assert reachable_files(catalog) == reachable_files(other)
    assert verify(catalog) == []


def test_a_run_goes_on_where_the_tiles_are_all_there(left, built):
    root, rows, markers = left
    assert len(markers) == 2
    written = {path: path.stat().st_mtime_ns for path in rows.rglob("c/*/*")}
    first = next(task for task in plan(open_catalog(root, mode="r+")).tasks if not task.function)
    run_task(first)
    kept = {rows / path.relative_to(first.output.path): path.stat().st_mtime_ns for path in files(first.output.path)}
    assert {path: time for path, time in kept.items() if path in written} == written
    assert_whole(finish(root), built)


def files(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def garble(path):
    path.write_bytes(b"\0" * path.stat().st_size)


@pytest.mark.parametrize("damage", [empty, Path.unlink])
def test_tiles_whose_markers_are_gone_are_written_again(left, built, damage):
    root, _, markers = left
    for marker in markers:
        damage(marker)
    assert_whole(finish(root), built)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("zarr.json", empty),
        ("zarr.json", half),
        ("zarr.json", Path.unlink),
        ("X_fp/zarr.json", empty),
        ("X_fp/zarr.json", garble),
        ("X_fp/zarr.json", Path.unlink),
    ],
)
def test_rows_whose_form_was_lost_are_written_again(left, built, name, damage):
    root, rows, markers = left
    markers[1].unlink()
    damage(rows / name)
    assert_whole(finish(root), built)


@pytest.mark.parametrize("damage", [empty, Path.unlink])
@pytest.mark.parametrize("name", ["zarr.json", "X_fp/zarr.json"])
def test_rows_that_are_all_there_are_published_with_their_form_where_it_was_lost(left, built, name, damage):
    root, rows, _ = left
    damage(rows / name)
    assert_whole(finish(root), built)


@pytest.mark.parametrize("damage", [half, Path.unlink])
def test_rows_that_are_cut_short_are_named_and_written_again_by_the_next_run(left, built, damage):
    root, rows, _ = left
    damage(rows / "X_fp" / "c" / "1" / "0")
    with pytest.raises(FormatError, match=f"rows 32 and on of {rows} are not what was written: run again"):
        finish(root)
    assert_whole(finish(root), built)


@pytest.mark.parametrize("content", ["{", "[]", '{"files": 3}', '{"files": {"X_fp/c/0/0": []}}'])
def test_a_garbled_marker_costs_its_tile_once_more(left, built, content):
    root, rows, markers = left
    markers[0].write_text(content)
    with pytest.raises(FormatError, match=f"rows 0 and on of {rows} are not what was written: run again"):
        finish(root)
    assert_whole(finish(root), built)


def test_rows_that_nobody_wrote_are_not_published_as_empty_ones(left, built):
    root, rows, markers = left
    publishing = next(task for task in plan(open_catalog(root, mode="r+")).tasks if not task.function)
    markers[1].unlink()
    (rows / "X_fp" / "c" / "1" / "0").unlink()
    with pytest.raises(FormatError, match=f"X_fp/c/1/0 of {rows} was never written: run again"):
        run_task(publishing)
    assert_whole(finish(root), built)


def test_markers_that_outlived_all_their_rows_cost_one_run(left, built):
    root, rows, _ = left
    shutil.rmtree(rows)
    with pytest.raises(FormatError, match="run again"):
        finish(root)
    assert_whole(finish(root), built)


@pytest.mark.parametrize("lost", ["receipt", "folder"])
@pytest.mark.parametrize("kind", ["graphs", "embeddings"])
def test_half_of_a_published_object_is_made_whole(built, tmp_path, kind, lost):
    root = copied(built, tmp_path / "atlas").root
    for receipt in (root / kind).glob("*.json"):
        if lost == "receipt":
            receipt.unlink()
        else:
            shutil.rmtree(receipt.with_suffix(""))
    assert_whole(finish(root), built)


def test_an_unfinished_training_that_is_damaged_is_named_and_started_anew_without_its_file(ingested, built, tmp_path):
    catalog = copied(ingested, tmp_path / "atlas")
    (state,) = (Path(task.arguments["state"]) for task in plan(catalog).tasks if task.stage == "train")
    state.parent.mkdir(exist_ok=True)
    state.write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match=str(state)):
        finish(catalog.root)
    state.unlink()
    assert_whole(finish(catalog.root), built)


def test_what_others_left_in_the_staging_area_is_not_touched(left, built):
    root, _, _ = left
    foreign = root / "staging" / f"{'0' * 32}-deadbeef"
    foreign.mkdir()
    (foreign / "zarr.json").write_text(json.dumps({"half": True}))
    assert_whole(finish(root), built)
    assert [path.name for path in (root / "staging").iterdir()] == [foreign.name]
