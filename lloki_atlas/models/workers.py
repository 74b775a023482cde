"""Threads for torch and for kernels, each running torch on one thread: bytes do not depend on how many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, TypeVar

import torch

from lloki_atlas.models.threads import single_thread

Item = TypeVar("Item")
Result = TypeVar("Result")
# rows of a part: the parts decide the order of summation, so they follow from the rows and from nothing else
PART_ROWS = 500


class Each(Protocol):
    """Calls `work` on every item and returns the results in the order of the items."""

    def __call__(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Return `[work(item) for item in items]`, on whichever threads."""


def in_turn(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Call `work` on one item after the other, on this thread, with torch on one thread."""
    with single_thread():
        return [work(item) for item in items]


def parts(n: int, size: int = PART_ROWS) -> list[slice]:
    """Cut 0 to `n` into ranges of about equal length, at most `size`."""
    n_parts = -(-n // size)
    return [slice(part * n // n_parts, (part + 1) * n // n_parts) for part in range(n_parts)]


class Workers:
    """A pool of threads, or this thread where one is asked for; to be closed, or used as a context.

    Parameters
    ----------
    n_threads : int
    """

    def __init__(self, n_threads: int) -> None:
        self._pool = (
            ThreadPoolExecutor(n_threads, "lloki-atlas", torch.set_num_threads, (1,)) if n_threads > 1 else None
        )

    def each(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Call `work`, which must not wait for another call, on every item; results in the order of the items."""
        return in_turn(work, items) if self._pool is None else list(self._pool.map(work, items))

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
