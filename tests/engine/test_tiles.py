"""Tasks that stream tiles into one or two objects: what is on disk when, what a retry does, how they are cut."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.devices import STARTS, rows_of, stream_task
from support.folders import folder_digest
from support.tasks import N_ROWS, TILE_ROWS, notes, tile_tasks, whole_task

from lloki_atlas.engine.plan import link, run_task, split_tiles
from lloki_atlas.store.arrays import read_arrays
from lloki_atlas.store.objects import is_complete

EXPECTED = {name: np.concatenate([rows_of(start)[name] for start in STARTS]) for name in ("values", "squares")}


def stored(tasks):
    return {
        name: read_arrays(output.path)[name]
        for output, name in zip(tasks[0].outputs, ("values", "squares"), strict=True)
    }


def markers(task):
    return [sorted(int(path.stem) for path in Path(f"{o.staging}.tiles").glob("*.json")) for o in task.outputs]


def test_a_stream_fills_both_objects(tmp_path):
    tasks = stream_task(tmp_path, "one")
    for task in tasks:
        run_task(task)
    for name, values in stored(tasks).items():
        np.testing.assert_array_equal(values, EXPECTED[name])


def test_an_object_that_is_filled_by_a_stream_has_the_bytes_of_one_that_is_filled_by_single_tiles(tmp_path):
    for task in [*stream_task(tmp_path / "stream", "one"), *split_tiles(stream_task(tmp_path / "single", "one"))]:
        run_task(task)
    assert folder_digest(tmp_path / "stream" / "objects") == folder_digest(tmp_path / "single" / "objects")


def test_tiles_are_on_disk_before_the_next_is_asked_for(tmp_path):
    task, *_ = stream_task(tmp_path, "one", "tiles_that_break", arguments={"after": 2})
    with pytest.raises(ZeroDivisionError):
        run_task(task)
    assert markers(task) == [[0, 4], [0, 4]]
    np.testing.assert_array_equal(read_arrays(task.output.staging)["values"][: 2 * TILE_ROWS], EXPECTED["values"][:8])


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_stream_that_broke_goes_on_with_the_tiles_that_are_missing(tmp_path, after):
    broken, *_ = stream_task(tmp_path, "one", "tiles_that_break", arguments={"after": after})
    with pytest.raises(ZeroDivisionError):
        run_task(broken)
    tasks = stream_task(tmp_path, "one")
    for task in tasks:
        run_task(task)
    assert notes(tmp_path / "log") == [f"one {list(STARTS)}", f"one {list(STARTS[after:])}"]
    np.testing.assert_array_equal(stored(tasks)["squares"], EXPECTED["squares"])


@settings(deadline=None, max_examples=15)
@given(st.sets(st.sampled_from(STARTS)), st.sets(st.sampled_from(STARTS)))
def test_a_tile_is_asked_for_when_either_object_lacks_it(tmp_path_factory, first, second):
    root = tmp_path_factory.mktemp("lost")
    tasks = stream_task(root, "one")
    run_task(tasks[0])
    for output, lost in zip(tasks[0].outputs, (first, second), strict=True):
        for start in lost:
            output.marker(start).unlink()
    for task in tasks:
        run_task(task)
    asked = [start for start in STARTS if start in first | second]
    assert notes(root / "log")[1:] == ([f"one {asked}"] if asked else [])
    for name, values in stored(tasks).items():
        np.testing.assert_array_equal(values, EXPECTED[name])


def test_a_stream_of_complete_objects_is_not_computed_again(tmp_path):
    tasks = stream_task(tmp_path, "one")
    for task in (*tasks, *tasks):
        run_task(task)
    assert len(notes(tmp_path / "log")) == 1


def test_a_second_object_that_is_missing_alone_is_made_without_touching_the_first(tmp_path):
    tasks = stream_task(tmp_path, "one")
    for task in tasks:
        run_task(task)
    lost = Path(tasks[2].output.path)
    shutil.rmtree(lost)
    Path(f"{lost}.json").unlink()
    before = folder_digest(tasks[0].output.path)
    for task in (tasks[0], tasks[2]):
        run_task(task)
    assert folder_digest(tasks[0].output.path) == before
    assert not (tmp_path / "staging" / "one").exists()
    np.testing.assert_array_equal(stored(tasks)["squares"], EXPECTED["squares"])


def test_an_object_that_another_run_publishes_meanwhile_is_left_to_it(tmp_path):
    tasks = stream_task(tmp_path, "one")
    final = Path(tasks[0].output.path)
    task = replace(tasks[0], function=f"{__name__}:publish_meanwhile", arguments={"final": str(final)})
    run_task(task)
    assert markers(task)[1] == list(STARTS)
    assert json.loads(Path(f"{final}.json").read_text()) == {}


def publish_meanwhile(starts, final):
    """After the first tile somebody else publishes the object, which takes the staging folder away."""
    for start in starts:
        if start == STARTS[1]:
            shutil.rmtree(Path(final).parent.parent / "staging" / "one")
            Path(final).mkdir(parents=True)
            Path(f"{final}.json").write_text("{}")
        yield start, rows_of(start)


def test_a_stream_that_ends_early_is_a_defect(tmp_path):
    task, *_ = stream_task(tmp_path, "one", "too_few_tiles")
    with pytest.raises(RuntimeError, match=r"^one ended without all of its tiles: \[8\]"):
        run_task(task)


def test_a_stream_is_superfluous_once_what_it_leads_to_is_there(tmp_path):
    final = whole_task(tmp_path, "final")
    run_task(final)
    task, *_ = stream_task(tmp_path, "one", until=final.output.path)
    run_task(task)
    assert notes(tmp_path / "log") == ["final"]


def test_a_reader_of_the_second_object_waits_for_its_publication(tmp_path):
    reader = whole_task(tmp_path, "reader", reads="one-squares")
    assert link([*stream_task(tmp_path, "one"), reader])[-1].requires == ("one/publish also",)


def test_cutting_leaves_one_tile_a_task_and_every_cell_once(tmp_path):
    tiles = [task for task in split_tiles(stream_task(tmp_path, "one")) if task.function]
    assert [task.output.tiles for task in tiles] == [(start,) for start in STARTS]
    assert [task.also[0].tiles for task in tiles] == [(start,) for start in STARTS]
    assert sum(task.n_cells for task in tiles) == N_ROWS


def test_cutting_lets_a_publication_wait_for_all_parts(tmp_path):
    publish = split_tiles(stream_task(tmp_path, "one"))[-1]
    assert publish.requires == ("one/0", "one/4", "one/8")


def test_cutting_leaves_other_tasks_alone(tmp_path):
    tasks = (whole_task(tmp_path, "whole"), *tile_tasks(tmp_path, "tiled"))
    assert split_tiles(tasks) == tasks


def test_cutting_leaves_streams_alone_that_use_no_device(tmp_path):
    tasks = tuple(replace(task, device=False) for task in stream_task(tmp_path, "one"))
    assert split_tiles(tasks) == tasks


@pytest.mark.parametrize("cut", [False, True])
def test_published_objects_leave_nothing_in_staging(tmp_path, cut):
    tasks = stream_task(tmp_path, "one")
    for task in split_tiles(tasks) if cut else tasks:
        run_task(task)
    assert all(is_complete(output.path) for output in tasks[0].outputs)
    assert not list((tmp_path / "staging").glob("*"))
