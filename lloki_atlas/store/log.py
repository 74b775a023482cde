"""The log of versions on disk: one small record a version, created exclusively and never changed."""

from __future__ import annotations

import json
import re
import uuid
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any

from lloki_atlas.config import canonical_json
from lloki_atlas.config import digest as content_digest
from lloki_atlas.errors import FormatError, NotFoundError
from lloki_atlas.store.durable import create_exclusive
from lloki_atlas.store.places import Place
from lloki_atlas.store.records import CatalogState, Change, VersionRecord

FORMAT_VERSION = 1
# version 1 and every such version hold the whole state: opening reads at most so many records
CHECKPOINT_EVERY = 16
RECORD_NAME = re.compile(r"(\d{8,})\.json")


def append_version(root: Place, number: int, *, state: CatalogState, change: Change, message: str, owner: str) -> bool:
    """Write version `number` unless it exists; tell whether it is the owner's."""
    record = VersionRecord(
        version=number,
        parent=number - 1,
        owner=owner,
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
        code_version=_code_version(),
        message=message,
        change=change,
        state=state if number == 1 or number % CHECKPOINT_EVERY == 0 else None,
        oldest=state.oldest,
    )
    path, data = _record_path(root, number), record.to_bytes()
    create_exclusive(path, data)
    # over a network file system the answer is no proof of having won or lost: what is stored says who did
    return path.read_bytes() == data


def read_state(root: Place, version: int) -> CatalogState:
    """Rebuild the state: back to the nearest checkpoint, then forward."""
    changes: list[Change] = []
    for number in range(version, 0, -1):
        record = read_record(root, number)
        if record.state is not None:
            return record.state.apply(*reversed(changes))
        changes.append(record.change)
    raise FormatError(f"no version record up to {version} in {root} holds the whole state: restore versions/")


def read_record(root: Place, number: int) -> VersionRecord:
    """Read one version record; FormatError names the file when it is missing or damaged."""
    path = _record_path(root, number)
    try:
        content: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FormatError(f"the version record {path} is missing: restore the file from a copy") from None
    except ValueError:
        content = None
    record = VersionRecord.from_json(content, where=str(path))
    if record.version != number:
        raise FormatError(f"the version record {path} says it is version {record.version}: restore the file")
    return record


def check_format(root: Place) -> None:
    """Refuse a folder that is no catalog, or one of a newer version of the format."""
    path = root / "catalog.json"
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"there is no catalog at {root}: make one with `lloki-atlas create {root}`") from None
    except ValueError as error:
        raise FormatError(f"{path} is damaged: restore the file from a copy") from error
    found = content.get("format_version") if isinstance(content, dict) else None
    if type(found) is not int or found < 1:
        raise FormatError(f"{path} is damaged: restore the file from a copy")
    if found > FORMAT_VERSION:
        raise FormatError(f"the catalog {root} has format {found}: update lloki-atlas, this one reads {FORMAT_VERSION}")
    # the first catalogs have no digest here
    if "digest" in content and content != _with_digest(content):
        raise FormatError(f"{path} is damaged: restore the file from a copy")


def new_identity() -> bytes:
    """Return the content of `catalog.json` for a new catalog."""
    return canonical_json(_with_digest({"format_version": FORMAT_VERSION, "id": uuid.uuid4().hex}))


def _with_digest(identity: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in identity.items() if name != "digest"}
    return {**rest, "digest": content_digest(rest)}


def version_numbers(root: Place) -> list[int]:
    """Return the numbers of all versions, ascending; other files in the folder do not matter."""
    folder = root / "versions"
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(found[1]) for name in names if (found := RECORD_NAME.fullmatch(name)))


def _record_path(root: Place, number: int) -> Place:
    return root / "versions" / f"{number:08d}.json"


@cache
def _code_version() -> str:
    try:
        return installed_version("lloki-atlas")
    except PackageNotFoundError:
        return "not installed"
