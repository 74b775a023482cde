"""Named arrays in a Zarr v3 group, in a folder or in a bucket, cut into chunks along rows, readable with xarray.

A chunk is whole rows and belongs to one writer, so tasks may write their rows of one array at the same time.
Text is stored as variable-length strings and read back as object arrays of `str`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from json import JSONDecodeError
from typing import Any

import numpy as np
import zarr
from zarr.errors import ContainsArrayError, ContainsGroupError

from lloki_atlas.errors import FormatError, InputError
from lloki_atlas.store.buckets import storage_errors
from lloki_atlas.store.chunks import damaged, is_plain, read_plain, read_plain_pieces, write_chunks, zarr_store
from lloki_atlas.store.objects import require_whole
from lloki_atlas.store.opening import member, open_array, open_group
from lloki_atlas.store.places import Place, place

_CHUNK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class ArraySpec:
    """Form of one array.

    Parameters
    ----------
    shape
        At least one axis; the first one is rows.
    dtype
        numpy dtype; any text dtype means variable-length strings.
    chunk_rows
        Rows a chunk; a writer owns whole chunks.
    dims
        Name of each axis, as xarray shows them.
    attributes
        JSON-like, such as the unit.
    """

    shape: tuple[int, ...]
    dtype: Any
    chunk_rows: int
    dims: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "dims", tuple(self.dims))
        if not self.shape or min(self.shape) < 0:
            raise InputError(f"an array of shape {self.shape} cannot be stored: give at least one axis, none negative")
        if self.chunk_rows < 1:
            raise InputError(f"chunk_rows is {self.chunk_rows}: it has to be at least 1")
        if len(self.dims) != len(self.shape):
            raise InputError(f"{len(self.shape)} axes have the names {self.dims}: give one name an axis")
        if not self.is_text and np.dtype(self.dtype).kind not in "biuf":
            raise InputError(f"dtype {self.dtype} cannot be stored: use bool, integers, floats or text")

    @property
    def is_text(self) -> bool:
        """Whether the elements are strings."""
        return self.dtype is str or np.dtype(self.dtype).kind in "UOT"

    @property
    def chunks(self) -> tuple[int, ...]:
        """Shape of a chunk."""
        return (self.chunk_rows, *(max(1, n) for n in self.shape[1:]))


def create_arrays(
    path: str | Place, specs: Mapping[str, ArraySpec], *, attributes: Mapping[str, Any] | None = None
) -> None:
    """Make a group with empty arrays; what is there already in the same form is left as it is.

    Rows not yet written read as NaN (floats), 0, False or "".

    Parameters
    ----------
    path
        Folder of the group.
    specs
        Form of each array by name.
    attributes
        Attributes of the group; None leaves those of an existing group.

    Raises
    ------
    FormatError
        If an array of the same name but another form exists.
    """
    group = _make_group(place(path), attributes)
    for name, spec in specs.items():
        _make_array(group, name, spec)


@dataclass(frozen=True)
class Rows:
    """The rows of one opened array; opening costs more than reading a tile, so a task does it once.

    Made by `open_rows`; `read` and `write` are `read_rows` and `write_rows` of this array.
    """

    path: str | Place
    name: str
    array: zarr.Array

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read rows `start` to `stop`."""
        array = self.array
        if not 0 <= start <= stop <= array.shape[0]:
            raise InputError(f"{self._where} has {array.shape[0]} rows: rows {start} to {stop} lie outside")
        if is_plain(array):
            return read_plain(array, self._folder, start, stop)
        require_whole(self.path)
        return read_values(array, slice(start, stop))

    def write(self, start: int, values: np.ndarray) -> dict[str, list[Any]]:
        """Write whole chunks and return the digests of their files."""
        array, where = self.array, self._where
        values = np.asarray(values)
        n_rows, chunk_rows = array.shape[0], array.chunks[0]
        if values.ndim != array.ndim or values.shape[1:] != array.shape[1:]:
            raise InputError(f"{where} has rows of shape {array.shape[1:]}: values of shape {values.shape} do not fit")
        stop = start + len(values)
        if not 0 <= start <= stop <= n_rows:
            raise InputError(f"{where} has {n_rows} rows: rows {start} to {stop} lie outside")
        if (start % chunk_rows and start != n_rows) or (stop % chunk_rows and stop != n_rows):
            raise InputError(
                f"rows {start} to {stop} are not whole chunks of {where}: start and end at multiples of {chunk_rows}"
            )
        if _is_text(array.dtype):
            values = values.astype(object)
        elif not np.can_cast(values.dtype, array.dtype, casting="same_kind"):
            raise InputError(f"{where} holds {array.dtype}: values of {values.dtype} would lose their meaning")
        return {
            f"{self.name}/{file}": entry for file, entry in write_chunks(array, self._folder, start, values).items()
        }

    @property
    def _folder(self) -> Place:
        return place(self.path) / self.name

    @property
    def _where(self) -> str:
        return f"array '{self.name}' of {self.path}"


