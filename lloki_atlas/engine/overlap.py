"""Work that runs ahead of whoever needs it, by a bounded number of steps.

Calls of `ahead` inside each other make a pipeline: every step has threads of its own, and none gets further ahead of
the next than its queue is long. What is in memory is bounded by the depths, whichever step is the slowest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from lloki_atlas.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    items: Iterable[Item], function: Callable[[Item], Result], *, depth: int = 1, n_threads: int = 1
) -> Iterator[Result]:
    """Call `function` on items in background threads, and yield the results in the order of the items.

    While the consumer holds one result, at most `depth` others are computed or wait. The items are drawn in the
    consumer's thread, when it asks for a result. An error, of `function` or of `items`, reaches the consumer in its
    place, after the results before it.

    Parameters
    ----------
    items
        What to call `function` on; closed at the end if it can be.
    function
        Called from several threads at a time where there are several.
    depth
        Results that are computed or wait beside the one that the consumer has, at least 1.
    n_threads
        Background threads; more than `depth + 1` are of no use.

    Yields
    ------
    The results. Closing the generator lets calls that have begun end, and begins no other.

    Raises
    ------
    InputError
        If there is no room for a result or no thread to make it.
    """
    if depth < 1 or n_threads < 1:
        raise InputError(f"depth is {depth} and n_threads {n_threads}: both have to be at least 1")
    return _ahead(iter(items), function, depth, n_threads)


def _ahead(items: Iterator[Item], function: Callable[[Item], Result], depth: int, n_threads: int) -> Iterator[Result]:
    waiting: deque[Future[Result]] = deque()
    drained = False
    pool = ThreadPoolExecutor(min(n_threads, depth + 1), thread_name_prefix="lloki-atlas-ahead")
    try:
        while True:
            # begun before the oldest result is handed on, so that the threads work while the consumer does
            while not drained and len(waiting) <= depth:
                try:
                    waiting.append(pool.submit(function, next(items)))
                except StopIteration:
                    drained = True
                except Exception as error:
                    drained = True
                    waiting.append(_failed(error))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        close = getattr(items, "close", None)
        if close is not None:
            close()


def _failed(error: Exception) -> Future[Result]:
    future: Future[Result] = Future()
    future.set_exception(error)
    return future
