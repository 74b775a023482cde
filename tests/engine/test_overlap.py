"""Work ahead of its consumer: order, bounds, errors in their place, and nothing left behind."""

from __future__ import annotations

import threading
from contextlib import closing, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lloki_atlas.engine.overlap import ahead
from lloki_atlas.errors import InputError

PATIENCE = 20.0
DEPTHS, THREADS = st.integers(1, 5), st.integers(1, 4)


class Source:
    """Numbers from 0; says how many were drawn, and whether it was closed."""

    def __init__(self, n):
        self.drawn, self.closed, self._n = 0, False, n

    def __iter__(self):
        return self

    def __next__(self):
        if self.drawn == self._n:
            raise StopIteration
        self.drawn += 1
        return self.drawn - 1

    def close(self):
        self.closed = True


def note_all(chain, seen):
    for result in chain:
        seen.append(result)


def running():
    return [thread for thread in threading.enumerate() if thread.name.startswith("lloki-atlas-ahead")]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers()), DEPTHS, THREADS)
def test_results_come_in_the_order_of_the_items(items, depth, n_threads):
    assert list(ahead(items, lambda item: item + 1, depth=depth, n_threads=n_threads)) == [item + 1 for item in items]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 20), DEPTHS, THREADS)
def test_no_more_than_the_depth_is_begun_beyond_what_the_consumer_has(n, depth, n_threads):
    source = Source(n)
    for held, _ in enumerate(ahead(source, abs, depth=depth, n_threads=n_threads), start=1):
        assert source.drawn <= held + depth


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), DEPTHS, DEPTHS, THREADS, st.data())
def test_an_error_of_any_step_comes_after_the_results_before_it_and_leaves_nothing(n, depth, inner, n_threads, data):
    place, step = data.draw(st.integers(0, n - 1)), data.draw(st.sampled_from(["source", "first", "second"]))

    def items():
        for item in range(n):
            if step == "source" and item == place:
                raise ValueError(item)
            yield item

    def fail_at(name):
        def function(item):
            if step == name and item == place:
                raise ValueError(item)
            return item

        return function

    chain = ahead(ahead(items(), fail_at("first"), depth=inner, n_threads=n_threads), fail_at("second"), depth=depth)
    seen = []
    with pytest.raises(ValueError, match=f"^{place}$"):
        note_all(chain, seen)
    assert seen == list(range(place))
    assert not running()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(0, 12), DEPTHS, DEPTHS, THREADS)
def test_closing_at_any_moment_ends_all_steps_and_closes_the_source(n, taken, depth, inner, n_threads):
    source = Source(n)
    chain = ahead(ahead(source, abs, depth=inner, n_threads=n_threads), abs, depth=depth)
    with closing(chain):
        next(chain)
        for _ in range(min(taken, n) - 1):
            next(chain)
    assert source.closed
    assert source.drawn <= min(n, max(taken, 1) + depth + inner + 1)
    assert not running()


def test_the_next_result_is_made_while_the_consumer_has_one():
    made = [threading.Event() for _ in range(3)]

    def make(item):
        made[item].set()
        return item

    for item in ahead(range(3), make):
        assert made[min(item + 1, 2)].wait(PATIENCE)


def test_several_threads_work_at_the_same_time():
    meeting = threading.Barrier(3, timeout=PATIENCE)
    assert list(ahead(range(6), lambda item: (meeting.wait(), item)[1], depth=2, n_threads=3)) == list(range(6))


def test_one_thread_calls_one_at_a_time():
    inside = threading.Lock()

    def alone(item):
        assert inside.acquire(blocking=False)
        inside.release()
        return item

    assert list(ahead(range(50), alone, depth=8)) == list(range(50))


def test_steps_of_a_chain_work_at_the_same_time():
    # the first step is with item 1 while the second is with item 0: neither could go on alone
    met = threading.Barrier(2, timeout=PATIENCE)

    def first(item):
        if item == 1:
            met.wait()
        return item

    def second(item):
        if item == 0:
            met.wait()
        return item

    assert list(ahead(ahead(range(4), first), second)) == [0, 1, 2, 3]


def test_closing_waits_for_calls_that_have_begun_and_begins_no_other():
    begun, may_end, ended = threading.Event(), threading.Event(), []

    def slow(item):
        if item:
            begun.set()
            assert may_end.wait(PATIENCE)
            ended.append(item)
        return item

    chain = ahead(range(9), slow, depth=4)
    assert next(chain) == 0
    assert begun.wait(PATIENCE)
    threading.Timer(0.05, may_end.set).start()
    chain.close()
    assert ended == [1]


def test_an_error_of_the_consumer_stops_the_steps():
    source = Source(100)
    with suppress(ZeroDivisionError), closing(ahead(source, abs, depth=3)) as chain:
        for item in chain:
            1 / (item - 2)
    assert source.closed
    assert source.drawn < 100
    assert not running()


def test_nothing_is_begun_before_the_first_result_is_asked_for():
    source = Source(3)
    ahead(source, abs)
    assert source.drawn == 0


@pytest.mark.parametrize("given_values", [{"depth": 0}, {"n_threads": 0}], ids=str)
def test_no_room_or_no_thread_is_refused_at_once(given_values):
    with pytest.raises(InputError, match="both have to be at least 1"):
        ahead([], abs, **given_values)
