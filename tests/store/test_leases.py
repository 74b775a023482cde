"""Leases: a writer and a collector of garbage never work at the same time, and the dead stand in nobody's way."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest
from support.stores import commit_slice, tiny_catalog

from lloki_atlas.errors import ConflictError
from lloki_atlas.store import leases
from lloki_atlas.store.catalog import open_catalog
from lloki_atlas.store.leases import WRITERS, at_work, collecting, writing


@pytest.fixture
def folder(tmp_path):
    return tmp_path / WRITERS


def _names(folder):
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def _leave(folder, *, collector=False, age=0.0, **said):
    """A lease that somebody left, of another machine unless said otherwise."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{'collecting-' if collector else ''}{'a' * 32}.json"
    content = {"what": "a run", "host": "elsewhere", "machine": "other", "pid": 7, "started": "2026-01-01T00:00:00"}
    file.write_text(json.dumps({**content, **said}))
    os.utime(file, (time.time() - age,) * 2)
    return file


def test_a_writer_says_who_it_is_and_leaves_nothing(tmp_path, folder):
    with writing(tmp_path, "a test"):
        (lease,) = at_work(tmp_path)
        assert (lease["what"], lease["pid"], lease["collecting"]) == ("a test", os.getpid(), False)
        assert lease["started"].endswith("+00:00")
    assert _names(folder) == []


def test_blocks_inside_others_share_one_lease(tmp_path, folder):
    with writing(tmp_path, "outer"):
        before = _names(folder)
        with writing(tmp_path, "inner"):
            assert _names(folder) == before
        assert _names(folder) == before
    assert _names(folder) == []


def test_threads_that_end_in_any_order_keep_a_lease_until_the_last_ends(tmp_path, folder):
    entered, leave = threading.Event(), threading.Event()

    def work():
        with writing(tmp_path, "second"):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    with writing(tmp_path, "first"):
        thread.start()
        assert entered.wait(10)
    assert len(at_work(tmp_path)) == 1
    leave.set()
    thread.join()
    assert _names(folder) == []


def test_an_error_ends_the_lease(tmp_path, folder):
    with pytest.raises(ValueError, match="mine"), writing(tmp_path, "a test"):
        raise ValueError("mine")
    assert _names(folder) == []


def test_a_collector_refuses_while_somebody_writes_and_says_who(tmp_path, folder):
    with writing(tmp_path, "the run of a test"):
        with pytest.raises(ConflictError, match=f"process {os.getpid()} .*the run of a test.*since") as caught:
            collecting(tmp_path).__enter__()
        assert "remove" in str(caught.value)
        assert len(_names(folder)) == 1
    with collecting(tmp_path):
        pass


def test_a_writer_refuses_while_garbage_is_collected(tmp_path, folder):
    with collecting(tmp_path):
        with (
            pytest.raises(ConflictError, match="being collected"),
            writing(tmp_path, "a test", wait_seconds=0),
        ):
            pytest.fail("it wrote")
        assert len(_names(folder)) == 1


def test_a_writer_waits_for_a_collector_that_ends(tmp_path):
    events = []
    collector = collecting(tmp_path)
    check = collector.__enter__()

    def end():
        time.sleep(0.5)
        check()  # who waits does not count as a writer
        events.append("collected")
        collector.__exit__(None, None, None)

    thread = threading.Thread(target=end)
    thread.start()
    with writing(tmp_path, "a test", wait_seconds=20):
        events.append("writes")
    thread.join()
    assert events == ["collected", "writes"]


def test_of_two_collectors_one_refuses(tmp_path):
    with collecting(tmp_path), pytest.raises(ConflictError, match="collecting garbage"), collecting(tmp_path):
        pytest.fail("two at once")


def test_a_collector_that_was_taken_for_dead_stops(tmp_path, folder):
    with collecting(tmp_path) as check:
        check()
        _leave(folder)
        with pytest.raises(ConflictError, match="elsewhere"):
            check()


