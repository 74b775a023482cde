"""Where things are: a path on a file system, or a key in a bucket that is used like one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import obstore

from lloki_atlas.errors import InputError, StorageError
from lloki_atlas.store.buckets import SCHEMES, client, create, storage_errors

_COLLAPSED = re.compile(r"(s3|gs|az):/[^/]")
_ADDRESS = re.compile(r"([a-z0-9]+://[^/]+)/?(.*)", re.DOTALL)


class ObjectStat(NamedTuple):
    """Bytes, and seconds since 1970 of the last change, as `Path.stat` has them."""

    st_size: int
    st_mtime: float


@dataclass(frozen=True, order=True)
class ObjectPlace:
    """A key in a bucket, with the part of `pathlib.Path` that catalogs use; a folder is what keys begin with.

    Parameters
    ----------
    bucket
        With its scheme: `s3://name`.
    key
        Without a slash at either end; "" for the bucket itself.
    """

    bucket: str
    key: str = ""

    def __truediv__(self, name: str) -> ObjectPlace:
        return ObjectPlace(self.bucket, f"{self.key}/{name}".strip("/"))

    def __str__(self) -> str:
        return f"{self.bucket}/{self.key}" if self.key else self.bucket

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> ObjectPlace:
        """The key without its last part."""
        return ObjectPlace(self.bucket, self.key.rpartition("/")[0])

    def is_file(self) -> bool:
        """Whether there is an object of this key."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether there are objects below this key."""
        return any(True for _ in self._below())

    def exists(self) -> bool:
        """Whether there is an object of this key, or below it."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[ObjectPlace]:
        """What is right below, files and folders."""
        with storage_errors(self):
            found = obstore.list_with_delimiter(client(self.bucket), self._prefix())
        for name in sorted([entry["path"] for entry in found["objects"]] + list(found["common_prefixes"])):
            yield ObjectPlace(self.bucket, name)

    def files(self) -> Iterator[str]:
        """Keys of all objects below, relative to this one."""
        yield from self.sizes()

    def sizes(self) -> dict[str, int]:
        """Bytes of all objects below, by their keys relative to this one."""
        start = len(self.key) + 1 if self.key else 0
        return {entry["path"][start:]: entry["size"] for entry in self._below()}

    def read_bytes(self) -> bytes:
        """The object's content; FileNotFoundError when there is none."""
        with storage_errors(self):
            return bytes(obstore.get(client(self.bucket), self.key).bytes())

    def read_range(self, offset: int, length: int) -> Any:
        """So many bytes of the object from `offset` on, fewer where it ends; they support the buffer protocol."""
        try:
            with storage_errors(self):
                return obstore.get_range(client(self.bucket), self.key, start=offset, length=length)
        except StorageError:
            if self.stat().st_size < offset + length:
                return b""
            raise

    def write_bytes(self, data: bytes | memoryview) -> None:
        """Store an object, whole or not at all."""
        with storage_errors(self):
            obstore.put(client(self.bucket), self.key, data)

    def create(self, data: bytes) -> bool:
        """Store an object unless there is one; tell whether what is stored is `data`."""
        return create(self.bucket, self.key, data)

    def copy_to(self, other: ObjectPlace) -> None:
        """Store the same object under another key of the bucket; its bytes stay where they are."""
        with storage_errors(self):
            obstore.copy(client(self.bucket), self.key, other.key)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        if not missing_ok:
            self.stat()
        with storage_errors(self):
            obstore.delete(client(self.bucket), self.key)

    def remove_below(self) -> None:
        """Remove all objects below."""
        paths = [entry["path"] for entry in self._below()]
        with storage_errors(self):
            for first in range(0, len(paths), 1000):
                obstore.delete(client(self.bucket), paths[first : first + 1000])

    def stat(self) -> ObjectStat:
        """Size and time of the object; FileNotFoundError when there is none."""
        with storage_errors(self):
            found = obstore.head(client(self.bucket), self.key)
        return ObjectStat(found["size"], found["last_modified"].timestamp())

    def _below(self) -> Iterator[Any]:
        with storage_errors(self):
            for page in obstore.list(client(self.bucket), self._prefix()):
                yield from page

    def _prefix(self) -> str | None:
        return f"{self.key}/" if self.key else None


Place = Path | ObjectPlace


def place(location: str | Place) -> Place:
    """Tell an address such as `s3://bucket/atlas` from a path.

    Raises
    ------
    InputError
        If it is an address of another kind, or climbs (`..`).
    """
    if isinstance(location, ObjectPlace):
        return location
    if isinstance(location, Path):
        location = str(location)
    found = _ADDRESS.fullmatch(location)
    if found is None:
        if _COLLAPSED.match(location):
            raise InputError(f"{location} is an address that went through a path: hand it over as text, with '://'")
        return Path(location)
    if not location.startswith(SCHEMES):
        raise InputError(f"{location} is an address of an unknown kind: use a folder, or one of {', '.join(SCHEMES)}")
    parts = [part for part in found[2].split("/") if part]
    if any(part in (".", "..") for part in parts):
        raise InputError(f"{location} climbs out of where it begins: write it without '.' and '..'")
    return ObjectPlace(found[1], "/".join(parts))
