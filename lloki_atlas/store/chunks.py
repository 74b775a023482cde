"""The files of an array's chunks, read and written past zarr where their bytes are the rows themselves.

Vectors of floats are stored so. Going past zarr takes a quarter of the time, and a writer knows the digest of what it
wrote without reading it again.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import RangeByteRequest
from zarr.buffer import default_buffer_prototype
from zarr.codecs import BytesCodec
from zarr.core.sync import sync

from lloki_atlas.errors import FormatError
from lloki_atlas.store.durable import sync_file


def is_plain(array: zarr.Array) -> bool:
    """Whether a chunk's bytes are its rows one after the other, as the machine has them."""
    if array.filters or array.compressors or array.shards is not None or array.chunks[1:] != array.shape[1:]:
        return False
    codec = array.serializer
    return isinstance(codec, BytesCodec) and (codec.endian is None or codec.endian.value == sys.byteorder)


def read_plain(array: zarr.Array, start: int, stop: int) -> np.ndarray:
    """Rows of a plain array, from its files right into the result.

    Raises
    ------
    FormatError
        If a file is cut short.
    """
    values = np.empty((stop - start, *array.shape[1:]), dtype=array.dtype)
    if not values.size:
        return values
    chunk_rows, row_bytes = array.chunks[0], values.nbytes // len(values)
    for first in range(start - start % chunk_rows, stop, chunk_rows):
        begin, end = max(first, start), min(first + chunk_rows, stop)
        part = values[begin - start : end - start]
        try:
            with open(_folder(array) / _file(array, first), "rb") as handle:
                handle.seek((begin - first) * row_bytes)
                if handle.readinto(part.data.cast("B")) != part.nbytes:
                    raise damaged(array)
        except FileNotFoundError:  # never written
            part[...] = array.fill_value
    return values


def read_plain_pieces(array: zarr.Array, pieces: Sequence[tuple[int, int]], places: Sequence[np.ndarray]) -> None:
    """Read ranges of rows, each within one chunk, into their places, many at a time.

    Raises
    ------
    FormatError
        If a file is cut short.
    """
    sync(_read_pieces(array, pieces, places))


def write_chunks(array: zarr.Array, start: int, values: np.ndarray) -> dict[str, list[Any]]:
    """Write rows that begin with a chunk and end with one or with the array.

    The bytes are on the disk when this returns; the names of the files are once their folders are synced.

    Returns
    -------
    dict
        Path of each file in the array's folder → [bytes, SHA-256].
    """
    if is_plain(array):
        return dict(_write_plain(array, start, values))
    # a chunk that happens to hold only the fill value is a file too: a missing file is then always damage
    array.with_config({"write_empty_chunks": True})[start : start + len(values)] = values
    written = {}
    for first in range(start, start + len(values), array.chunks[0]):
        file = _folder(array) / _file(array, first)
        content = file.read_bytes()
        sync_file(file)
        written[_file(array, first)] = [len(content), hashlib.sha256(content).hexdigest()]
    return written


def damaged(array: zarr.Array) -> FormatError:
    """The error of an array whose bytes are not what they should be."""
    place = f"array '{array.path}' of {getattr(array.store, 'root', array.store)}"
    return FormatError(f"{place} is damaged: verify the catalog and run the stage again")


def _write_plain(array: zarr.Array, start: int, values: np.ndarray) -> Iterator[tuple[str, list[Any]]]:
    chunk_rows = array.chunks[0]
    for first in range(start, start + len(values), chunk_rows):
        rows = np.ascontiguousarray(values[first - start : first - start + chunk_rows], dtype=array.dtype)
        if len(rows) < chunk_rows:  # the last chunk is stored whole
            rest = np.full((chunk_rows - len(rows), *array.shape[1:]), array.fill_value, dtype=array.dtype)
            rows = np.concatenate([rows, rest])
        data, name = rows.data.cast("B"), _file(array, first)
        file = _folder(array) / name
        _make_folders(array, name)
        # as zarr names its own, so that what a killed writer leaves behind is known for what it is
        temporary = file.with_name(f".{uuid.uuid4().hex}.partial")
        try:
            with open(temporary, "xb", buffering=0) as handle:
                written = handle.write(data)
                while written < len(data):
                    written += handle.write(data[written:])
                os.fsync(handle.fileno())
            os.replace(temporary, file)  # noqa: PTH105 (tests break single system calls by their os name)
        finally:
            temporary.unlink(missing_ok=True)
        yield name, [len(data), hashlib.sha256(data).hexdigest()]


async def _read_pieces(array: zarr.Array, pieces: Sequence[tuple[int, int]], places: Sequence[np.ndarray]) -> None:
    row_bytes = array.dtype.itemsize * int(np.prod(array.shape[1:]))
    prototype, chunk_rows = default_buffer_prototype(), array.chunks[0]

    async def read(piece: tuple[int, int], place: np.ndarray) -> None:
        first = piece[0] % chunk_rows * row_bytes
        request = RangeByteRequest(first, first + place.nbytes)
        name = _file(array, piece[0])
        found = await (array.store_path / name).get(prototype=prototype, byte_range=request)
        if found is None:  # never written
            place[...] = array.fill_value
        elif len(found) != place.nbytes:
            raise damaged(array)
        else:
            place[...] = np.frombuffer(found.as_numpy_array(), dtype=array.dtype).reshape(place.shape)

    await asyncio.gather(*(read(piece, place) for piece, place in zip(pieces, places, strict=True)))


def _make_folders(array: zarr.Array, name: str) -> None:
    """Make the folders of a chunk below the array's own: where that is gone, the object was published by another."""
    folder = _folder(array)
    for part in Path(name).parts[:-1]:
        folder /= part
        folder.mkdir(exist_ok=True)


def _folder(array: zarr.Array) -> Path:
    return Path(array.store.root) / array.path


def _file(array: zarr.Array, row: int) -> str:
    """The file of the chunk that holds a row, relative to the array's folder."""
    key: str = array.metadata.encode_chunk_key((row // array.chunks[0], *(0 for _ in array.shape[1:])))
    return key