def open_rows(path: str | Place, name: str, *, mode: str = "r") -> Rows:
    """Open an array to read ("r") or write ("r+") many ranges of its rows.

    Raises
    ------
    NotFoundError
        If the group or an array of that name does not exist.
    """
    return Rows(path, name, open_array(path, name, mode=mode))


def write_rows(path: str | Place, name: str, start: int, values: np.ndarray) -> dict[str, list[Any]]:
    """Write whole chunks of an array onto the disk; writing them again is harmless.

    Parameters
    ----------
    path
        Folder of the group.
    name
        The array.
    start
        First row, a multiple of the chunk's rows.
    values
        (k, ...) rows, ending at a chunk's or the array's end.

    Returns
    -------
    dict
        Path of each file in the group → [bytes, SHA-256], as `file_digests` has them.

    Raises
    ------
    InputError
        If the rows are not whole chunks, or shape or dtype does not fit.
    """
    return open_rows(path, name, mode="r+").write(start, values)


def write_arrays(
    path: str | Place,
    arrays: Mapping[str, np.ndarray],
    *,
    dims: Mapping[str, tuple[str, ...]] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> None:
    """Write whole arrays at once.

    Parameters
    ----------
    path
        Folder of the group, made when missing.
    arrays
        Values by name.
    dims
        Names of the axes by array; `<name>_0`, `<name>_1`, … where none are given.
    attributes
        Attributes of the group.
    """
    specs = {}
    for name, values in arrays.items():
        values = np.asarray(values)
        if values.dtype.kind == "O" and not all(isinstance(value, str) for value in values.flat):
            raise InputError(f"array '{name}' holds objects that are not text: convert them first")
        row_bytes = max(1, values.nbytes // max(1, len(values))) if values.ndim else 1
        names = (dims or {}).get(name) or tuple(f"{name}_{axis}" for axis in range(values.ndim))
        # never longer than the array: a chunk is stored whole
        chunk_rows = min(max(1, _CHUNK_BYTES // row_bytes), max(1, values.shape[0] if values.ndim else 1))
        specs[name] = ArraySpec(values.shape, values.dtype, chunk_rows, names)
    create_arrays(path, specs, attributes=attributes)
    for name, values in arrays.items():
        write_rows(path, name, 0, values)


def read_arrays(path: str | Place, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Read whole arrays, all of the group's or those named.

    Raises
    ------
    NotFoundError
        If the group or an array of that name does not exist.
    """
    if names is None:
        names = sorted(open_group(path).array_keys())
    require_whole(path)
    return {name: read_values(open_array(path, name), slice(None)) for name in names}


def read_rows(path: str | Place, name: str, start: int, stop: int) -> np.ndarray:
    """Read rows `start` to `stop` of one array; only their chunks are touched.

    Raises
    ------
    InputError
        If the rows lie outside the array.
    """
    return open_rows(path, name).read(start, stop)


def read_row_blocks(path: str | Place, name: str, blocks: Sequence[tuple[int, int]]) -> np.ndarray:
    """Read several short ranges of rows of one array, one below the other in the order given.

    Of chunks that are stored plain, as vectors of floats are, only the bytes of these rows are read; of others each
    chunk once where the ranges ascend.

    Parameters
    ----------
    path
        Folder of the group.
    name
        The array; not text.
    blocks
        First row and end of each range.

    Raises
    ------
    InputError
        If rows lie outside the array.
    FormatError
        If a chunk is cut short.
    """
    array = open_array(path, name)
    n_rows, chunk_rows = array.shape[0], array.chunks[0]
    pieces: list[tuple[int, int]] = []  # of one chunk each
    for start, stop in blocks:
        if not 0 <= start <= stop <= n_rows:
            raise InputError(f"array '{name}' of {path} has {n_rows} rows: rows {start} to {stop} lie outside")
        bounds = [start, *range((start // chunk_rows + 1) * chunk_rows, stop, chunk_rows), stop]
        pieces += [(first, last) for first, last in pairwise(bounds) if first < last]
    values = np.empty((sum(stop - start for start, stop in pieces), *array.shape[1:]), dtype=array.dtype)
    ends = np.cumsum([stop - start for start, stop in pieces])
    places = [values[end - (stop - start) : end] for end, (start, stop) in zip(ends, pieces, strict=True)]
    if is_plain(array):
        read_plain_pieces(array, place(path) / name, pieces, places)
    else:
        require_whole(path)
        _read_decoded(array, pieces, places)
    return values


def read_attributes(path: str | Place) -> dict[str, Any]:
    """Read the attributes of a group."""
    return dict(open_group(path).attrs)


def read_values(array: zarr.Array, selection: Any) -> np.ndarray:
    """Read a part of an opened array; text comes as an object array.

    Raises
    ------
    FormatError
        If the stored bytes cannot be decoded.
    """
    try:
        with storage_errors(array.store_path):
            values = np.asarray(array[selection])
    except (ValueError, RuntimeError, UnicodeDecodeError) as error:
        raise damaged(array) from error
    return values.astype(object) if _is_text(values.dtype) else values


def _read_decoded(array: zarr.Array, pieces: Sequence[tuple[int, int]], places: Sequence[np.ndarray]) -> None:
    chunk_rows, held, rows = array.chunks[0], -1, np.empty(0)
    for (start, stop), rows_of_piece in zip(pieces, places, strict=True):
        first = start // chunk_rows * chunk_rows
        if first != held:
            held, rows = first, read_values(array, slice(first, first + chunk_rows))
        rows_of_piece[...] = rows[start - first : stop - first]


def _is_text(dtype: np.dtype) -> bool:
    return dtype.kind in "UOT"


def _make_group(path: Place, attributes: Mapping[str, Any] | None) -> zarr.Group:
    if not (path / "zarr.json").exists():
        try:
            with storage_errors(path):
                return zarr.create_group(zarr_store(path), zarr_format=3, attributes=dict(attributes or {}))
        except ContainsGroupError:  # another task was first
            pass
    group = open_group(path, "r+")
    if attributes is not None and dict(group.attrs) != dict(attributes):
        return group.update_attributes(dict(attributes))
    return group


def _make_array(group: zarr.Group, name: str, spec: ArraySpec) -> None:
    is_float = not spec.is_text and np.dtype(spec.dtype).kind == "f"
    # vectors of floats hardly compress (1.1 times) and read several times slower when they are
    compression: dict[str, Any] = {"compressors": None} if is_float and len(spec.shape) > 1 else {}
    try:
        group.create_array(
            name,
            shape=spec.shape,
            dtype=str if spec.is_text else np.dtype(spec.dtype),
            chunks=spec.chunks,
            fill_value=np.nan if is_float else None,
            dimension_names=spec.dims,
            attributes=dict(spec.attributes),
            **compression,
        )
    except (ContainsArrayError, JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        _compare(group, name, spec)  # or what is there cannot be read, and it says so


def _compare(group: zarr.Group, name: str, spec: ArraySpec) -> None:
    if not isinstance(array := member(group, name), zarr.Array):
        raise FormatError(f"'{name}' in {group.store_path} is no readable array: remove the folder and run again")
    same_dtype = _is_text(array.dtype) if spec.is_text else array.dtype == np.dtype(spec.dtype)
    same_form = (array.shape, array.chunks, array.metadata.dimension_names) == (spec.shape, spec.chunks, spec.dims)
    if not (same_dtype and same_form):
        raise FormatError(
            f"array '{name}' in {group.store_path} exists with shape {array.shape} of {array.dtype} where "
            f"{spec.shape} of {np.dtype(spec.dtype)} is to be written: remove the folder and run again"
        )
