"""Plans and tasks: what a task leaves on disk, when it is skipped, how tasks are linked and refused."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.folders import folder_digest
from support.tasks import N_ROWS, TILE_ROWS, notes, plan_of, tile_tasks, whole_task

from lloki_atlas.engine import outputs as outputs_module
from lloki_atlas.engine.outputs import Output
from lloki_atlas.engine.plan import Outcome, Plan, Task, link, run_task
from lloki_atlas.errors import FormatError, InputError, MemoryBudgetError, NotFoundError
from lloki_atlas.store.arrays import ArraySpec, read_arrays, read_attributes
from lloki_atlas.store.objects import check_object, is_complete, read_receipt
from lloki_atlas.store.publishing import publish

ROWS = np.arange(N_ROWS, dtype=np.float32)
EXPECTED = np.stack([ROWS, np.sqrt(ROWS)], axis=1)


def at(root, name):
    return root / "objects" / f"{name}.zarr"


def test_a_whole_object_is_published_with_its_receipt(tmp_path):
    assert run_task(whole_task(tmp_path, "one")) == "one"
    assert read_receipt(at(tmp_path, "one")).lineage == {"made": "one"}
    assert check_object(at(tmp_path, "one")) == []


def test_a_whole_object_has_the_arrays_and_attributes_of_its_task(tmp_path):
    run_task(whole_task(tmp_path, "one"))
    np.testing.assert_array_equal(read_arrays(at(tmp_path, "one"))["values"], EXPECTED)
    assert read_attributes(at(tmp_path, "one")) == {"unit": "none"}


def test_a_whole_object_has_named_axes(tmp_path):
    run_task(whole_task(tmp_path, "one"))
    array = json.loads((at(tmp_path, "one") / "values" / "zarr.json").read_text())
    assert array["dimension_names"] == ["cell", "coordinate"]


def test_a_task_may_fill_its_folder_by_itself(tmp_path):
    run_task(whole_task(tmp_path, "one", "folder"))
    assert (at(tmp_path, "one") / "text.txt").read_text() == "filled by the task itself"
    assert check_object(at(tmp_path, "one")) == []


@pytest.mark.parametrize("function", ["numbers", "folder"])
def test_a_finished_object_leaves_nothing_in_staging(tmp_path, function):
    run_task(whole_task(tmp_path, "one", function))
    assert not list((tmp_path / "staging").glob("*"))


@pytest.mark.parametrize("function", ["numbers", "folder"])
def test_remains_of_a_killed_task_do_not_end_up_in_the_object(tmp_path, function):
    task = whole_task(tmp_path, "one", function)
    (tmp_path / "staging" / "one").mkdir(parents=True)
    (tmp_path / "staging" / "one" / "half.txt").write_text("written before the kill")
    run_task(task)
    assert not (at(tmp_path, "one") / "half.txt").exists()


@pytest.mark.parametrize("function", ["numbers", "folder"])
def test_a_complete_object_is_not_made_again(tmp_path, function):
    task = whole_task(tmp_path, "one", function)
    assert [run_task(task), run_task(task)] == ["one", "one"]
    assert notes(tmp_path / "log") == ["one"]


def test_an_object_without_its_receipt_is_made_complete(tmp_path):
    task = whole_task(tmp_path, "one")
    run_task(task)
    before = folder_digest(tmp_path / "objects")
    (tmp_path / "objects" / "one.zarr.json").unlink()
    run_task(task)
    assert folder_digest(tmp_path / "objects") == before


@pytest.mark.parametrize("function", ["numbers", "folder"])
def test_a_task_that_runs_twice_writes_the_same_bytes(tmp_path, function):
    for root in (tmp_path / "a", tmp_path / "b"):
        run_task(replace(whole_task(root, "one", function), arguments={"log": str(tmp_path / "log"), "name": "one"}))
    assert folder_digest(tmp_path / "a" / "objects") == folder_digest(tmp_path / "b" / "objects")


def test_a_tile_writes_its_rows_and_says_so(tmp_path):
    first, *_ = tile_tasks(tmp_path, "tiled")
    run_task(first)
    values = read_arrays(first.output.staging)["values"]
    np.testing.assert_array_equal(values[:TILE_ROWS], EXPECTED[:TILE_ROWS])
    assert np.isnan(values[TILE_ROWS:]).all()
    assert first.output.marker(0).exists()


def test_tiles_are_no_object_before_they_are_published(tmp_path):
    *tiles, publish = tile_tasks(tmp_path, "tiled")
    for tile in tiles:
        run_task(tile)
    assert not is_complete(publish.output.path)


def test_published_tiles_are_the_whole_object(tmp_path):
    *tiles, publish = tile_tasks(tmp_path, "tiled")
    for task in (*tiles, publish):
        run_task(task)
    np.testing.assert_array_equal(read_arrays(at(tmp_path, "tiled"))["values"], EXPECTED)
    assert read_attributes(at(tmp_path, "tiled")) == {"tiled": 1}
    assert check_object(at(tmp_path, "tiled")) == []


def test_publishing_leaves_no_tile_markers_behind(tmp_path):
    for task in tile_tasks(tmp_path, "tiled"):
        run_task(task)
    assert not list((tmp_path / "staging").glob("*"))


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_crash_beside_a_publication_does_not_hinder_the_next_attempt(tmp_path, monkeypatch, moment):
    *tiles, last = tile_tasks(tmp_path, "tiled")
    for tile in tiles:
        run_task(tile)

    def crash(*args, **options):
        if moment == "after":
            publish(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(outputs_module, "publish", crash)
        with pytest.raises(KeyboardInterrupt):
            run_task(last)
    # what was published is lost before anyone looks again
    shutil.rmtree(tmp_path / "objects", ignore_errors=True)
    for task in (*tiles, last):
        run_task(task)
    np.testing.assert_array_equal(read_arrays(at(tmp_path, "tiled"))["values"], EXPECTED)


def test_publishing_without_any_tile_is_refused(tmp_path):
    with pytest.raises(NotFoundError, match="nothing to publish"):
        run_task(tile_tasks(tmp_path, "tiled")[-1])


def test_a_tile_that_is_on_disk_is_not_computed_again(tmp_path):
    first, *_ = tile_tasks(tmp_path, "tiled")
    run_task(first)
    run_task(first)
    assert notes(tmp_path / "log") == ["tiled/0"]


def test_a_tile_of_a_complete_object_is_not_computed_again(tmp_path):
    tasks = tile_tasks(tmp_path, "tiled")
    for task in (*tasks, *tasks):
        run_task(task)
    assert notes(tmp_path / "log") == ["tiled/0", "tiled/4", "tiled/8"]


def test_a_tile_whose_marker_was_never_written_is_computed_again_with_the_same_bytes(tmp_path):
    first, *_ = tile_tasks(tmp_path, "tiled")
    run_task(first)
    before = folder_digest(tmp_path / "staging")
    first.output.marker(0).unlink()
    run_task(first)
    assert folder_digest(tmp_path / "staging") == before
    assert len(notes(tmp_path / "log")) == 2


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_of_tiles_does_not_change_a_byte(tmp_path, order):
    digests = []
    for name, chosen in (("straight", range(3)), ("other", order)):
        *tiles, publish = tile_tasks(tmp_path / name, "tiled")
        for task in (*(tiles[i] for i in chosen), publish):
            run_task(task)
        digests.append(folder_digest(tmp_path / name / "objects"))
    assert digests[0] == digests[1]


def test_a_task_that_fails_leaves_no_object(tmp_path):
    task = whole_task(tmp_path, "one", "refuse")
    with pytest.raises(InputError, match="refuses"):
        run_task(task)
    assert not is_complete(task.output.path)


def test_names_of_finished_tasks_that_are_handed_in_do_not_matter(tmp_path):
    assert run_task(whole_task(tmp_path, "one"), "earlier", "another") == "one"


def test_a_task_can_be_sent_to_another_process(tmp_path):
    task = tile_tasks(tmp_path, "tiled")[0]
    assert pickle.loads(pickle.dumps(task)) == task


def names_required(tasks):
    return {task.name: task.requires for task in link(tasks)}


@pytest.mark.parametrize(
    "arguments",
    [
        lambda path: {"path": path},
        lambda path: {"samples": [{"slice": "a", "path": path}]},
        lambda path: {"paths": (1, None, [path])},
    ],
    ids=["plain", "in tables of a list", "in nested lists"],
)
def test_a_task_requires_the_one_that_publishes_what_it_reads(tmp_path, arguments):
    maker, reader = whole_task(tmp_path, "maker"), whole_task(tmp_path, "reader")
    reader = replace(reader, arguments=arguments(maker.output.path))
    assert names_required([maker, reader]) == {"maker": (), "reader": ("maker",)}


def test_what_no_task_of_the_plan_makes_is_not_waited_for(tmp_path):
    assert names_required([whole_task(tmp_path, "reader", reads="made long ago")]) == {"reader": ()}


def test_a_reader_of_tiles_waits_for_their_publication_alone(tmp_path):
    tasks = [*tile_tasks(tmp_path, "tiled"), whole_task(tmp_path, "reader", reads="tiled")]
    assert names_required(tasks)["reader"] == ("tiled/publish",)


def test_a_publication_still_requires_all_its_tiles_after_linking(tmp_path):
    assert names_required(tile_tasks(tmp_path, "tiled"))["tiled/publish"] == ("tiled/0", "tiled/4", "tiled/8")


def test_a_task_that_reads_one_object_twice_requires_it_once(tmp_path):
    maker = whole_task(tmp_path, "maker")
    reader = replace(whole_task(tmp_path, "reader"), arguments={"a": maker.output.path, "b": [maker.output.path]})
    assert names_required([maker, reader])["reader"] == ("maker",)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 7), max_size=8))
def test_linking_is_done_after_the_first_time(reads):
    def task(number, *read):
        output = Output(path=f"/objects/{number}", staging=f"/staging/{number}", lineage={})
        return Task(f"task {number}", "stage", "m:f", {"paths": [f"/objects/{r}" for r in read]}, output)

    tasks = [task(number, *(r for r in reads if r < number)) for number in range(8)]
    once = link(tasks)
    assert link(once) == once
    assert [part.name for part in once] == [part.name for part in tasks]


def test_a_task_that_does_not_fit_is_refused_with_its_name_and_both_sizes(tmp_path):
    small = whole_task(tmp_path, "small", projected_memory=2**20)
    large = whole_task(tmp_path, "embed/s1/0", projected_memory=3 * 2**30)
    plan, _ = plan_of(small, large)
    with pytest.raises(MemoryBudgetError, match=r"^embed/s1/0 .*3,072 MiB, a worker has 2,048 MiB a task: .*smaller"):
        plan.validate(2 * 2**30)


@pytest.mark.parametrize("memory", [None, 2**20, 2**21])
def test_a_plan_that_fits_exactly_or_has_no_limit_is_not_refused(tmp_path, memory):
    plan, _ = plan_of(whole_task(tmp_path, "one", projected_memory=2**20))
    assert plan.validate(memory) is None


def test_a_plan_needs_what_its_largest_task_needs(tmp_path):
    sizes = (5, 900, 30)
    plan, _ = plan_of(*(whole_task(tmp_path, str(size), projected_memory=size) for size in sizes))
    assert plan.projected_memory == 900


def test_a_summary_counts_tasks_and_cells_of_every_stage(tmp_path):
    plan, _ = plan_of(whole_task(tmp_path, "one", projected_memory=7), *tile_tasks(tmp_path, "tiled"))
    assert plan.summary() == {
        "tasks": 5,
        "projected_memory": 7,
        "writes": 80,
        "stages": {
            "first": {"tasks": 1, "cells": 10, "projected_memory": 7, "writes": 0},
            "second": {"tasks": 4, "cells": 12, "projected_memory": 0, "writes": 80},
        },
    }


def test_an_empty_plan_needs_no_memory_and_has_no_stages():
    plan, _ = plan_of()
    assert plan.summary() == {"tasks": 0, "projected_memory": 0, "writes": 0, "stages": {}}


def test_an_empty_plan_commits_without_a_cluster():
    outcomes = []
    result = Plan((), lambda outcome: outcomes.append(outcome) or "same version").run(progress=False, n_workers=0)
    assert (result, outcomes) == ("same version", [Outcome(frozenset(), {})])


@pytest.mark.parametrize("damage", ["rows gone", "rows cut short", "marker emptied", "marker garbled"])
def test_rows_that_are_not_what_their_marker_says_are_written_again(tmp_path, damage):
    spec = ArraySpec((4, 2), "float32", 2, ("row", "column"))
    output = Output(str(tmp_path / "done.zarr"), str(tmp_path / "staging"), {}, specs={"x": spec})
    tiles = [
        Task(f"tile {n}", "embed", "support.tasks:ones", {"shape": [2, 2]}, replace(output, tiles=(n,))) for n in (0, 2)
    ]
    for tile in tiles:
        run_task(tile)
    rows = Path(output.staging) / "x" / "c" / "1" / "0"
    if damage == "rows gone":
        rows.unlink()
    elif damage == "rows cut short":
        rows.write_bytes(rows.read_bytes()[:-1])
    else:
        output.marker(2).write_bytes(b"" if damage == "marker emptied" else b"\0" * 100)
    with pytest.raises(FormatError, match="run again"):
        run_task(Task("publish", "embed", "", {}, output))
    assert tiles[1].output.missing() == (2,)
    assert tiles[0].output.missing() == ()
    run_task(tiles[1])
    run_task(Task("publish", "embed", "", {}, output))
    assert (read_arrays(output.path)["x"] == 1).all()
    assert check_object(output.path) == []


def losing_task(root, *, final="", until="", error=""):
    """A task whose inputs are gone; `final` is what another run publishes before it notices."""
    arguments = {"log": str(root / "log"), "name": "one", "final": final, "error": error}
    return whole_task(root, "one", "lose_inputs", until=until, arguments=arguments)


def test_a_task_is_superfluous_once_what_it_leads_to_is_there(tmp_path):
    final = whole_task(tmp_path, "final")
    run_task(final)
    step = whole_task(tmp_path, "one", until=final.output.path)
    assert run_task(step) == "one"
    assert notes(tmp_path / "log") == ["final"]
    assert not Path(step.output.path).exists()


def test_a_task_runs_while_what_it_leads_to_is_unfinished(tmp_path):
    final = whole_task(tmp_path, "final")
    run_task(final)
    Path(f"{final.output.path}.json").unlink()
    run_task(whole_task(tmp_path, "one", until=final.output.path))
    assert notes(tmp_path / "log") == ["final", "one"]


def test_tiles_and_their_publication_are_superfluous_too(tmp_path):
    final = whole_task(tmp_path, "final")
    run_task(final)
    for task in tile_tasks(tmp_path, "tiles"):
        assert run_task(replace(task, until=final.output.path)) == task.name
    assert notes(tmp_path / "log") == ["final"]
    assert not (tmp_path / "staging" / "tiles").exists()


def test_a_task_whose_inputs_went_after_completion_is_forgiven(tmp_path):
    final = str(tmp_path / "objects" / "final.zarr")
    assert run_task(losing_task(tmp_path, final=final, until=final)) == "one"
    assert notes(tmp_path / "log") == ["one"]
    assert not Path(tmp_path / "objects" / "one.zarr").exists()


def test_a_task_that_fails_before_completion_is_not_forgiven(tmp_path):
    with pytest.raises(NotFoundError, match="the inputs are gone"):
        run_task(losing_task(tmp_path, until=str(tmp_path / "objects" / "final.zarr")))


def test_a_task_that_leads_to_nothing_else_is_not_forgiven(tmp_path):
    with pytest.raises(NotFoundError, match="the inputs are gone"):
        run_task(losing_task(tmp_path, final=str(tmp_path / "objects" / "final.zarr")))


def test_a_task_whose_own_output_was_published_by_another_run_is_forgiven(tmp_path):
    own = str(tmp_path / "objects" / "one.zarr")
    assert run_task(losing_task(tmp_path, final=own)) == "one"


def test_a_defect_is_not_forgiven(tmp_path):
    final = str(tmp_path / "objects" / "final.zarr")
    with pytest.raises(ZeroDivisionError, match="a defect"):
        run_task(losing_task(tmp_path, final=final, until=final, error="a defect"))


def test_linking_goes_through_lists_of_what_a_task_reads(tmp_path):
    parts = [whole_task(tmp_path, name) for name in ("one", "two", "three")]
    paths = [part.output.path for part in parts]
    reader = whole_task(tmp_path, "four")
    reader = replace(reader, arguments={**reader.arguments, "parts": paths[:2], "more": {"deep": (paths[2],)}})
    assert link([*parts, reader])[-1].requires == ("one", "two", "three")
