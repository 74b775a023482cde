"""Progress: silent when it is disabled, cells of every stage on standard error when it is not."""

from __future__ import annotations

import pytest
from support.tasks import plan_of, tile_tasks, whole_task

from lloki_atlas.engine.plan import link
from lloki_atlas.engine.progress import Progress


@pytest.fixture
def tasks(tmp_path):
    return [whole_task(tmp_path, "one"), *tile_tasks(tmp_path, "tiled")]


def show(tasks, *, enabled):
    with Progress(tasks, enabled=enabled) as bars:
        for task in tasks:
            bars.advance(task)


def test_nothing_is_printed_when_it_is_disabled(tasks, capfd):
    show(tasks, enabled=False)
    assert capfd.readouterr() == ("", "")


def test_a_quiet_run_prints_nothing(tasks, client, capfd):
    plan_of(*link(tasks))[0].run(client, progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_run_shows_every_stage_with_its_cells_on_standard_error(tasks, client, capfd):
    plan_of(*link(tasks))[0].run(client)
    out, err = capfd.readouterr()
    assert out == ""
    for text in ("first", "10/10", "second", "12/12", "cells/s"):
        assert text in err


def test_cells_of_unfinished_tasks_are_not_counted(tasks, capfd):
    with Progress(tasks, enabled=True) as bars:
        bars.advance(tasks[1])
    err = capfd.readouterr().err
    assert "0/10" in err
    assert "4/12" in err


def test_no_tasks_are_no_bars(capfd):
    show([], enabled=True)
    assert capfd.readouterr() == ("", "")


def test_an_error_in_the_middle_ends_the_display_and_goes_on(tasks):
    bars = Progress(tasks, enabled=True)
    with pytest.raises(ZeroDivisionError), bars:
        raise ZeroDivisionError
    assert bars._bars.finished is False
    assert not bars._bars.live.is_started


def test_the_clock_of_a_stage_starts_when_its_first_task_waits_for_nothing(tasks, tmp_path):
    late = whole_task(tmp_path, "late", stage="third", requires=("one",))
    with Progress([*tasks, late], enabled=True) as bars:
        third = bars._bars.tasks[bars._ids["third"]]
        before = third.started
        bars.advance(tasks[0])
        assert (before, third.started) == (False, True)
