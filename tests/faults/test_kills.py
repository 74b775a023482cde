"""A writer that is killed at its write points: nothing acknowledged is lost, the next run ends with the same bytes.

The full run is `python -m tests.benchmarks.kills --kills 500`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.kill_steps import STEPS
from support.kills import Kill, in_child, of_endings, spread
from support.write_points import BEFORE, EMPTIED, FORGOTTEN, KILLS, POWER, TORN, Point, WritePoints, describe

REPOSITORY = Path(__file__).resolve().parents[2]
# what a kill may lead to, and must not
WRONG = ("survived", "lost", "unreadable", "differing", "strange", "failed")


def benchmark(*arguments):
    command = [sys.executable, "-m", "tests.benchmarks.kills", "--json", *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_nothing_is_wrong(report, n_kills):
    assert report["problems"] == []
    assert report["total"] == {"kills": n_kills, **dict.fromkeys(WRONG, 0)}


def test_kills_lose_nothing_and_change_no_byte():
    report = benchmark("--kills", 6, "--seed", 1)
    assert_nothing_is_wrong(report, 6)
    assert len(report["points"]) == 6  # each another
    assert all(report["steps"][step] > 10 for step in STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--power",)], ids=["killed", "power failed"])
def test_many_kills_lose_nothing_and_change_no_byte(options):
    assert_nothing_is_wrong(benchmark("--kills", 100, "--seed", 2, *options), 100)


def die_at(root, work, *stop):
    """Work in a child that watches; what it said, and how it ended."""

    def watched(say):
        watch = WritePoints(root, stop=Point(*stop) if stop else None)
        watch.install()
        work(say)
        say(watch.seen)

    return in_child(watched)


def three_files(root, *, sync=True):
    """Writes `a` as a whole, `b` in place, and a folder with `c`, and says so after each."""

    def work(say):
        with open(root / "a.tmp", "wb") as handle:
            handle.write(b"0123456789")
            handle.flush()
            if sync:
                os.fsync(handle.fileno())
        (root / "a.tmp").replace(root / "a")
        if sync:
            descriptor = os.open(root, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        say("a")
        (root / "b").write_bytes(b"0123456789")
        say("b")
        (root / "folder").mkdir()
        (root / "folder" / "c").write_bytes(b"c")
        (root / "b").unlink()
        say("c")

    return work


def content(root):
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.mark.parametrize("sync", [True, False])
def test_every_call_that_changes_something_is_listed_in_order(tmp_path, sync):
    said, status = die_at(tmp_path, three_files(tmp_path, sync=sync))
    assert status == 0
    names = [point.name for point in said[-1] if point.ending == BEFORE]
    expected = ["open a.tmp", "fsync a.tmp", "rename a", "fsync the root", "open b", "mkdir folder", "open folder/c"]
    assert names == [name for name in [*expected, "unlink b"] if sync or not name.startswith("fsync")]


def test_reading_and_other_folders_are_no_points(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a").write_bytes(b"a")

    def work(say):
        (tmp_path / "root" / "a").read_bytes()
        (tmp_path / "elsewhere").write_bytes(b"b")
        (tmp_path / "root" / "none").unlink(missing_ok=True)
        os.makedirs(tmp_path / "root", exist_ok=True)  # noqa: PTH103

    assert die_at(tmp_path / "root", work) == ([[]], 0)


@pytest.mark.parametrize(
    ("stop", "said", "left"),
    [
        (("open a.tmp", 0, BEFORE), [], {}),
        (("rename a", 0, BEFORE), [], {"a.tmp": b"0123456789"}),
        (("fsync a.tmp", 0, TORN), [], {"a.tmp": b"01234"}),
        (("open b", 0, BEFORE), ["a"], {"a": b"0123456789"}),
        (("mkdir folder", 0, TORN), ["a", "b"], {"a": b"0123456789", "b": b"01234"}),
        (("mkdir folder", 0, EMPTIED), ["a", "b"], {"a": b"0123456789", "b": b""}),
        (("mkdir folder", 0, FORGOTTEN), ["a", "b"], {"a": b"0123456789"}),
        (("unlink b", 0, FORGOTTEN), ["a", "b"], {"a": b"0123456789"}),
    ],
)
def test_a_process_dies_at_its_point_and_leaves_what_it_would(tmp_path, stop, said, left):
    assert die_at(tmp_path, three_files(tmp_path), *stop) == (said, -signal.SIGKILL)
    assert content(tmp_path) == left


def test_a_power_failure_takes_what_was_not_synced(tmp_path):
    said, status = die_at(tmp_path, three_files(tmp_path, sync=False), "open b", 0, FORGOTTEN)
    assert (said, status, content(tmp_path)) == (["a"], -signal.SIGKILL, {})


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("catalog.json", "catalog.json"),
        (f".catalog.json.{'0' * 32}.tmp", "catalog.json (temporary)"),
        ("versions/00000012.json", "versions/<version>.json"),
        (f"versions/.00000012.json.{'a' * 32}.tmp", "versions/<version>.json (temporary)"),
        (f"slices/{'a' * 32}.zarr.json", "slices/<key>.zarr.json"),
        (f"staging/{'a' * 32}-0123abcd/tables/table/X/data/c/0", "staging/<key>-<try>/chunk"),
        (f"staging/{'a' * 32}/X_fp/c/0/.{'b' * 32}.partial", "staging/<key>/chunk (temporary)"),
        (f"staging/{'a' * 32}/X_fp/zarr.{'b' * 32}.partial", "staging/<key>/zarr.json (temporary)"),
        (f"staging/{'a' * 32}.tiles/4096.json", "staging/<key>.tiles/<row>.json"),
        (f"staging/{'a' * 32}.search1-0-by-40.new-0123abcd/zarr.json", "staging/<key>.search1.new-<try>/zarr.json"),
    ],
)
def test_points_are_named_without_keys_and_numbers(path, name):
    assert describe(path) == name


def points(**counts):
    return {
        step: [Point(name, number, ending) for name in names for number in range(9) for ending in (*KILLS, *POWER)]
        for step, names in counts.items()
    }


def test_kills_are_spread_over_names_and_over_repetitions():
    listed = {step: of_endings(part) for step, part in points(one=["open x", "link y"], two=["open x"]).items()}
    chosen = spread(listed, 12, seed=0)
    assert len(set(chosen)) == 12
    by_name = {}
    for kill in chosen:
        by_name.setdefault((kill.point.name, kill.point.ending), []).append(kill)
    assert {name: len(kills) for name, kills in by_name.items()} == {
        (name, ending): 3 for name in ("open x", "link y") for ending in KILLS
    }
    # 18 repetitions over both steps: one in each third
    assert {kill.step for kill in by_name["open x", BEFORE]} == {"one", "two"}


def test_equal_seeds_choose_equal_kills_and_all_are_chosen_where_there_are_few():
    listed = {"one": of_endings(points(one=["open x"])["one"])}
    assert spread(listed, 5, seed=3) == spread(listed, 5, seed=3) != spread(listed, 5, seed=4)
    assert set(spread(listed, 99, seed=0)) == {Kill("one", point) for point in listed["one"]}


SABOTAGE = """
import os, sys, tempfile
os.environ.setdefault("OMP_NUM_THREADS", "1")
from pathlib import Path
from tests.support.kills import Kill, Rig
from tests.support.write_points import BEFORE, TORN, Point
from lloki_atlas.store import {module}

def in_place(path, data):
    path.parent.mkdir(exist_ok=True)
    with open(path, "xb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    return True

with tempfile.TemporaryDirectory() as folder:
    rig = Rig(Path(folder), ["create"])
    {module}.create_exclusive = in_place
    for name, ending in {kills}:
        result = rig.kill(Kill("create", Point(name, 0, ending)))
        print(result.killed, bool(result.findings.unreadable), bool(result.error), result.is_well)
"""


def test_a_record_that_is_written_in_place_is_found_out():
    kills = [("open versions/<version>.json", BEFORE), ("fsync versions/<version>.json", TORN)]
    code = SABOTAGE.format(module="log", kills=kills)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.stdout.splitlines() == ["True False False True", "True True True False"], done.stderr
