"""What a catalog has to be after its writer was killed, and after the same step was taken again."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lloki_atlas.errors import LlokiAtlasError, NotFoundError
from lloki_atlas.store.arrays import read_arrays
from lloki_atlas.store.catalog import Catalog, list_versions, open_catalog, verify
from lloki_atlas.store.log import read_record
from lloki_atlas.store.records import KINDS, CatalogState, Change, split_name
from lloki_atlas.store.slices import SliceStore

# a name that housekeeping can tell for what it is: an unfinished write, or a part of an object
_UNFINISHED = re.compile(r"[0-9a-f]{32}([.-].*)?")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
_OBJECT = re.compile(r"[0-9a-f]{32}(\.zarr)?(\.json)?")
_RECORD = re.compile(r"\d{8}\.json")
_LEASE = re.compile(r"(collecting-)?[0-9a-f]{32}\.json")


@dataclass(frozen=True)
class Snapshot:
    """A catalog at its head: what it holds, the changes that led there, and digests of all that can be reached."""

    states: dict[int, CatalogState]  # of each version that is retained
    changes: tuple[Change, ...]
    names: frozenset[str]
    files: dict[str, str]
    values: dict[str, str]


def snapshot(root: Path) -> Snapshot:
    """Read everything of a whole catalog."""
    catalog, numbers = open_catalog(root), list_versions(root)
    retained = range(catalog.state.oldest, catalog.version + 1)
    return Snapshot(
        {number: open_catalog(root, version=number).state for number in retained},
        tuple(read_record(root, number).change for number in numbers),
        frozenset(object_names(root)),
        reachable_files(catalog),
        stored_values(catalog),
    )


def reachable_files(catalog: Catalog) -> dict[str, str]:
    """Digest of every file that a version can reach, receipts included, by its path in the catalog."""
    found = {}
    for name in sorted(catalog.state.references()):
        path = catalog.path(*split_name(name))
        files = [path.with_name(f"{path.name}.json"), *(file for file in path.rglob("*") if file.is_file())]
        for file in files:
            found[str(file.relative_to(catalog.root))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def stored_values(catalog: Catalog) -> dict[str, str]:
    """Digest of what a reader gets: counts and names of the cells, vectors."""
    found = {}
    for name, record in sorted(catalog.state.slices.items()):
        store = SliceStore(catalog.path("slices", record.objects["ingest"]))
        counts = store.counts()
        parts = [counts.data.tobytes(), counts.indices.tobytes(), "\n".join(store.obs([]).index).encode()]
        for stage in ("embed", "integrate"):
            if stage in record.objects:
                arrays = read_arrays(catalog.path("embeddings", record.objects[stage]))
                parts += [arrays[array].tobytes() for array in sorted(arrays)]
        found[name] = hashlib.sha256(b"\0".join(parts)).hexdigest()
    return found


@dataclass(frozen=True)
class Findings:
    """What is wrong, a sentence each; empty where all is well."""

    lost: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()
    strange: tuple[str, ...] = ()

    def __add__(self, other: Findings) -> Findings:
        return Findings(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in self.__dataclass_fields__)


def after_kill(
    root: Path, *, acknowledged: Sequence[int], held: Catalog | None, before: Snapshot | None, undisturbed: Snapshot
) -> Findings:
    """Look at what a kill left.

    Parameters
    ----------
    root
        The catalog.
    acknowledged
        Versions whose calls had returned.
    held
        The catalog as a reader had opened it before.
    before
        What was there before.
    undisturbed
        What the same step leads to when nothing happens.
    """
    found = Findings(strange=tuple(strange_names(root)))
    try:
        head = open_catalog(root)
    except NotFoundError as error:
        if not acknowledged and before is None:
            return found  # it says that it was never made
        return found + Findings(unreadable=(str(error),))
    except LlokiAtlasError as error:
        return found + Findings(unreadable=(str(error),))
    known = {**(before.states if before is not None else {}), **undisturbed.states}
    for number in sorted({*(before.states if before is not None else {}), *acknowledged, head.version}):
        if number < head.state.oldest <= min(undisturbed.states):
            continue  # it was given up, as it was to be
        try:
            state = open_catalog(root, version=number).state
        except LlokiAtlasError as error:
            found += Findings(lost=(str(error),))
            continue
        if state != known.get(number):
            found += Findings(lost=(f"version {number} is another than without the kill",))
    found += Findings(unreadable=tuple(verify(head)))
    return found + unharmed(held, before)


def unharmed(held: Catalog | None, before: Snapshot | None) -> Findings:
    """A reader of an older version reads what it read."""
    if held is None or before is None:
        return Findings()
    if (reachable_files(held), stored_values(held)) != (before.files, before.values):
        return Findings(differing=(f"a reader of version {held.version} reads other bytes",))
    return Findings()


def after_resume(root: Path, *, held: Catalog | None, before: Snapshot | None, undisturbed: Snapshot) -> Findings:
    """Compare what the same step, taken again, led to with what it leads to when nothing happens."""
    head = open_catalog(root)
    found = Findings(unreadable=tuple(verify(head)), strange=tuple(strange_names(root)))
    if head.state != undisturbed.states[max(undisturbed.states)]:
        found += Findings(differing=("the state differs",))
    files = reachable_files(head)
    for name in sorted({*files, *undisturbed.files}):
        if files.get(name) != undisturbed.files.get(name):
            found += Findings(differing=(f"{name} differs",))
    if stored_values(head) != undisturbed.values:
        found += Findings(differing=("what a reader gets differs",))
    if set(object_names(root)) != undisturbed.names:
        found += Findings(differing=("other objects are there",))
    # a step taken again may say once more what was said: nothing but that
    changes = [read_record(root, number).change for number in list_versions(root)]
    if [change for n, change in enumerate(changes) if change not in changes[:n]] != list(undisturbed.changes):
        found += Findings(differing=("the log holds other changes",))
    return found + unharmed(held, before)


def object_names(root: Path) -> list[str]:
    """Objects and receipts that are there, reachable or not."""
    folders = [root / kind for kind in KINDS if (root / kind).is_dir()]
    return [f"{folder.name}/{entry.name}" for folder in folders for entry in folder.iterdir() if entry.name[0] != "."]


def strange_names(root: Path) -> list[str]:
    """Entries that housekeeping could not name: no object, receipt, record, lease, temporary or unfinished file."""
    if not root.exists():
        return []
    patterns = {**dict.fromkeys(KINDS, _OBJECT), "versions": _RECORD, "writers": _LEASE, "staging": _UNFINISHED}
    strange = []
    for entry in root.iterdir():
        if entry.is_dir() and entry.name in patterns:
            names = [part.name for part in entry.iterdir()]
            known = patterns[entry.name]
            strange += [
                f"{entry.name}/{name}" for name in names if not known.fullmatch(name) and not _TEMPORARY.fullmatch(name)
            ]
        elif entry.name != "catalog.json" and not _TEMPORARY.fullmatch(entry.name):
            strange.append(entry.name)
    return strange