def test_a_lease_of_another_machine_counts_until_it_is_stale(tmp_path, folder):
    _leave(folder, age=leases.STALE_SECONDS - 60)
    with pytest.raises(ConflictError, match="elsewhere"):
        collecting(tmp_path).__enter__()
    file = _leave(folder, age=leases.STALE_SECONDS + 60)
    with collecting(tmp_path):
        assert not file.exists()


def test_a_stale_collector_stops_no_writer(tmp_path, folder):
    file = _leave(folder, collector=True, age=leases.STALE_SECONDS + 60)
    with writing(tmp_path, "a test", wait_seconds=0):
        assert not file.exists()


def test_a_process_of_this_machine_that_is_gone_counts_no_more(tmp_path, folder):
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    process.join()
    _leave(folder, machine=leases._machine(), pid=process.pid)
    with collecting(tmp_path):
        assert len(_names(folder)) == 1


def test_a_lease_that_a_power_failure_emptied_is_nobodys(tmp_path, folder):
    file = _leave(folder, collector=True)
    file.write_text("")
    with writing(tmp_path, "a test", wait_seconds=0):
        assert not file.exists()


@pytest.mark.parametrize("content", ["[]", "{}", '{"pid": "many", "machine": 3}', '{"pid": -1}'])
def test_a_lease_that_says_nothing_counts_until_it_is_stale(tmp_path, folder, content):
    file = _leave(folder)
    file.write_text(content)
    with pytest.raises(ConflictError, match="is in use"):
        collecting(tmp_path).__enter__()
    os.utime(file, (0, 0))
    with collecting(tmp_path):
        assert not file.exists()


def test_other_files_in_the_folder_are_left_alone(tmp_path, folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("x")
    with collecting(tmp_path), pytest.raises(ConflictError), writing(tmp_path, "a test", wait_seconds=0):
        pass
    assert _names(folder) == ["notes.txt"]


def test_a_lease_is_refreshed_and_comes_back_when_it_was_removed(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.05)
    with writing(tmp_path, "a test"):
        (file,) = folder.iterdir()
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 20
        while file.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert file.stat().st_mtime > 0
        file.unlink()
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert at_work(tmp_path)[0]["what"] == "a test"
    assert _names(folder) == []


def test_a_commit_waits_for_no_other_writer_and_refuses_during_a_collection(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "WAIT_SECONDS", 0)
    catalog = tiny_catalog(tmp_path)
    _leave(tmp_path / WRITERS)
    catalog = commit_slice(catalog, "s1")
    (tmp_path / WRITERS / f"{'a' * 32}.json").unlink()
    with collecting(tmp_path), pytest.raises(ConflictError, match="being collected"):
        commit_slice(catalog, "s2")
    assert open_catalog(tmp_path).version == 2


def _write_for_ever(root, entered):
    with writing(root, "killed"):
        entered.set()
        time.sleep(600)


def test_a_killed_writer_stands_in_nobodys_way(tmp_path, folder):
    context = multiprocessing.get_context("spawn")
    entered = context.Event()
    process = context.Process(target=_write_for_ever, args=(tmp_path, entered))
    process.start()
    assert entered.wait(60)
    with pytest.raises(ConflictError, match="killed"):
        collecting(tmp_path).__enter__()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(_names(folder)) == 1
    with collecting(tmp_path):
        assert len(at_work(tmp_path)) == 1
    assert _names(folder) == []


def test_a_fork_announces_itself(tmp_path, folder):
    with writing(tmp_path, "parent"):
        process = multiprocessing.get_context("fork").Process(target=_enter_once, args=(tmp_path,))
        process.start()
        process.join()
        assert process.exitcode == 0
        assert len(_names(folder)) == 1


def _enter_once(root):
    with writing(root, "child"):
        assert sorted(lease["what"] for lease in at_work(root)) == ["child", "parent"]
