"""Blocks of values on disk while a step works on them: plain files in a folder of the step's own, gone when it ends."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from lloki_atlas.errors import FormatError
from lloki_atlas.store.places import ObjectPlace, Place, place


class ScratchBlocks:
    """Blocks `(n_cells, width)` in one file each; two of them are in memory at a time, one here and the caller's.

    Parameters
    ----------
    folder
        Where the files are made.
    n_cells, n_blocks, width
        Form of the blocks, all zero at first.
    storage
        Type of the numbers; float16 is given and returned as its bits.
    """

    def __init__(
        self, folder: str | Path, n_cells: int, n_blocks: int, width: int, storage: Literal["float32", "float16"]
    ) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._dtype = np.dtype(np.float32 if storage == "float32" else np.uint16)
        self._row_bytes = width * self._dtype.itemsize
        self._shape = (n_cells, width)
        self._buffer: NDArray[Any] | None = None
        for block in range(n_blocks):
            with self._path(block).open("wb") as handle:
                handle.truncate(n_cells * self._row_bytes)

    def read(self, block: int) -> NDArray[Any]:
        """Return a block, valid until the next call."""
        if self._buffer is None:
            self._buffer = np.empty(self._shape, dtype=self._dtype)
        with self._path(block).open("rb") as handle:
            if handle.readinto(self._buffer.view(np.uint8).reshape(-1).data) != self._buffer.nbytes:
                raise FormatError(f"{self._path(block)} is cut short: run the step again")
        return self._buffer

    def replace(self, block: int, values: NDArray[Any]) -> NDArray[Any]:
        """Write a block, and return the same array, which may be overwritten."""
        with self._path(block).open("r+b") as handle:
            handle.write(np.ascontiguousarray(values).view(np.uint8).reshape(-1).data)
        return values

    def write_rows(self, block: int, start: int, values: NDArray[Any]) -> None:
        """Write rows of a block from `start` on."""
        with self._path(block).open("r+b") as handle:
            handle.seek(start * self._row_bytes)
            handle.write(np.ascontiguousarray(values).view(np.uint8).reshape(-1).data)

    def read_rows(self, block: int, start: int, stop: int) -> NDArray[Any]:
        """Return rows of a block."""
        self._buffer = None  # rows are read when iterations are over
        width = self._shape[1]
        rows = np.fromfile(
            self._path(block), dtype=self._dtype, count=(stop - start) * width, offset=start * self._row_bytes
        )
        return rows.reshape(stop - start, width)

    def _path(self, block: int) -> Path:
        return self._folder / f"block-{block}.bin"


@contextmanager
def scratch_folder(beside: str | Place) -> Iterator[Path]:
    """Make the name of a folder of one's own, and remove what was put there at the end.

    Beside `beside`, or among the machine's temporary files where that is in a bucket.
    """
    near = place(beside)
    if isinstance(near, ObjectPlace):
        near = Path(tempfile.gettempdir()) / near.name
    folder = near.with_name(f"{near.name}.scratch-{uuid4().hex[:8]}")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
