"""How many threads torch uses, and the caller's setting back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


@contextmanager
def torch_threads(n_threads: int) -> Iterator[None]:
    """Run torch on so many threads inside the block.

    The setting belongs to the calling thread; it is restored when the block ends, an error included.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def single_thread() -> AbstractContextManager[None]:
    """Run torch on one thread inside the block, so that the bytes of a product do not depend on the machine's cores.

    The order of summation in a matrix product follows from how it is cut among threads.
    """
    return torch_threads(1)
