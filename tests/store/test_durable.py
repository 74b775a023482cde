"""Durable files: whole or absent, one winner, nothing left behind."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading

import pytest
from support.stores import create_in_process

from lloki_atlas.errors import InputError
from lloki_atlas.store.durable import create_exclusive, describe_os_error, write_durable


def _refuse(code: int = errno.EIO):
    def call(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    return call


def test_a_durable_file_has_its_bytes_in_a_new_folder(tmp_path):
    write_durable(tmp_path / "a" / "b" / "file", b"bytes")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"bytes"


def test_a_durable_write_replaces(tmp_path):
    write_durable(tmp_path / "file", b"old")
    write_durable(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_durable_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch, call):
    write_durable(tmp_path / "file", b"old")
    monkeypatch.setattr(os, call, _refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        write_durable(tmp_path / "file", b"new")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("file", b"old")]


def test_exclusive_creation_happens_once_and_keeps_the_first_bytes(tmp_path):
    assert create_exclusive(tmp_path / "v", b"first")
    assert not create_exclusive(tmp_path / "v", b"second")
    assert (tmp_path / "v").read_bytes() == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["v"]


def test_file_and_folder_are_synced_around_the_link(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, _name=name, _real=real: (calls.append(_name), _real(*a))[1])
    create_exclusive(tmp_path / "v", b"x")
    assert calls == ["fsync", "link", "fsync"]


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_a_failed_creation_leaves_nothing(tmp_path, monkeypatch, call):
    monkeypatch.setattr(os, call, _refuse())
    with pytest.raises(OSError, match="Input/output"):
        create_exclusive(tmp_path / "v", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_hard_links_is_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", _refuse(errno.ENOTSUP))
    with pytest.raises(InputError, match="hard links"):
        create_exclusive(tmp_path / "v", b"x")


def test_eight_threads_at_one_name_have_one_winner(tmp_path):
    for number in range(10):
        start, wins = threading.Barrier(8), []

        def race(token, path=tmp_path / f"{number}", start=start, wins=wins):
            start.wait()
            wins.append((create_exclusive(path, b"%d" % token), token))

        threads = [threading.Thread(target=race, args=(token,)) for token in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [token for won, token in wins if won]
        assert len(winners) == 1
        assert (tmp_path / f"{number}").read_bytes() == b"%d" % winners[0]


def test_four_processes_at_one_name_have_one_winner(tmp_path):
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(4), context.Queue()
    workers = [context.Process(target=create_in_process, args=(tmp_path, n, start, results)) for n in range(4)]
    for worker in workers:
        worker.start()
    answers = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert [sum(won) for won in zip(*answers, strict=True)] == [1] * 20


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_described_by_its_number(code):
    assert "disk is full" in describe_os_error(OSError(code, os.strerror(code), "/some/file"))


def test_a_full_disk_is_described_through_its_cause():
    outer = RuntimeError("could not store")
    outer.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert "disk is full" in describe_os_error(outer)


@pytest.mark.parametrize("text", ["Generic error: os error 28", "(os error 122)"])
def test_a_full_disk_is_described_by_its_text(text):
    assert "disk is full" in describe_os_error(RuntimeError(text))


def test_os_error_280_is_no_full_disk():
    assert "disk is full" not in describe_os_error(RuntimeError("os error 280"))


def test_another_os_error_is_described_with_its_file():
    error = PermissionError(errno.EACCES, "Permission denied", "/some/file")
    assert describe_os_error(error) == "the file system refused at /some/file: Permission denied"
