"""What a file or a folder has to be before a library opens it: plain, readable, whole within itself, no larger than it.

Sources come from anywhere. Links would read other files than the one that was named, a pipe never ends, and a few
bytes may declare an array that no memory holds.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lloki_atlas.errors import InputError

# an array may be so large whatever its file, and beyond that so many times its file: gzip reaches a thousand
SMALL_BYTES = 64 << 20
MAX_RATIO = 4000

# arrays that have a value of its own in every chunk: a chunk that is not there was lost, and would be read as zeros
_FILLED = re.compile(r"(X|layers/[^/]+|raw/X)/data|obsm/spatial|.*/(_index|categories)|(obs|var)/index")
_METADATA = ("zarr.json", ".zarray", ".zgroup", ".zmetadata")
_SIDECARS = (*_METADATA, ".zattrs")
_BITS = re.compile(r"(?:u?int|float|complex|r)(\d+)")


def checked_path(source: str | Path) -> Path:
    """Return a path at which there is a plain file or a folder that may be read.

    Raises
    ------
    InputError
        If there is nothing, a pipe or a device, or it may not be read.
    """
    path = Path(source).expanduser()
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            path.open("rb").close()
        elif stat.S_ISDIR(mode):
            next(path.iterdir(), None)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{path} does not exist: give the path of an h5ad file, of a SpatialData store or of a vendor's folder"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise InputError(f"{str(path)!r} is no path ({error}): give the path of a file or a folder") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{path} is a pipe or a device: give a file or a folder")
    return path


def unreadable(path: Path, error: OSError) -> InputError:
    """Say that the operating system refuses to read, which no new copy of the source mends."""
    where = path if not error.filename or str(error.filename) == str(path) else f"{path}: {error.filename}"
    return InputError(f"{where} may not be read ({error.strerror}): check who owns it and its permissions, or the disk")


def plain_files(folder: Path) -> dict[str, int]:
    """List every file under a folder, with its size; none may be a link or a device.

    Returns
    -------
    dict
        Relative path (forward slashes, sorted) to bytes.

    Raises
    ------
    InputError
        If something in the folder is neither a file nor a folder.
    """
    found: dict[str, int] = {}
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    found[Path(entry.path).relative_to(folder).as_posix()] = entry.stat(follow_symlinks=False).st_size
                else:
                    raise InputError(
                        f"{folder} cannot be read whole, {Path(entry.path).relative_to(folder)} is a link or a device: "
                        "copy it without links"
                    )
    return dict(sorted(found.items()))


def check_hdf5(file: h5py.File, *, path: Path) -> None:
    """Refuse an HDF5 file that reads from other files, or declares arrays beyond all proportion to its size.

    Parameters
    ----------
    file
        Open for reading; no array is read.
    path
        Where it is.

    Raises
    ------
    InputError
        If it has an external link, an array stored elsewhere, or an array that cannot be in it.
    """
    size = path.stat().st_size
    # h5py cannot pass on an error of these functions; what they return ends the visit
    outside = file.visititems_links(lambda name, link: name if isinstance(link, h5py.ExternalLink) else None)
    if outside is not None:
        raise InputError(f"{path} links to another file at '{_text(outside)}': export it again as one file")
    arrays: list[tuple[str, h5py.Dataset]] = []
    file.visititems(lambda name, node: arrays.append((name, node)) if isinstance(node, h5py.Dataset) else None)
    for name, array in arrays:
        if array.external or array.is_virtual:
            raise InputError(f"the array '{_text(name)}' of {path} lies in other files: export it again as one file")
        for shape in (array.shape or (), array.chunks or ()):
            _check_size(shape, array.dtype.itemsize, size=size, what=f"'{_text(name)}' of {path}")


def check_zarr(folder: Path, files: Mapping[str, int]) -> None:
    """Refuse a table in zarr whose metadata leave it, that declares more than its files hold, or that lost chunks.

    Parameters
    ----------
    folder
        The table's group.
    files
        Its files, as `plain_files` has them; only metadata are read.

    Raises
    ------
    InputError
        If a name in the metadata has `..`, an array cannot be in the group, or chunks of names, counts or positions
        are missing.
    """
    size = sum(files.values())
    for name in files:
        if name.rpartition("/")[2] not in _METADATA:
            continue
        content = json.loads((folder / name).read_bytes())
        for key, node in _nodes(content, name):
            if ".." in key.split("/") or key.startswith("/"):
                raise InputError(f"the metadata {name} of {folder} name '{key}', which is outside: write it again")
            for shape, itemsize in _declared(node):
                _check_size(shape, itemsize, size=size, what=f"'{key}' of {folder}")
        if _FILLED.fullmatch(name.rpartition("/")[0]):
            _check_chunks(name.rpartition("/")[0], content, folder=folder, files=files)


def _check_chunks(array: str, content: Any, *, folder: Path, files: Mapping[str, int]) -> None:
    """Refuse an array of which fewer chunks are there than its shape asks for."""
    shape = content.get("shape")
    chunks = content.get("chunks") or content.get("chunk_grid", {}).get("configuration", {}).get("chunk_shape")
    if not shape or not chunks:
        return
    expected = math.prod(-(-int(length) // int(chunk)) for length, chunk in zip(shape, chunks, strict=True))
    present = sum(name.startswith(f"{array}/") and name.rpartition("/")[2] not in _SIDECARS for name in files)
    if present < expected:
        raise InputError(
            f"the array '{array}' of {folder} lost {expected - present} of {expected} chunks: copy or export it again"
        )


def _nodes(content: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The node of a metadata file, and those that it has by heart of the nodes below it."""
    yield name.rpartition("/")[0] or ".", content
    known = content.get("consolidated_metadata") if isinstance(content, dict) else None
    for below in (known, content):
        if isinstance(below, dict) and isinstance(below.get("metadata"), dict):
            yield from ((str(key), node) for key, node in below["metadata"].items())


def _declared(node: Any) -> Iterator[tuple[list[Any], int]]:
    """Shapes that a node declares, of the whole and of chunks, and bytes of a value."""
    if isinstance(node, dict):
        kind = node.get("data_type", node.get("dtype"))
        itemsize = _itemsize(kind)
        for name, value in node.items():
            if name in ("shape", "chunks", "chunk_shape") and isinstance(value, list):
                yield value, itemsize
            elif name in ("chunk_grid", "configuration"):
                yield from ((shape, itemsize) for shape, _ in _declared(value))
            elif name == "codecs":
                yield from ((shape, itemsize) for codec in value for shape, _ in _declared(codec))


def _itemsize(kind: Any) -> int:
    bits = _BITS.fullmatch(kind) if isinstance(kind, str) else None
    if bits:
        return max(1, int(bits[1]) // 8)
    try:
        return max(1, np.dtype(kind).itemsize) if isinstance(kind, str) else 8
    except TypeError:
        return 8


def _check_size(shape: Any, itemsize: int, *, size: int, what: str) -> None:
    needed = math.prod(int(length) for length in shape) * max(1, itemsize)
    if needed > max(SMALL_BYTES, MAX_RATIO * size):
        raise InputError(
            f"{what} declares {'×'.join(str(length) for length in shape)} values, which {size:,} bytes cannot hold: "
            "copy or export it again"
        )


def _text(name: Any) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)
