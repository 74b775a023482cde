from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lloki_atlas.kernels.threads import over_rows


@settings(deadline=None, max_examples=60)
@given(n=st.integers(0, 300), n_threads=st.integers(1, 9), chunk=st.integers(1, 70))
def test_ranges_cover_every_row_once_and_in_order(n, n_threads, chunk):
    ranges = over_rows(n, n_threads, lambda start, stop: (start, stop), chunk=chunk)
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(n))
    assert len(ranges) <= n_threads


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 300), n_threads=st.integers(1, 9), chunk=st.integers(1, 70))
def test_ranges_begin_at_multiples_of_a_chunk(n, n_threads, chunk):
    assert all(start % chunk == 0 for start, _ in over_rows(n, n_threads, lambda *rows: rows, chunk=chunk))


def test_no_rows_are_no_work():
    assert over_rows(0, 3, lambda start, stop: pytest.fail("there was nothing to do")) == []


def test_ranges_are_worked_on_at_the_same_time():
    meeting = threading.Barrier(3, timeout=20)
    assert sorted(over_rows(30, 3, lambda start, stop: meeting.wait())) == [0, 1, 2]


def test_one_thread_is_the_callers_own():
    assert over_rows(30, 1, lambda start, stop: threading.get_ident()) == [threading.get_ident()]


@pytest.mark.parametrize("n_threads", [1, 3])
def test_an_error_of_a_thread_is_raised(n_threads):
    def fail_at_the_end(start, stop):
        if stop == 30:
            raise ZeroDivisionError("a defect")

    with pytest.raises(ZeroDivisionError):
        over_rows(30, n_threads, fail_at_the_end)
