"""Giving up old versions, and collecting what no retained version reaches.

That versions are given up is committed before anything is removed, so a crash leaves only garbage. Of each object the
receipt goes first and the folder leaves its place by one rename: nothing half removed is ever taken for an object.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from lloki_atlas.errors import FormatError, InputError, NotFoundError
from lloki_atlas.store.catalog import NAMES, STAGING, Catalog, append, open_catalog
from lloki_atlas.store.durable import remove_tree, sync_folder
from lloki_atlas.store.leases import collecting
from lloki_atlas.store.log import read_record, read_state
from lloki_atlas.store.objects import read_receipt
from lloki_atlas.store.places import ObjectPlace, Place
from lloki_atlas.store.records import KINDS, Change, split_name

GRACE_HOURS = 24.0
CHECK_SECONDS = 5.0

# only what has the form of our own names is ever removed: keys are 32 hexadecimal characters
OBJECT_NAME = re.compile(r"([0-9a-f]{32}(?:\.zarr)?)(\.json)?")
_UNFINISHED = re.compile(r"[0-9a-f]{32}([.-].*)?")
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.(tmp|partial)|.+#\d+")


@dataclass(frozen=True)
class Collection:
    """What was collected, or would be.

    Parameters
    ----------
    versions
        Versions that were given up.
    objects
        Complete and half-written objects, as "kind/name".
    leftovers
        Unfinished work in the staging area, and temporary files.
    n_bytes
        Size of all of it.
    n_young
        How many more will be garbage once the grace period is over.
    dry_run
        Whether nothing was changed.
    """

    versions: tuple[int, ...] = ()
    objects: tuple[str, ...] = ()
    leftovers: tuple[str, ...] = ()
    n_bytes: int = 0
    n_young: int = 0
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the form for programs."""
        return asdict(self)


@dataclass(frozen=True)
class _Garbage:
    """One thing to remove: what lies at `path`, and its receipt if it is an object; `seconds` is when it was made."""

    name: str
    path: Place
    receipt: Place | None
    n_bytes: int
    seconds: float


def gc(
    catalog: Catalog, *, keep_versions: int | None = None, grace_hours: float = GRACE_HOURS, dry_run: bool = False
) -> Collection:
    """Remove what no retained version reaches: objects, unfinished work, temporary files.

    Parameters
    ----------
    catalog
        Open for commits, at any version; a dry run takes one that is open for reading too.
    keep_versions
        How many of the newest versions to retain, not counting those that only give up others; older ones keep their
        record and can no longer be opened. All are retained when None.
    grace_hours
        What was written in so many hours before is left alone.
    dry_run
        Only say what would be done.

    Returns
    -------
    Collection
        What was removed.

    Raises
    ------
    InputError
        If the settings make no sense, or the catalog is open for reading.
    ConflictError
        If somebody writes to the catalog, or collects already; who does is named.
    FormatError
        If the record of a retained version is damaged: nothing is removed before it is known what is needed.
    """
    if keep_versions is not None and keep_versions < 1:
        raise InputError(f"keep_versions is {keep_versions}: keep at least one version")
    if not grace_hours >= 0:
        raise InputError(f"grace_hours is {grace_hours}: use 0 or more")
    if dry_run:
        head = open_catalog(catalog.root)
        oldest = _oldest_kept(head, keep_versions)
        garbage, n_young = _find(head, oldest, grace_hours)
        return _report(garbage, range(head.state.oldest, oldest), n_young, dry_run=True)
    if catalog.mode == "r":
        raise InputError(f"{catalog.root} is open for reading: open it with mode='r+' to collect garbage")
    with collecting(catalog.root) as check:
        head = open_catalog(catalog.root, mode="r+")
        given_up = range(head.state.oldest, _oldest_kept(head, keep_versions))
        if given_up:
            # from here on a crash leaves garbage, which the next collection takes
            message = f"gc: versions {given_up.start} to {given_up.stop - 1} are given up"
            head = append(head, Change(oldest=given_up.stop), message=message)
        garbage, n_young = _find(head, head.state.oldest, grace_hours)
        _remove(head, garbage, check)
    return _report(garbage, given_up, n_young, dry_run=False)


def missing_objects(catalog: Catalog, version: int) -> list[str]:
    """Return "kind/key" of the objects of a version, retained or not, that are gone or are not what was committed."""
    state = read_state(catalog.root, version)
    gone = []
    for name in sorted(state.references()):
        path = catalog.path(*split_name(name))
        try:
            is_there = path.is_dir() and read_receipt(path).digest == state.objects.get(name)
        except (FormatError, NotFoundError):
            is_there = False
        if not is_there:
            gone.append(name)
    return gone


def _oldest_kept(head: Catalog, keep_versions: int | None) -> int:
    """The first version to retain."""
    number = head.version
    kept = 0
    while keep_versions is not None and number > head.state.oldest:
        kept += read_record(head.root, number).change.oldest is None
        if kept == keep_versions:
            return number
        number -= 1
    return head.state.oldest


