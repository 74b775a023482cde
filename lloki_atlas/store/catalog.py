"""The catalog: a log of versions over immutable objects, with optimistic concurrency and no locks.

`versions/00000007.json` is created exclusively, so of many writers one makes version 7. The others read it, and
go on to version 8 unless it changed the same slice or setting as theirs. Readers see the version they opened.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from lloki_atlas.errors import ConflictError, FormatError, InputError, NotFoundError
from lloki_atlas.store.durable import create_exclusive
from lloki_atlas.store.leases import WRITERS, writing
from lloki_atlas.store.log import append_version, check_format, new_identity, read_record, read_state, version_numbers
from lloki_atlas.store.objects import check_object, is_complete, object_name, read_receipt
from lloki_atlas.store.places import ObjectPlace, Place, place
from lloki_atlas.store.records import (
    KINDS,
    ZARR_KINDS,
    CatalogState,
    Change,
    SliceRecord,
    VersionRecord,
    check_key,
    nearest_names,
    split_name,
)

STAGING = "staging"
# what the root of a catalog holds
NAMES = ("catalog.json", "versions", STAGING, WRITERS, *KINDS)
_MODES = ("r", "r+")


@dataclass(frozen=True)
class Catalog:
    """A catalog at one version; `mode` is "r" (reading) or "r+" (commits allowed)."""

    root: Place
    version: int
    state: CatalogState
    mode: str = "r"

    def path(self, kind: str, key: str) -> Place:
        """Return where an object lives, or `staging/<key>` for an unfinished one; nothing is made.

        Raises
        ------
        InputError
            If there is no such kind, or the key is no plain file name.
        FormatError
            If a link is in its place.
        """
        check_key(key)
        if kind not in (*KINDS, STAGING):
            raise InputError(f"'{kind}' is no kind of object: choose from {', '.join(KINDS)} or {STAGING}")
        found = self.root / kind / (f"{key}.zarr" if kind in ZARR_KINDS else key)
        if isinstance(found, Path) and found.is_symlink():
            raise FormatError(f"{found} is a link: a catalog holds its own files, copy what it points to in its place")
        return found

    def slice(self, slice_id: str) -> SliceRecord:
        """Return the record of a slice.

        Raises
        ------
        NotFoundError
            If this version has no such slice; the message names the nearest.
        """
        if slice_id not in self.state.slices:
            near = nearest_names(slice_id, self.state.slices)
            raise NotFoundError(f"there is no slice '{slice_id}' in version {self.version} of {self.root}: {near}")
        return self.state.slices[slice_id]


def create_store(location: str | Place, change: Change, *, message: str) -> Catalog:
    """Make a catalog whose version 1 is `change`; one that died half-way is finished.

    Parameters
    ----------
    location
        A new or an empty folder, or an address such as `s3://bucket/atlas`; objects may have been published in it.
    change
        Settings, reference and models to begin with.
    message
        Why, in a line.

    Returns
    -------
    Catalog
        At version 1, open for commits.

    Raises
    ------
    InputError
        If something is there already.
    """
    head = vacant(location)
    root = head.root
    with writing(root, message):
        change = _with_digests(head, change)
        if not create_exclusive(root / "catalog.json", new_identity()):
            check_format(root)
        created = _try_commit(head, change, message, uuid.uuid4().hex)
    if created is None:
        raise InputError(_taken(root))
    return created


def vacant(location: str | Place) -> Catalog:
    """Return the catalog before its first version, so that objects can be published for `create_store` to name.

    Raises
    ------
    InputError
        If something else than the remains of an interrupted making is there.
    """
    root = catalog_root(location)
    if root.exists() and not root.is_dir():
        raise InputError(_taken(root))
    refuse_links(root)
    names = [entry.name for entry in root.iterdir()] if root.exists() else []
    if version_numbers(root) or any(name not in NAMES and not name.endswith(".tmp") for name in names):
        raise InputError(_taken(root))
    return Catalog(root, 0, CatalogState(), "r+")


def _taken(root: Place) -> str:
    return f"{root} exists already and is not empty: choose a new folder, or open the catalog that is there"


def open_catalog(location: str | Place, *, version: int | None = None, mode: str = "r") -> Catalog:
    """Open a catalog, at its head unless a version is named; nothing is written.

    Parameters
    ----------
    location
        The catalog's folder, or its address such as `s3://bucket/atlas`.
    version
        A version from 1 on.
    mode
        "r", or "r+" to commit.

    Raises
    ------
    NotFoundError
        If there is no catalog, or no such version, or the version was given up and its objects collected.
    FormatError
        If it is damaged, was written by a newer version, or a link is among its folders.
    """
    if mode not in _MODES:
        raise InputError(f"mode is {mode!r}: use 'r' to read or 'r+' to commit")
    root = catalog_root(location)
    refuse_links(root)
    numbers = list_versions(root)
    if not numbers:
        raise NotFoundError(f"the catalog {root} has no version, its making was interrupted: create it again")
    if version is None:
        version = numbers[-1]
    elif version not in numbers:
        oldest = oldest_version(root, numbers)
        raise NotFoundError(f"there is no version {version} in {root}: choose from {oldest} to {numbers[-1]}")
    elif version < (oldest := oldest_version(root, numbers)):
        raise NotFoundError(
            f"version {version} of {root} was given up and its objects collected: choose from {oldest} to {numbers[-1]}"
        )
    return Catalog(root, version, read_state(root, version), mode)


def commit(catalog: Catalog, change: Change, *, message: str) -> Catalog:
    """Make a new version; other writers' changes since `catalog` was opened are kept.

    Parameters
    ----------
    catalog
        Opened with mode "r+", at any version.
    change
        What becomes different. Every object it names has to be published.
    message
        Why, in a line.

    Returns
    -------
    Catalog
        At the new version.

    Raises
    ------
    InputError
        If the catalog was opened for reading.
    ConflictError
        If another writer changed the same slice or setting meanwhile, or garbage is being collected and that does not
        end soon; nothing was committed.
    FormatError
        If an object is not complete on disk, or is not the one that was announced.
    """
    if catalog.mode == "r":
        raise InputError(f"{catalog.root} is open for reading: open it with mode='r+' to commit")
    with writing(catalog.root, message):
        return append(catalog, change, message=message)


def append(catalog: Catalog, change: Change, *, message: str, exact: bool = False) -> Catalog:
    """Commit without announcing it, for who has announced more; with `exact`, only on top of the version opened.

    Raises
    ------
    ConflictError
        As `commit`; with `exact` if there is any newer version.
    FormatError
        As `commit`.
    """
    change = _with_digests(catalog, change)
    owner = uuid.uuid4().hex
    head = catalog
    while True:
        head = _advance(head, change)
        if exact and head.version > catalog.version:
            raise ConflictError(
                f"{catalog.root} is at version {head.version} meanwhile, not {catalog.version}: open the head and look"
            )
        committed = _try_commit(head, change, message, owner)
        if committed is not None:
            return committed


def history(catalog: Catalog) -> list[VersionRecord]:
    """Return the records of version 1 to this one, oldest first."""
    return [read_record(catalog.root, number) for number in range(1, catalog.version + 1)]


def list_versions(root: str | Place) -> list[int]:
    """Return the numbers of all versions, ascending."""
    root = catalog_root(root)
    check_format(root)
    return version_numbers(root)


def oldest_version(root: Place, numbers: list[int]) -> int:
    """Return the first version that is retained, as the newest readable record says."""
    for number in reversed(numbers):
        try:
            return read_record(root, number).oldest
        except FormatError:
            continue
    return numbers[0]


def refuse_links(root: Place) -> None:
    """Refuse a catalog whose folders lead elsewhere."""
    for name in NAMES if isinstance(root, Path) else ():
        if isinstance(root, Path) and (root / name).is_symlink():
            raise FormatError(f"{root / name} is a link: a catalog holds its own files, copy what it points to there")


def verify(catalog: Catalog) -> list[str]:
    """Read every byte that this version can reach and compare digests.

    Returns
    -------
    list of str
        A sentence a problem, naming the object and the file; empty when all is well.
    """
    problems = record_problems(catalog)
    for name in sorted(catalog.state.references()):
        path = catalog.path(*split_name(name))
        found = check_object(path)
        if not found and read_receipt(path).digest != catalog.state.objects.get(name):
            found = [f"{object_name(path)}: file {path.name}.json is not the receipt that was committed."]
        problems += found
    return problems


def record_problems(catalog: Catalog) -> list[str]:
    """Say which records of version 1 to this one cannot be read, a sentence each."""
    problems = []
    for number in range(1, catalog.version + 1):
        try:
            read_record(catalog.root, number)
        except FormatError as error:
            problems.append(f"versions: {error}.")
    return problems


def _advance(base: Catalog, change: Change) -> Catalog:
    """Take in the versions after `base`, or refuse when one of them touched what `change` touches."""
    numbers = version_numbers(base.root)
    head = numbers[-1] if numbers else 0
    state, mine = base.state, change.touched()
    for number in range(base.version + 1, head + 1):
        theirs = read_record(base.root, number).change
        both = sorted(mine & theirs.touched())
        if both:
            raise ConflictError(
                f"version {number} of {base.root} changed {', '.join(both)} meanwhile: open the head and try again"
            )
        state = state.apply(theirs)
    return replace(base, version=max(head, base.version), state=state)


def _try_commit(head: Catalog, change: Change, message: str, owner: str) -> Catalog | None:
    """Try to write the version after `head`; None when another writer has it."""
    number, state = head.version + 1, head.state.apply(change)
    if append_version(head.root, number, state=state, change=change, message=message, owner=owner):
        return Catalog(head.root, number, state, head.mode)
    return None


def _with_digests(catalog: Catalog, change: Change) -> Change:
    """Check that every object of a change is complete, and complete its digests."""
    digests = {}
    for name in sorted(change.references()):
        path = catalog.path(*split_name(name))
        if not is_complete(path):
            raise FormatError(
                f"{object_name(path)} in {catalog.root} is not complete: run the stage that makes it first"
            )
        digests[name] = read_receipt(path).digest
        if change.objects.get(name, digests[name]) != digests[name]:
            raise FormatError(f"{object_name(path)} in {catalog.root} is not the one announced: run its stage again")
    return replace(change, objects=digests)


def catalog_root(location: str | Place) -> Place:
    """The catalog's folder, absolute, or its prefix in a bucket."""
    root = place(location)
    if isinstance(root, ObjectPlace):
        if not root.key:
            raise InputError(f"{root} is a whole bucket: name a folder in it, such as {root}/atlas")
        return root
    return root.expanduser().absolute()
