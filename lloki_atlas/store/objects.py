"""Immutable objects and their receipts.

An object is a folder that never changes; the receipt beside it (`<name>.json`) says what is in it. An object without
its receipt is unfinished: nobody refers to it, and publishing again mends it (`lloki_atlas.store.publishing`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lloki_atlas.config import digest as content_digest
from lloki_atlas.errors import FormatError, NotFoundError, StorageError
from lloki_atlas.store.durable import files_below, sizes_below
from lloki_atlas.store.places import ObjectPlace, Place, place

RECEIPT_FORMAT = 1


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


def file_digests(folder: str | Place) -> dict[str, list[Any]]:
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
    folder = place(folder)
    return {relative: file_digest(folder / relative) for relative in sorted(files_below(folder))}


def read_receipt(path: str | Place) -> Receipt:
    """Read the receipt of the object at `path`.

    Raises
    ------
    NotFoundError
        If there is none: the object was never finished.
    FormatError
        If it is garbled, names files outside of the object, or was written by a newer version.
    """
    file = receipt_path(place(path))
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
    lineage = content.get("lineage") or {}
    if not isinstance(lineage, dict) or not all(_is_inside(*line) for line in content["files"].items()):
        raise FormatError(f"the receipt {file} lists what is no file of {name}: it was not written by lloki-atlas")
    return Receipt(str(content.get("name")), lineage, content["files"])


def is_complete(path: str | Place) -> bool:
    """Tell whether the object at `path` was published to the end; its bytes are not read."""
    path = place(path)
    return receipt_path(path).is_file() and path.is_dir()


def check_object(path: str | Place) -> list[str]:
    """Compare every byte of an object with its receipt.

    Returns
    -------
    list of str
        One sentence for each file that is missing, extra, cut short or altered; empty when all is well.
    """
    path = place(path)
    name = object_name(path)
    if not path.is_dir():
        return [f"{name}: the whole folder is missing."]
    try:
        expected = read_receipt(path).files
        problems = compare_sizes(path, expected)
    except (FormatError, NotFoundError) as error:
        return [f"{name}: {error}."]
    for file in sorted(expected.keys() - problems.keys()):
        if problem := _content_problem(path / file, expected[file]):
            problems[file] = problem
    return [f"{name}: file {file} {problem}." for file, problem in sorted(problems.items())]


def compare_sizes(path: Place, expected: Mapping[str, list[Any]]) -> dict[str, str]:
    """Compare names and sizes of the files of an object with its receipt's.

    Returns
    -------
    dict
        What is wrong with a file, by its path: it is missing, extra, or of another size.

    Raises
    ------
    FormatError
        If there is something that is no plain file.
    """
    present = sizes_below(path)
    problems = dict.fromkeys(expected.keys() - present.keys(), "is missing")
    problems |= dict.fromkeys(present.keys() - expected.keys(), "is not in its receipt")
    for file in expected.keys() & present.keys():
        if present[file] != expected[file][0]:
            problems[file] = f"has {present[file]} bytes where {expected[file][0]} were written"
    return problems


def require_whole(path: str | Place) -> None:
    """Refuse a published object with a file that is gone or of another size; one without a receipt is not looked at.

    Zarr reads a chunk whose file is missing as zeros, so only the receipt can tell.

    Raises
    ------
    FormatError
        Naming the file.
    """
    path = place(path)
    if not receipt_path(path).is_file():
        return
    receipt = read_receipt(path)
    problems = compare_sizes(path, receipt.files) if path.is_dir() else dict.fromkeys(receipt.files, "is missing")
    if problems:
        file, problem = min(problems.items())
        raise FormatError(
            f"file {file} of {object_name(path)} {problem}: restore it from a copy, or remove the object with its "
            "receipt and run again"
        )


def object_name(path: str | Place) -> str:
    """Return how an object is called in messages: kind and folder name, such as `slices/0a….zarr`."""
    path = place(path)
    return f"{path.parent.name}/{path.name}"


def file_digest(file: Place) -> list[Any]:
    """Bytes and SHA-256 of one file."""
    if isinstance(file, ObjectPlace):
        content = file.read_bytes()
        return [len(content), hashlib.sha256(content).hexdigest()]
    with open(file, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        return [handle.tell(), digest]


def receipt_path(path: Place) -> Place:
    """Where the receipt of the object at `path` is."""
    return path.parent / f"{path.name}.json"


def _is_inside(file: str, entry: Any) -> bool:
    """Whether a line of a receipt is the relative path of a file that stays inside, with its size and digest."""
    is_path = not re.search(r"[\\\0]|(^|/)(\.{0,2})(/|$)", file)
    is_entry = isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is int
    return is_path and is_entry and isinstance(entry[1], str)


def _content_problem(file: Place, expected: list[Any]) -> str | None:
    try:
        if file_digest(file) != list(expected):
            return "was altered: its digest is not the one in the receipt"
    except StorageError:
        raise
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None
