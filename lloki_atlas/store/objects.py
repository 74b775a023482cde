"""Durable files and immutable objects on a POSIX file system.

An object is a folder that appears whole, by one rename, and never changes; the receipt beside it (`<name>.json`)
says what is in it. An object without its receipt is unfinished: nobody refers to it, and publishing again mends it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lloki_atlas.config import canonical_json
from lloki_atlas.config import digest as content_digest
from lloki_atlas.errors import FormatError, NotFoundError
from lloki_atlas.store.durable import (
    create_exclusive,
    describe_os_error,
    ensure_folder,
    sync_file,
    sync_folder,
    write_durable,
)

__all__ = [
    "Receipt",
    "check_object",
    "create_exclusive",
    "describe_os_error",
    "file_digests",
    "is_complete",
    "object_name",
    "publish",
    "read_receipt",
    "write_durable",
]

RECEIPT_FORMAT = 1

# zarr writes each key under such a name and renames it; a killed writer leaves it behind
_LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.(partial|tmp)$")


@dataclass(frozen=True)
class Receipt:
    """What a published object holds and what made it.

    `files` maps the path of each file, relative to the object and with forward slashes, to [bytes, SHA-256].
    """

    name: str
    lineage: Mapping[str, Any]
    files: Mapping[str, list[Any]]

    def to_json(self) -> dict[str, Any]:
        """Return the form on disk."""
        return {
            "format": RECEIPT_FORMAT,
            "name": self.name,
            "lineage": dict(self.lineage),
            "files": {name: list(entry) for name, entry in self.files.items()},
        }

    @property
    def digest(self) -> str:
        """Digest of the whole receipt: what a catalog version expects of the object (32 hexadecimal characters)."""
        return content_digest(self.to_json())


def file_digests(folder: str | Path) -> dict[str, list[Any]]:
    """Digest every file of a folder.

    Returns
    -------
    dict
        Relative path (forward slashes, sorted) to [size in bytes, SHA-256 in hexadecimal].

    Raises
    ------
    FormatError
        If the folder holds something that is neither a file nor a folder, such as a symbolic link.
    """
    folder = Path(folder)
    return {relative: _file_digest(folder / relative) for relative in sorted(_files(folder))}


def publish(
    staging: str | Path,
    final: str | Path,
    *,
    lineage: Mapping[str, Any],
    written: Mapping[str, list[Any]] | None = None,
) -> Receipt:
    """Make a finished folder an object: sync it, rename it in place, then write its receipt.

    Calling again is harmless: an object that is there already stays as it is and `staging` is dropped, and one
    whose writer died between rename and receipt gets its receipt.

    Parameters
    ----------
    staging
        The finished folder, on the same file system as `final`.
    final
        Where the object lives; the receipt is `<final>.json`.
    lineage
        What made it: stage, its version, parameters, keys of the inputs (JSON-like).
    written
        Digests of files whose bytes are on the disk already, as `file_digests` has them; they are not read again.

    Returns
    -------
    Receipt
        The receipt on disk, that of the first publisher.

    Raises
    ------
    NotFoundError
        If neither folder exists.
    """
    staging, final = Path(staging), Path(final)
    if not is_complete(final):
        if not _holds_files(final) and not _holds_files(staging):
            raise NotFoundError(f"there is nothing to publish as {object_name(final)}: {staging} does not exist")
        moved = None if _holds_files(final) else _move_in_place(staging, final, written or {})
        receipt = Receipt(final.name, dict(lineage), file_digests(final) if moved is None else moved)
        data = canonical_json(receipt.to_json())
        if not create_exclusive(_receipt_path(final), data) and moved not in (None, read_receipt(final).files):
            # the folder of an old receipt had been deleted: what is there now is what the receipt has to say
            write_durable(_receipt_path(final), data)
    shutil.rmtree(staging, ignore_errors=True)
    return read_receipt(final)


def read_receipt(path: str | Path) -> Receipt:
    """Read the receipt of the object at `path`.

    Raises
    ------
    NotFoundError
        If there is none: the object was never finished.
    FormatError
        If it is garbled, or was written by a newer version.
    """
    file = _receipt_path(Path(path))
    name = object_name(path)
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise NotFoundError(f"{name} has no receipt: run the stage that makes it again") from None
    except ValueError as error:
        raise FormatError(f"the receipt {file} is garbled: restore the file or run the stage again") from error
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise FormatError(f"the receipt {file} lists no files: restore the file or run the stage again")
    if content.get("format") != RECEIPT_FORMAT:
        raise FormatError(f"the receipt {file} has format {content.get('format')}: update lloki-atlas to read it")
    return Receipt(str(content.get("name")), content.get("lineage") or {}, content["files"])


def is_complete(path: str | Path) -> bool:
    """Tell whether the object at `path` was published to the end; its bytes are not read."""
    path = Path(path)
    return _receipt_path(path).is_file() and path.is_dir()


def check_object(path: str | Path) -> list[str]:
    """Compare every byte of an object with its receipt.

    Returns
    -------
    list of str
        One sentence for each file that is missing, extra, cut short or altered; empty when all is well.
    """
    path = Path(path)
    name = object_name(path)
    if not path.is_dir():
        return [f"{name}: the whole folder is missing."]
    try:
        expected = read_receipt(path).files
        present = set(_files(path))
    except (FormatError, NotFoundError) as error:
        return [f"{name}: {error}."]
    problems = [f"{name}: file {file} is missing." for file in sorted(set(expected) - present)]
    problems += [f"{name}: file {file} is not in its receipt." for file in sorted(present - set(expected))]
    for file in sorted(present & set(expected)):
        problem = _file_problem(path / file, expected[file])
        if problem:
            problems.append(f"{name}: file {file} {problem}.")
    return problems


def object_name(path: str | Path) -> str:
    """Return how an object is called in messages: kind and folder name, such as `slices/0a….zarr`."""
    path = Path(path)
    return f"{path.parent.name}/{path.name}"


def _move_in_place(staging: Path, final: Path, written: Mapping[str, list[Any]]) -> dict[str, list[Any]] | None:
    """Sync and rename; the digests, or None when another publisher's folder is in place."""
    try:
        files = _make_durable(staging, written)
        ensure_folder(final.parent)
        os.rename(staging, final)  # noqa: PTH104
    except OSError:
        if not _holds_files(final):
            raise
        return None
    sync_folder(final.parent)
    sync_folder(staging.parent)
    return files


def _make_durable(staging: Path, written: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    files = {}
    for relative in sorted(_files(staging)):
        if _LEFTOVER.search(relative):
            (staging / relative).unlink(missing_ok=True)
            continue
        files[relative] = written.get(relative) or _file_digest(staging / relative)
        if relative not in written:
            sync_file(staging / relative)
    for folder, _, _ in os.walk(staging, topdown=False):
        sync_folder(Path(folder))
    return files


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _files(folder: Path, prefix: str = "") -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            relative = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _files(folder / entry.name, relative + "/")
            elif entry.is_file(follow_symlinks=False):
                yield relative
            else:
                raise FormatError(f"{folder / entry.name} is a link or a device: an object holds only plain files")


def _file_digest(path: Path) -> list[Any]:
    with open(path, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        return [handle.tell(), digest]


def _file_problem(path: Path, expected: list[Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected[0]:
            return f"has {size} bytes where {expected[0]} were written"
        if _file_digest(path) != list(expected):
            return "was altered: its digest is not the one in the receipt"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _receipt_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")
