"""Files that survive a crash, on a POSIX file system: whole or absent, never half."""

from __future__ import annotations

import errno
import os
import re
import uuid
from pathlib import Path

from lloki_atlas.errors import InputError

_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_durable(path: str | Path, data: bytes) -> None:
    """Write a file so that after a crash it is there whole, or is what it was before.

    Parameters
    ----------
    path
        The file; missing parent folders are made.
    data
        Its bytes.
    """
    path = Path(path)
    ensure_folder(path.parent)
    _replace(path, data, sync=True)
    sync_folder(path.parent)


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file so that a killed process leaves it whole or as it was; a power failure may leave it empty."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, data, sync=False)


def create_exclusive(path: str | Path, data: bytes) -> bool:
    """Create a file unless it exists; of many callers at one path exactly one is told True.

    A reader sees the whole file or none. Over a network file system False is no proof of having lost, since a won
    answer may be lost and asked again: who needs to know puts a token into `data` and reads it back.

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
    """
    path = Path(path)
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
            return f"the disk is full or the quota is used up{at}: free some space and run again, nothing was committed"
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
