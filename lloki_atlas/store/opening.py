"""Opening groups and arrays, with an error that says what is the matter where they cannot be."""

from __future__ import annotations

from typing import Any

import zarr

from lloki_atlas.errors import FormatError, NotFoundError
from lloki_atlas.store.buckets import storage_errors
from lloki_atlas.store.chunks import zarr_store
from lloki_atlas.store.places import ObjectPlace, Place, place


def open_group(path: str | Place, mode: Any = "r") -> zarr.Group:
    """Open the group in a folder; NotFoundError when there is none, FormatError when it cannot be read."""
    folder = place(path)
    if not (folder / "zarr.json").is_file():
        raise NotFoundError(f"there are no arrays at {path}: run the stage that writes them")
    try:
        # consolidated metadata may be older than the arrays
        with storage_errors(path):
            return zarr.open_group(zarr_store(folder), mode=mode, zarr_format=3, use_consolidated=False)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise FormatError(f"{path} is not a readable Zarr v3 group: restore it or run its stage again") from error


def open_array(path: str | Place, name: str, mode: Any = "r") -> zarr.Array:
    """Open an array of the group in a folder; errors as for `open_group`, naming the arrays that there are."""
    folder = place(path)
    if isinstance(folder, ObjectPlace) or (folder / "zarr.json").is_file():
        try:
            with storage_errors(path):
                return zarr.open_array(zarr_store(folder), path=name, mode=mode, zarr_format=3)
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            pass  # by way of the group takes three times as long, and says what is the matter
    group = open_group(path, mode)
    if (array := member(group, name)) is None:
        known = ", ".join(sorted(group.array_keys())) or "none"
        raise NotFoundError(f"there is no array '{name}' in {path}: its arrays are {known}")
    if not isinstance(array, zarr.Array):
        raise FormatError(f"'{name}' in {path} is a group where an array is expected")
    return array


def member(group: zarr.Group, name: str) -> Any:
    """An array or group of a group, None when there is none of that name."""
    try:
        return group.get(name)
    except (ValueError, TypeError) as error:  # its metadata are no JSON, or not those of an array
        raise FormatError(f"array '{name}' in {group.store_path} is damaged: run its stage again") from error