def _find(head: Catalog, oldest: int, grace_hours: float) -> tuple[list[_Garbage], int]:
    """Everything that is garbage and old enough, and how much more is too young."""
    latest = time.time() - 3600 * grace_hours
    found = [*_objects(head, _reachable(head, oldest)), *_leftovers(head)]
    old = [garbage for garbage in found if garbage.seconds <= latest]
    return old, len(found) - len(old)


def _reachable(head: Catalog, oldest: int) -> dict[str, set[str]]:
    """Names in the folder of each kind, receipts included, of all objects that a version from `oldest` on points to."""
    names = read_state(head.root, oldest).references()
    for number in range(oldest + 1, head.version + 1):
        names |= read_record(head.root, number).change.references()
    kept: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for name in names:
        kind, key = split_name(name)
        folder = head.path(kind, key).name
        kept[kind] |= {folder, f"{folder}.json"}
    return kept


def _objects(head: Catalog, kept: dict[str, set[str]]) -> Iterator[_Garbage]:
    for kind in KINDS:
        folder = head.root / kind
        names = {entry.name for entry in _entries(folder)} - kept[kind]
        for name in sorted({found[1] for entry in names if (found := OBJECT_NAME.fullmatch(entry))}):
            path, receipt = folder / name, folder / f"{name}.json"
            sizes = [_measure(receipt)] if receipt.name in names else []
            if path.name in names:
                # the receipt of a complete object was written last and knows its size: in a bucket that spares requests
                files = _listed_files(path) if sizes else None
                sizes.append(_measure(path) if files is None else (sum(files), 0.0))
            n_bytes, seconds = sum(size for size, _ in sizes), max(seconds for _, seconds in sizes)
            yield _Garbage(f"{kind}/{name}", path, receipt, n_bytes, seconds)


def _listed_files(path: Place) -> list[int] | None:
    """Sizes of an object's files, None where its receipt cannot be read."""
    try:
        return [int(entry[0]) for entry in read_receipt(path).files.values()]
    except (FormatError, NotFoundError, TypeError, ValueError, LookupError):
        return None


def _leftovers(head: Catalog) -> Iterator[_Garbage]:
    for folder in (head.root, *(head.root / name for name in NAMES)):
        wanted = _UNFINISHED if folder.name == STAGING else TEMPORARY
        for entry in _entries(folder):
            if wanted.fullmatch(entry.name):
                name = entry.name if folder is head.root else f"{folder.name}/{entry.name}"
                yield _Garbage(name, entry, None, *_measure(entry))


def _entries(folder: Place) -> list[Place]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _measure(path: Place) -> tuple[int, float]:
    """Bytes, and the time of the last change, of a file or of a folder and all below; links are not followed."""
    if isinstance(path, ObjectPlace):
        stats = [path.stat()] if path.is_file() else [(path / name).stat() for name in path.files()]
        return sum(stat.st_size for stat in stats), max((stat.st_mtime for stat in stats), default=0.0)
    status = path.lstat()
    n_bytes, seconds = status.st_size, status.st_mtime
    if path.is_dir() and not path.is_symlink():
        n_bytes = 0
        for entry in path.iterdir():
            size, changed = _measure(entry)
            n_bytes, seconds = n_bytes + size, max(seconds, changed)
    return n_bytes, seconds


def _remove(head: Catalog, garbage: list[_Garbage], check: Callable[[], None]) -> None:
    checked = time.monotonic()
    for thing in garbage:
        if time.monotonic() - checked > CHECK_SECONDS:
            check()
            checked = time.monotonic()
        if isinstance(thing.path, Path):
            _remove_here(thing, head.root / STAGING)
        else:
            if thing.receipt is not None:
                thing.receipt.unlink(missing_ok=True)
            thing.path.unlink(missing_ok=True)
            remove_tree(thing.path)


def _remove_here(thing: _Garbage, staging: Place) -> None:
    path = Path(str(thing.path))
    if isinstance(thing.receipt, Path):
        thing.receipt.unlink(missing_ok=True)
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
        return
    if thing.receipt is not None and path.is_dir():
        # who publishes an object takes over a whole folder without a receipt: no part of one may be left in its place
        aside = Path(str(staging)) / f"{uuid4().hex}.collected"
        aside.parent.mkdir(exist_ok=True)
        os.rename(path, aside)  # noqa: PTH104
        sync_folder(path.parent)
        path = aside
    remove_tree(path)


def _report(garbage: list[_Garbage], versions: range, n_young: int, *, dry_run: bool) -> Collection:
    return Collection(
        versions=tuple(versions),
        objects=tuple(thing.name for thing in garbage if thing.receipt is not None),
        leftovers=tuple(thing.name for thing in garbage if thing.receipt is None),
        n_bytes=sum(thing.n_bytes for thing in garbage),
        n_young=n_young,
        dry_run=dry_run,
    )
