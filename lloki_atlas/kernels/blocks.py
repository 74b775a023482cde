"""Values of a slice by blocks of genes, each (n_cells, width) and small enough to stay in cache while it is walked."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lloki_atlas.kernels.gather import WIDTHS

Storage = Literal["float32", "float16"]
CACHE_BYTES = 16 * 2**20  # of one block: half of a common last-level cache, which the graph passes through as well


def block_width(n_cells: int, storage: Storage) -> int:
    """Genes of a block: as many as fit in cache, at least 16."""
    size = np.dtype(storage).itemsize
    return next((width for width in WIDTHS if n_cells * width * size <= CACHE_BYTES), WIDTHS[-1])


def stored_dtype(storage: Storage) -> np.dtype[Any]:
    """Type of the stored numbers; float16 is kept as its bits, for kernels know no such type."""
    return np.dtype(np.float32 if storage == "float32" else np.uint16)


class BlockStore(Protocol):
    """Where blocks are kept between two visits: in memory, or on disk."""

    def read(self, block: int) -> NDArray[Any]:
        """Return a block, valid until the next call."""

    def replace(self, block: int, values: NDArray[Any]) -> NDArray[Any]:
        """Keep `values` as the block, and return an array of its form that may be overwritten."""

    def write_rows(self, block: int, start: int, values: NDArray[Any]) -> None:
        """Write rows of a block from `start` on."""

    def read_rows(self, block: int, start: int, stop: int) -> NDArray[Any]:
        """Return rows of a block."""


class MemoryBlocks:
    """A `BlockStore` in memory."""

    def __init__(self, n_cells: int, n_blocks: int, width: int, storage: Storage) -> None:
        self._blocks = [np.zeros((n_cells, width), dtype=stored_dtype(storage)) for _ in range(n_blocks)]

    def read(self, block: int) -> NDArray[Any]:
        """Return a block itself."""
        return self._blocks[block]

    def replace(self, block: int, values: NDArray[Any]) -> NDArray[Any]:
        """Exchange a block."""
        before, self._blocks[block] = self._blocks[block], values
        return before

    def write_rows(self, block: int, start: int, values: NDArray[Any]) -> None:
        """Write rows of a block from `start` on."""
        self._blocks[block][start : start + len(values)] = values

    def read_rows(self, block: int, start: int, stop: int) -> NDArray[Any]:
        """Return rows of a block."""
        return self._blocks[block][start:stop]
