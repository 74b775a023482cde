"""Many writers at one catalog: one winner a version, and no acknowledged commit is lost."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
from support.stores import commit_in_process, commit_slice, tiny_catalog

from lloki_atlas.errors import ConflictError, InputError
from lloki_atlas.store import log
from lloki_atlas.store.catalog import Catalog, commit, create_store, history, open_catalog, verify
from lloki_atlas.store.records import Change


def _together(calls):
    """Run the calls at the same moment; what each returned or raised."""
    start, results = threading.Barrier(len(calls)), [None] * len(calls)

    def run(position, call):
        start.wait()
        try:
            results[position] = call()
        except (ConflictError, InputError) as error:
            results[position] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_eight_threads_of_different_slices_all_get_in(tmp_path):
    catalog = tiny_catalog(tmp_path)
    results = _together([lambda number=number: commit_slice(catalog, f"s{number}") for number in range(8)])
    assert sorted(result.version for result in results) == list(range(2, 10))
    assert len(open_catalog(tmp_path).state.slices) == 8


def test_eight_threads_of_one_setting_have_one_winner(tmp_path):
    catalog = tiny_catalog(tmp_path)
    changes = [Change(config={"writer": number}) for number in range(8)]
    results = _together([lambda change=change: commit(catalog, change, message="") for change in changes])
    winners = [result for result in results if isinstance(result, Catalog)]
    assert len(winners) == 1
    assert sum(isinstance(result, ConflictError) for result in results) == 7
    assert open_catalog(tmp_path).state.config == winners[0].state.config


def test_eight_makers_of_one_catalog_have_one_winner(tmp_path):
    makers = [Change(config={"maker": number}) for number in range(8)]
    results = _together([lambda change=change: create_store(tmp_path / "a", change, message="") for change in makers])
    (winner,) = [result for result in results if isinstance(result, Catalog)]
    assert open_catalog(tmp_path / "a").state.config == winner.state.config


@pytest.mark.parametrize(("kind", "n_writers", "n_commits"), [("folder", 4, 10), ("bucket", 3, 4)])
def test_processes_that_commit_at_once_lose_nothing(request, tmp_path, kind, n_writers, n_commits):
    root = tmp_path if kind == "folder" else f"{request.getfixturevalue('bucket')}/atlas"
    tiny_catalog(root)
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(n_writers), context.Queue()
    workers = [
        context.Process(target=commit_in_process, args=(root, writer, start, results, n_commits))
        for writer in range(n_writers)
    ]
    for worker in workers:
        worker.start()
    versions = [version for _ in workers for version in results.get(timeout=200)]
    for worker in workers:
        worker.join()
    head = open_catalog(root)
    assert sorted(versions) == list(range(2, 2 + n_writers * n_commits))
    assert set(head.state.slices) == {f"w{writer}-{step}" for writer in range(n_writers) for step in range(n_commits)}
    assert len({record.owner for record in history(head)}) == 1 + n_writers * n_commits
    assert verify(head) == []


@pytest.mark.parametrize("answer", [True, False])
def test_the_owner_stored_decides_not_the_answer(tmp_path, monkeypatch, answer):
    catalog = tiny_catalog(tmp_path)
    rival = commit_slice(open_catalog(tmp_path, mode="r+"), "rival")
    stored = (tmp_path / "versions" / "00000002.json").read_bytes()
    (tmp_path / "versions" / "00000002.json").unlink()
    real, calls = log.create_exclusive, []

    def lossy(path, data):
        # the first call is lost to the rival and says whatever the network makes of it; the next ones are won
        calls.append(path.name)
        real(path, stored if len(calls) == 1 else data)
        return answer

    monkeypatch.setattr(log, "create_exclusive", lossy)
    committed = commit(catalog, Change(config={"mine": 1}), message="")
    assert calls == ["00000002.json", "00000003.json"]
    assert committed.version == 3
    assert committed.state.slices == rival.state.slices
