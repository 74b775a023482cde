"""Threads that each run torch on one thread."""

from __future__ import annotations

import threading

import pytest
import torch

from lloki_atlas.models.threads import torch_threads
from lloki_atlas.models.workers import Workers, in_turn, parts


@pytest.mark.parametrize("n", [1, 7, 499, 500, 501, 1499, 4000])
def test_parts_cover_all_rows_once_and_are_about_equal(n: int):
    found = parts(n, 500)
    assert [row for part in found for row in range(n)[part]] == list(range(n))
    sizes = [part.stop - part.start for part in found]
    assert max(sizes) <= 500
    assert max(sizes) - min(sizes) <= 1


def test_no_rows_have_no_parts():
    assert parts(0) == []


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_results_come_in_the_order_of_the_items(n_threads: int):
    with Workers(n_threads) as workers:
        assert workers.each(lambda item: item**2, range(50)) == [item**2 for item in range(50)]


@pytest.mark.parametrize("n_threads", [1, 2])
def test_torch_has_one_thread_in_the_work_and_as_many_as_before_outside(n_threads: int):
    with torch_threads(2):
        with Workers(n_threads) as workers:
            assert set(workers.each(lambda _: torch.get_num_threads(), range(8))) == {1}
        assert torch.get_num_threads() == 2


def test_several_threads_work():
    both = threading.Barrier(2, timeout=60)
    with Workers(2) as workers:
        workers.each(lambda _: both.wait(), range(2))


@pytest.mark.parametrize("n_threads", [1, 2])
def test_an_error_of_the_work_reaches_the_caller(n_threads: int):
    def fail(item: int) -> None:
        raise ValueError(f"item {item}")

    with Workers(n_threads) as workers, pytest.raises(ValueError, match="item 0"):
        workers.each(fail, range(3))


def test_closing_ends_the_threads():
    before = threading.active_count()
    workers = Workers(3)
    workers.each(lambda _: None, range(10))
    workers.close()
    assert threading.active_count() == before


def test_without_workers_the_calling_thread_works():
    caller = threading.get_ident()
    assert in_turn(lambda _: threading.get_ident(), range(2)) == [caller, caller]
