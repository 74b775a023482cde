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
from zarr.storage import LocalStore, ObjectStore

from lloki_atlas.errors import FormatError
from lloki_atlas.store.buckets import client, storage_errors
from lloki_atlas.store.durable import sync_file
from lloki_atlas.store.objects import is_complete
from lloki_atlas.store.places import ObjectPlace, Place


def is_plain(array: zarr.Array) -> bool:
    """Whether a chunk's bytes are its rows one after the other, as the machine has them."""
    if array.filters or array.compressors or array.shards is not None or array.chunks[1:] != array.shape[1:]:
        return False
    codec = array.serializer
    return isinstance(codec, BytesCodec) and (codec.endian is None or codec.endian.value == sys.byteorder)


def zarr_store(folder: Place) -> Any:
    """A zarr store whose root is this folder."""
    if isinstance(folder, ObjectPlace):
        return ObjectStore(client(str(folder)))
    return LocalStore(folder)


def read_plain(array: zarr.Array, folder: Place, start: int, stop: int) -> np.ndarray:
    """Rows of the plain array in this folder, from its files right into the result.

    Raises
    ------
    FormatError
        If a file is cut short, or one of a published object is missing.
    """
    values = np.empty((stop - start, *array.shape[1:]), dtype=array.dtype)
    if not values.size:
        return values
    chunk_rows, row_bytes = array.chunks[0], values.nbytes // len(values)
    for first in range(start - start % chunk_rows, stop, chunk_rows):
        begin, end = max(first, start), min(first + chunk_rows, stop)
        part = values[begin - start : end - start]
        try:
            if not _read_into(part, _own_file(folder, _file(array, first)), (begin - first) * row_bytes):
                raise damaged(array)
        except FileNotFoundError:
            if is_complete(folder.parent):  # a published object has all of its chunks
                raise damaged(array) from None
            part[...] = array.fill_value  # never written
    return values


def read_plain_pieces(
    array: zarr.Array, folder: Place, pieces: Sequence[tuple[int, int]], places: Sequence[np.ndarray]
) -> None:
    """Read ranges of rows of the plain array in this folder, each within one chunk, into their places, many at a time.

    Raises
    ------
    FormatError
        If a file is cut short, or gone.
    """
    for name in {_file(array, first) for first, _ in pieces}:
        _own_file(folder, name)
    with storage_errors(array.store_path):
        sync(_read_pieces(array, folder, pieces, places))


def write_chunks(array: zarr.Array, folder: Place, start: int, values: np.ndarray) -> dict[str, list[Any]]:
    """Write rows of the array in this folder that begin with a chunk and end with one or with the array.

    The bytes are on the disk when this returns; the names of the files are once their folders are synced.

    Returns
    -------
    dict
        Path of each file in the array's folder → [bytes, SHA-256].
    """
    if is_plain(array):
        return dict(_write_plain(array, folder, start, values))
    # a chunk that happens to hold only the fill value is a file too: a missing file is then always damage
    with storage_errors(folder):
        array.with_config({"write_empty_chunks": True})[start : start + len(values)] = values
    written = {}
    for first in range(start, start + len(values), array.chunks[0]):
        file = folder / _file(array, first)
        content = file.read_bytes()
        if isinstance(file, Path):
            sync_file(file)
        written[_file(array, first)] = [len(content), hashlib.sha256(content).hexdigest()]
    return written


def damaged(array: zarr.Array) -> FormatError:
    """The error of an array whose bytes are not what they should be."""
    place = f"array '{array.path}' of {getattr(array.store, 'root', array.store)}"
    return FormatError(f"{place} is damaged: verify the catalog and run the stage again")


def _write_plain(array: zarr.Array, folder: Place, start: int, values: np.ndarray) -> Iterator[tuple[str, list[Any]]]:
    chunk_rows = array.chunks[0]
    for first in range(start, start + len(values), chunk_rows):
        rows = np.ascontiguousarray(values[first - start : first - start + chunk_rows], dtype=array.dtype)
        if len(rows) < chunk_rows:  # the last chunk is stored whole
            rest = np.full((chunk_rows - len(rows), *array.shape[1:]), array.fill_value, dtype=array.dtype)
            rows = np.concatenate([rows, rest])
        data, name = rows.data.cast("B"), _file(array, first)
        if isinstance(folder, ObjectPlace):
            (folder / name).write_bytes(data)
        else:
            _write_file(folder, name, data)
        yield name, [len(data), hashlib.sha256(data).hexdigest()]


def _write_file(folder: Path, name: str, data: memoryview) -> None:
    inner = folder
    for part in Path(name).parts[:-1]:
        # where the array's own folder is gone, the object was published by another
        inner /= part
        inner.mkdir(exist_ok=True)
    file = folder / name
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


def _read_into(part: np.ndarray, file: Place, offset: int) -> bool:
    """Fill (k, ...) rows with the bytes of a file from `offset` on; False when it is too short."""
    if isinstance(file, ObjectPlace):
        content = file.read_range(offset, part.nbytes)
        if len(content) == part.nbytes:
            part[...] = np.frombuffer(content, dtype=part.dtype).reshape(part.shape)
        return len(content) == part.nbytes
    with open(file, "rb") as handle:
        handle.seek(offset)
        return handle.readinto(part.data.cast("B")) == part.nbytes


async def _read_pieces(
    array: zarr.Array, folder: Place, pieces: Sequence[tuple[int, int]], places: Sequence[np.ndarray]
) -> None:
    row_bytes = array.dtype.itemsize * int(np.prod(array.shape[1:]))
    prototype, chunk_rows = default_buffer_prototype(), array.chunks[0]

    async def read(piece: tuple[int, int], place: np.ndarray) -> None:
        first = piece[0] % chunk_rows * row_bytes
        request = RangeByteRequest(first, first + place.nbytes)
        name = _file(array, piece[0])
        found = await (array.store_path / name).get(prototype=prototype, byte_range=request)
        if found is None:
            if is_complete(folder.parent):  # a published object has all of its chunks
                raise damaged(array)
            place[...] = array.fill_value  # never written
        elif len(found) != place.nbytes:
            raise damaged(array)
        else:
            place[...] = np.frombuffer(found.as_numpy_array(), dtype=array.dtype).reshape(place.shape)

    await asyncio.gather(*(read(piece, place) for piece, place in zip(pieces, places, strict=True)))


def _own_file(folder: Place, name: str) -> Place:
    """A file of the array in this folder; FormatError where a link below the object leads to another."""
    file = folder / name
    if isinstance(folder, ObjectPlace) or isinstance(file, ObjectPlace):
        return file
    if os.path.realpath(file) != os.path.join(os.path.realpath(folder.parent), folder.name, name):  # noqa: PTH118
        raise FormatError(f"{file} is reached by a link: a catalog holds its own files, copy what it points to")
    return file


def _file(array: zarr.Array, row: int) -> str:
    """The file of the chunk that holds a row, relative to the array's folder."""
    key: str = array.metadata.encode_chunk_key((row // array.chunks[0], *(0 for _ in array.shape[1:])))
    return key
