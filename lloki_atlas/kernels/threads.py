"""Threads over rows: kernels release the interpreter, and what they write does not depend on who wrote it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

T = TypeVar("T")


def over_rows(n: int, n_threads: int, work: Callable[[int, int], T], *, chunk: int = 1) -> list[T]:
    """Call `work(start, stop)` on ranges that cover 0 to n, one a thread, and return the results in order.

    Parameters
    ----------
    n
        Number of rows.
    n_threads
        Threads, at least 1.
    work
        Writes only what belongs to its rows.
    chunk
        Ranges begin at multiples of it.
    """
    share = max(1, -(-n // (chunk * max(1, n_threads)))) * chunk
    ranges = [(start, min(start + share, n)) for start in range(0, n, share)]
    if len(ranges) <= 1:
        return [work(start, stop) for start, stop in ranges]
    return list(_pool(n_threads).map(lambda part: work(*part), ranges))


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    # kept: an iteration over blocks would else start its threads hundreds of times; `work` never waits for another
    return ThreadPoolExecutor(n_threads, thread_name_prefix="lloki-atlas")
