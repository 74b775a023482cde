"""Versions that travel: one local folder that is a catalog of its own, and slices taken in from such a folder.

Every file is checked against its receipt while it is copied. Files are copied and not linked: they have to be read for
the check anyway, and a copy shares no damage with what it was copied from.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from lloki_atlas.config import canonical_json
from lloki_atlas.errors import ConflictError, FormatError, InputError, NotFoundError
from lloki_atlas.store.catalog import Catalog, commit, create_store, open_catalog
from lloki_atlas.store.durable import ensure_folder, remove_tree, sync_folder, write_durable
from lloki_atlas.store.leases import writing
from lloki_atlas.store.objects import Receipt, is_complete, object_name, read_receipt, receipt_path
from lloki_atlas.store.places import Place
from lloki_atlas.store.publishing import own_staging, publish
from lloki_atlas.store.records import CatalogState, Change, SliceRecord, split_name
from lloki_atlas.store.revert import difference

_BLOCK = 1 << 20


def export_version(catalog: Catalog, folder: str | Path) -> Catalog:
    """Write the version that is open, with all its objects, as a catalog of one version.

    Parameters
    ----------
    catalog
        Opened at the version to export; a folder or in a bucket.
    folder
        A local folder that does not exist yet. It appears whole, by one rename, or not at all.

    Returns
    -------
    Catalog
        The new catalog, open for reading. Its identity is its own.

    Raises
    ------
    InputError
        If something is at `folder` already.
    FormatError
        If an object is missing, or not what was committed.
    """
    target = Path(folder).expanduser().absolute()
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} exists: choose another name, nothing is overwritten")
    if not target.parent.is_dir():
        raise InputError(f"there is no folder {target.parent}: make it, or choose another one")
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        for name in sorted(catalog.state.references()):
            source = catalog.path(*split_name(name))
            receipt = _committed_receipt(catalog, name)
            kind = partial / split_name(name)[0]
            copy_object(source, receipt, kind / source.name)
            write_durable(receipt_path(kind / source.name), canonical_json(receipt.to_json()))
        change = difference(CatalogState(), catalog.state)
        create_store(partial, change, message=f"export of version {catalog.version}")
        os.rename(partial, target)  # noqa: PTH104
        sync_folder(target.parent)
    finally:
        remove_tree(partial)
    return open_catalog(target)


def import_version(
    catalog: Catalog, folder: str | Place, *, slices: Iterable[str] | None = None, version: int | None = None
) -> Catalog:
    """Take slices of another catalog, such as an exported folder, into this one.

    Objects are copied and checked; nothing of the other catalog is trusted. Slices that are here already, the same in
    every object, are left out.

    Parameters
    ----------
    catalog
        Open for commits.
    folder
        The other catalog.
    slices
        Slice ids; all when None.
    version
        Version of the other catalog; the newest when None.

    Returns
    -------
    Catalog
        At the one new version that holds all of it; the same catalog when there was nothing to take.

    Raises
    ------
    InputError
        If a slice is here with other content, or the reference or a model that the slices were made with is another.
    NotFoundError
        If there is no such catalog, version or slice.
    FormatError
        If an object is damaged, or points out of the catalog it is in.
    ConflictError
        If another writer changed one of these meanwhile.
    """
    if catalog.mode == "r":
        raise InputError(f"{catalog.root} is open for reading: open it with mode='r+' to import")
    source = open_catalog(folder, version=version)
    names = sorted(source.state.slices) if slices is None else sorted(set(slices))
    records = {name: source.slice(name) for name in names}
    with writing(catalog.root, f"import from {source.root}"):
        # before anything is copied, all that can be refused is
        change = _addition(catalog, source, records)
        if not change.touched():
            return catalog
        receipts = {name: _committed_receipt(source, name) for name in sorted(change.references())}
        for name, receipt in receipts.items():
            _refuse_another(catalog, name, receipt)
        for name, receipt in receipts.items():
            final = catalog.path(*split_name(name))
            if is_complete(final):
                continue
            with own_staging(catalog.path("staging", uuid.uuid4().hex)) as staging:
                copy_object(source.path(*split_name(name)), receipt, staging)
                publish(staging, final, lineage=receipt.lineage, written=receipt.files)
        objects = {name: receipt.digest for name, receipt in receipts.items()}
        change = Change(None, change.reference, change.models, change.slices, objects)
        return commit(catalog, change, message=f"import {len(change.slices)} slices, version {source.version} of them")


def copy_object(source: Place, receipt: Receipt, target: Path) -> None:
    """Copy the files that a receipt lists into a new local folder, durably; each is compared with the receipt.

    Raises
    ------
    FormatError
        If a file is missing, is a link or behind one, or is not what the receipt says.
    """
    ensure_folder(target)
    for file, (n_bytes, digest) in sorted(receipt.files.items()):
        path = target / file
        path.parent.mkdir(parents=True, exist_ok=True)
        sha, size = hashlib.sha256(), 0
        with open(path, "xb") as handle:
            for block in _blocks(source, file):
                sha.update(block)
                size += len(block)
                handle.write(block)
            handle.flush()
            os.fsync(handle.fileno())
        if (size, sha.hexdigest()) != (n_bytes, digest):
            raise FormatError(
                f"{object_name(source)}: file {file} is not what its receipt says: restore it from a copy"
            )
    for part, _, _ in os.walk(target, topdown=False):
        sync_folder(Path(part))
    sync_folder(target.parent)


def _addition(catalog: Catalog, source: Catalog, records: dict[str, SliceRecord]) -> Change:
    """What these slices add, or why they cannot come."""
    here, there = catalog.state, source.state
    taken = {}
    for name, record in records.items():
        if name not in here.slices:
            taken[name] = record
        elif here.slices[name] != record:
            raise InputError(
                f"slice '{name}' is in {catalog.root} with other content than in {source.root}: remove it first, or "
                "leave it out"
            )
    if not taken:
        return Change()
    if None not in (here.reference, there.reference) and here.reference != there.reference:
        raise InputError(
            f"{source.root} was made with another reference than {catalog.root}: ingest its slices from their sources"
        )
    for role, key in sorted(there.models.items()):
        if here.models.get(role, key) != key:
            raise InputError(
                f"the model '{role}' of {source.root} is another than that of {catalog.root}, embeddings of the two "
                "cannot be compared: ingest its slices from their sources"
            )
    reference = there.reference if here.reference is None else None
    models: dict[str, str | None] = {role: key for role, key in there.models.items() if role not in here.models}
    return Change(reference=reference, models=models, slices=taken)


def _committed_receipt(catalog: Catalog, name: str) -> Receipt:
    path = catalog.path(*split_name(name))
    try:
        receipt = read_receipt(path)
    except NotFoundError as error:
        raise FormatError(f"{object_name(path)} in {catalog.root} is missing: restore it from a copy") from error
    if receipt.digest != catalog.state.objects.get(name) or receipt.name != path.name:
        raise FormatError(f"the receipt of {object_name(path)} in {catalog.root} is not the one that was committed")
    return receipt


def _refuse_another(catalog: Catalog, name: str, receipt: Receipt) -> None:
    final = catalog.path(*split_name(name))
    if is_complete(final) and read_receipt(final).digest != receipt.digest:
        raise ConflictError(
            f"{object_name(final)} is in {catalog.root} with other content: `lloki-atlas verify --deep` tells which is "
            "damaged"
        )


def _blocks(source: Place, file: str) -> Iterator[bytes]:
    """The bytes of a file of an object, no link followed."""
    if not isinstance(source, Path):
        try:
            yield (source / file).read_bytes()
        except FileNotFoundError as error:
            raise FormatError(f"{object_name(source)}: file {file} is missing: restore it from a copy") from error
        return
    parts = file.split("/")
    folders = [source.joinpath(*parts[:depth]) for depth in range(len(parts))]
    if any(folder.is_symlink() for folder in folders):
        raise FormatError(f"{object_name(source)}: file {file} lies behind a link: an object holds only plain files")
    try:
        descriptor = os.open(source / file, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise FormatError(f"{object_name(source)}: file {file} cannot be read ({error.strerror})") from error
    with open(descriptor, "rb") as handle:
        while block := handle.read(_BLOCK):
            yield block
