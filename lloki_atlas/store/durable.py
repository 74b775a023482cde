"""Files that survive a crash: whole or absent, never half.

On a POSIX file system by our own steps, in a bucket because it stores objects no other way.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from lloki_atlas.errors import FormatError, InputError
from lloki_atlas.store.places import ObjectPlace, Place, place

_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_durable(path: str | Place, data: bytes) -> None:
    """Write a file so that after a crash it is there whole, or is what it was before.

    Parameters
    ----------
    path
        The file; missing parent folders are made.
    data
        Its bytes.
    """
    path = place(path)
    if isinstance(path, ObjectPlace):
        path.write_bytes(data)
        return
    ensure_folder(path.parent)
    _replace(path, data, sync=True)
    sync_folder(path.parent)


def write_whole(path: str | Place, data: bytes) -> None:
    """Write a file so that a killed process leaves it whole or as it was; a power failure may leave it empty."""
    path = place(path)
    if isinstance(path, ObjectPlace):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, data, sync=False)


def create_exclusive(path: str | Place, data: bytes) -> bool:
    """Create a file unless it exists; of many callers at one path exactly one is told True.

    A reader sees the whole file or none. Over a network False is no proof of having lost, since a won answer may be
    lost and asked again: who needs to know puts a token into `data` and reads it back. In a bucket, callers with equal
    data are all told True.

    Parameters
    ----------
    path
        The file; missing parent folders are made.
    data
        Its bytes.

    Returns
    -------
    bool
        False when the file exists already; it is left as it is.

    Raises
    ------
    InputError
        If the file system has no hard links.
    StorageError
        If the bucket cannot be reached, or does not honour conditions.
    """
    path = place(path)
    if isinstance(path, ObjectPlace):
        return path.create(data)
    ensure_folder(path.parent)
    temporary = _write_temporary(path, data)
    try:
        os.link(temporary, path)
        created = True
    except FileExistsError:
        created = False
    except OSError as error:
        if error.errno in _NO_HARD_LINKS:
            raise InputError(
                f"the file system of {path.parent} has no hard links, which commits need: put the catalog on another"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return created


def remove_tree(folder: str | Place) -> None:
    """Remove a folder and all below it, as far as that can be done; one that is not there is no error."""
    folder = place(folder)
    if isinstance(folder, ObjectPlace):
        folder.remove_below()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def files_below(folder: Place) -> Iterator[str]:
    """Paths of all files below a folder, relative to it and with forward slashes; no order.

    Raises
    ------
    FormatError
        If there is something that is neither a file nor a folder, such as a symbolic link.
    """
    return folder.files() if isinstance(folder, ObjectPlace) else _files(folder, "")


def sizes_below(folder: Place) -> dict[str, int]:
    """Bytes of all files below a folder, by path; as `files_below`."""
    if isinstance(folder, ObjectPlace):
        return folder.sizes()
    return {name: (folder / name).stat().st_size for name in files_below(folder)}


def describe_os_error(error: BaseException) -> str:
    """Say in one sentence what an error of the operating system means and what to do.

    The cause chain is followed, since a full disk may arrive as another library's error without `errno`.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for part in chain:
        codes = "|".join(str(code) for code in _DISK_FULL)
        if getattr(part, "errno", None) in _DISK_FULL or re.search(rf"os error ({codes})\b", str(part)):
            where = getattr(part, "filename", None)
            at = f" at {where}" if where else ""
            return f"the disk is full or the quota is used up{at}: free some space and run again, what was done is kept"
    for part in chain:
        if isinstance(part, OSError) and part.strerror:
            at = f" at {part.filename}" if part.filename else ""
            return f"the file system refused{at}: {part.strerror}"
    return f"the file system refused: {error}"


def ensure_folder(path: Path) -> None:
    """Make a folder and its missing parents, durably."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Force a folder's entries onto the disk."""
    sync_file(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))


def sync_file(path: Path, flags: int = os.O_RDONLY) -> None:
    """Force a file's bytes onto the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path, prefix: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            relative = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _files(folder / entry.name, relative + "/")
            elif entry.is_file(follow_symlinks=False):
                yield relative
            else:
                raise FormatError(f"{folder / entry.name} is a link or a device: an object holds only plain files")


def _replace(path: Path, data: bytes, *, sync: bool) -> None:
    temporary = _write_temporary(path, data, sync=sync)
    try:
        os.replace(temporary, path)  # noqa: PTH105 (tests break single system calls by their os name)
    finally:
        temporary.unlink(missing_ok=True)


def _write_temporary(path: Path, data: bytes, *, sync: bool = True) -> Path:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as handle:
            handle.write(data)
            handle.flush()
            if sync:
                os.fsync(handle.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
