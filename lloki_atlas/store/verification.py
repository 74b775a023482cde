"""Looking a whole catalog over: quickly, by records, receipts and sizes, or deeply, by every byte that is kept."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lloki_atlas.config import canonical_json
from lloki_atlas.errors import FormatError, InputError, LlokiAtlasError, NotFoundError
from lloki_atlas.store.catalog import (
    NAMES,
    STAGING,
    Catalog,
    catalog_root,
    list_versions,
    record_problems,
    refuse_links,
)
from lloki_atlas.store.leases import LEASE_NAME, WRITERS
from lloki_atlas.store.log import CHECKPOINT_EVERY, RECORD_NAME, read_record
from lloki_atlas.store.objects import check_object, compare_sizes, is_complete, object_name, read_receipt, receipt_path
from lloki_atlas.store.places import Place
from lloki_atlas.store.records import KINDS, ZARR_KINDS, CatalogState, VersionRecord, split_name
from lloki_atlas.store.retention import OBJECT_NAME, TEMPORARY


def verify_quick(catalog: Catalog) -> list[str]:
    """Look at the records up to this version, and at receipts and sizes of its objects; no array is read.

    Returns
    -------
    list of str
        A sentence a problem, naming the object and the file; empty when all is well.
    """
    problems = record_problems(catalog)
    for name in sorted(catalog.state.references()):
        problems += _quick_look(catalog, name)
    return problems


def verify_deep(location: str | Place) -> list[str]:
    """Read every byte that a catalog keeps: its identity, all records, all objects and receipts, retained or not.

    Objects of versions that were given up, and such as no version names, are compared with their receipts where they
    are there. What only looks like a part of the catalog is a problem too: unknown files among records and objects,
    records that do not follow from each other.

    Returns
    -------
    list of str
        A sentence a problem, naming the object and the file; empty when all is well.

    Raises
    ------
    NotFoundError
        If there is no catalog.
    """
    root = catalog_root(location)
    try:
        refuse_links(root)
    except FormatError as error:
        return [f"{error}."]
    try:
        numbers = list_versions(root)
    except FormatError as error:
        return [f"catalog.json: {error}."]
    problems = list(_identity(root))
    states, digests = _read_log(root, numbers, problems)
    oldest = max((state.oldest for state in states.values()), default=1)
    retained: dict[str, str] = {}
    for number, state in states.items():
        if number >= oldest:
            retained |= state.objects
            missing = sorted(state.references() - set(state.objects))
            problems += [f"versions: version {number} names {name} without its digest." for name in missing]
    catalog = Catalog(root, 0, CatalogState())
    problems += _strangers(root, {f"{name.partition('/')[0]}/{_path(catalog, name).name}" for name in retained})
    for name in sorted(set(retained) | set(_present(root))):
        path = _path(catalog, name)
        if isinstance(path, Path) and path.is_symlink():
            continue  # it was named among the strangers
        if name in retained or is_complete(path):
            problems += _deep_look(path, {retained[name]} if name in retained else digests.get(name))
    return problems


def _path(catalog: Catalog, name: str) -> Place:
    kind, key = split_name(name)
    return catalog.root / kind / (f"{key}.zarr" if kind in ZARR_KINDS else key)


def _quick_look(catalog: Catalog, name: str) -> Iterator[str]:
    try:
        path = catalog.path(*split_name(name))
        receipt = read_receipt(path)
        problems = compare_sizes(path, receipt.files) if path.is_dir() else None
    except (FormatError, NotFoundError, InputError) as error:
        yield f"{name}: {error}."
        return
    called = object_name(path)
    if receipt.digest != catalog.state.objects.get(name):
        yield f"{called}: file {path.name}.json is not the receipt that was committed."
    elif problems is None:
        yield f"{called}: the whole folder is missing."
    else:
        yield from (f"{called}: file {file} {problem}." for file, problem in sorted(problems.items()))


def _deep_look(path: Place, expected: set[str] | None) -> list[str]:
    """Problems of one object; `expected` are the digests that its receipt may have, None when no record says."""
    file, called = receipt_path(path), object_name(path)
    try:
        receipt = read_receipt(path)
    except (FormatError, NotFoundError) as error:
        return [f"{called}: {error}."]
    # by a receipt that is damaged nothing can be said of the files
    if expected is not None and receipt.digest not in expected:
        return [f"{called}: file {file.name} is not the receipt that was committed."]
    if not _is_canonical(file, receipt.to_json()):
        return [f"{called}: file {file.name} was altered: its bytes are not those that were written."]
    return check_object(path)


def _identity(root: Place) -> Iterator[str]:
    file = root / "catalog.json"
    content = _parsed(file)
    names = {"format_version", "id"}
    if not isinstance(content, dict) or set(content) not in (names, names | {"digest"}):
        yield f"catalog.json: {file} holds something else than was written."
    elif not _is_canonical(file, content) or not re.fullmatch(r"[0-9a-f]{32}", str(content["id"])):
        yield f"catalog.json: {file} was altered: its bytes are not those that were written."


def _read_log(
    root: Place, numbers: list[int], problems: list[str]
) -> tuple[dict[int, CatalogState], dict[str, set[str]]]:
    """State of each version as it follows from the one before, and all digests that were ever committed of an object.

    After a record that cannot be read it goes on from the next that holds the whole state.
    """
    states: dict[int, CatalogState] = {}
    digests: dict[str, set[str]] = {}
    state: CatalogState | None = CatalogState()
    for number in range(1, (numbers[-1] if numbers else 0) + 1):
        try:
            record = read_record(root, number)
            state = record.state if state is None else state.apply(record.change)
        except (LlokiAtlasError, FileNotFoundError) as error:
            problems.append(f"versions: {error}.")
            state = None
            continue
        problems += [f"versions: {number:08d}.json {what}." for what in _record_problems(root, record, state)]
        for name, digest in record.change.objects.items():
            digests.setdefault(name, set()).add(digest)
        if state is not None:
            states[number] = state
    return states, digests


def _record_problems(root: Place, record: VersionRecord, state: CatalogState | None) -> Iterator[str]:
    if (root / "versions" / f"{record.version:08d}.json").read_bytes() != record.to_bytes():
        yield "was altered: its bytes are not those that were written"
    if record.parent != record.version - 1:
        yield f"follows version {record.parent}"
    if record.state is None and (record.version == 1 or record.version % CHECKPOINT_EVERY == 0):
        yield "does not hold the whole state"
    if record.state is not None and record.state != state:
        yield "holds another state than its changes lead to"
    if state is not None and record.oldest != state.oldest:
        yield f"retains versions from {record.oldest} on, its changes say {state.oldest}"


def _strangers(root: Place, known: set[str]) -> Iterator[str]:
    """What has no business among records and objects; what killed writers leave is garbage, and no problem."""
    for folder in (root / name for name in NAMES if name != STAGING):
        entries: list[Place] = list(folder.iterdir()) if folder.is_dir() else []
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = f"{folder.name}/{entry.name}"
            if isinstance(entry, Path) and entry.is_symlink():
                yield f"{name}: is a link, and a catalog holds its own files."
            elif name.removesuffix(".json") not in known and not _is_ours(folder.name, entry.name):
                yield f"{name}: is no part of a catalog: move it elsewhere."


def _is_ours(folder: str, name: str) -> bool:
    forms = {"versions": RECORD_NAME, WRITERS: LEASE_NAME}
    return bool(forms.get(folder, OBJECT_NAME).fullmatch(name) or TEMPORARY.fullmatch(name))


def _present(root: Place) -> Iterator[str]:
    """Return "kind/key" of what lies in the folders of objects."""
    for kind in KINDS:
        folder = root / kind
        for entry in folder.iterdir() if folder.is_dir() else ():
            found = OBJECT_NAME.fullmatch(entry.name)
            if found:
                yield f"{kind}/{found[1].removesuffix('.zarr')}"


def _is_canonical(file: Place, content: Any) -> bool:
    try:
        return file.read_bytes() == canonical_json(content)
    except FileNotFoundError:
        return False


def _parsed(file: Place) -> Any:
    try:
        return json.loads(file.read_bytes())
    except ValueError:
        return None
