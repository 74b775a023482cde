"""Taking back: slices that leave, and earlier states that come again, both as new versions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lloki_atlas.errors import ConflictError, FormatError, InputError, NotFoundError
from lloki_atlas.store.catalog import Catalog, append, commit, list_versions
from lloki_atlas.store.leases import writing
from lloki_atlas.store.log import read_state
from lloki_atlas.store.records import NO_REFERENCE, CatalogState, Change
from lloki_atlas.store.retention import missing_objects


def remove(catalog: Catalog, slice_ids: str | Iterable[str]) -> Catalog:
    """Make a new version without some slices; earlier versions keep them.

    Parameters
    ----------
    catalog
        Open for commits.
    slice_ids
        One id, or several.

    Returns
    -------
    Catalog
        At the new version.

    Raises
    ------
    NotFoundError
        If there is no such slice; the message names the nearest.
    InputError
        If no slice is named, or the catalog is open for reading.
    ConflictError
        If another writer changed one of them meanwhile.
    """
    names = [slice_ids] if isinstance(slice_ids, str) else sorted(set(slice_ids))
    if not names:
        raise InputError("no slice is named: say which to remove")
    for name in names:
        catalog.slice(name)
    return commit(catalog, Change(slices=dict.fromkeys(names)), message=f"remove {_shown(names)}")


def rollback(catalog: Catalog, version: int) -> Catalog:
    """Make a new version that says what an earlier one said: settings, reference, models and slices.

    Parameters
    ----------
    catalog
        Open for commits, at the head: what others committed since is not undone unseen.
    version
        The version to return to.

    Returns
    -------
    Catalog
        At the new version; the same catalog when nothing differs.

    Raises
    ------
    NotFoundError
        If there is no such version, or it was given up; what is gone of it is named.
    FormatError
        If objects of it are missing though it is retained.
    InputError
        If the catalog is open for reading.
    ConflictError
        If there is a newer version than the one opened.
    """
    root, oldest = catalog.root, catalog.state.oldest
    if catalog.mode == "r":
        raise InputError(f"{root} is open for reading: open it with mode='r+' to roll back")
    numbers = list_versions(root)
    if numbers[-1] > catalog.version:
        raise ConflictError(f"{root} is at version {numbers[-1]}, not {catalog.version}: open the head and look first")
    if version not in numbers:
        raise NotFoundError(f"there is no version {version} in {root}: choose from {oldest} to {catalog.version}")
    with writing(root, f"roll back to version {version}"):
        gone = missing_objects(catalog, version)
        if version < oldest:
            what = f"{_listed(gone)} gone" if gone else "its objects may go at any time"
            raise NotFoundError(
                f"version {version} of {root} was given up, {what}: choose from {oldest} to {catalog.version}"
            )
        if gone:
            raise FormatError(
                f"version {version} of {root} cannot come again, {_listed(gone)} gone: restore them from a copy"
            )
        change = difference(catalog.state, read_state(root, version))
        if not change.touched():
            return catalog
        return append(catalog, change, message=f"roll back to version {version}", exact=True)


def difference(old: CatalogState, new: CatalogState) -> Change:
    """Return the change that makes `new` of `old`, but for versions that were given up."""
    reference = None if new.reference == old.reference else new.reference or NO_REFERENCE
    change = Change(
        config=None if new.config == old.config else new.config,
        reference=reference,
        models=_changed(old.models, new.models),
        slices=_changed(old.slices, new.slices),
    )
    return Change(
        change.config,
        change.reference,
        change.models,
        change.slices,
        {name: new.objects[name] for name in sorted(change.references()) if name in new.objects},
    )


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    gone = dict.fromkeys(sorted(set(old) - set(new)))
    return gone | {name: value for name, value in sorted(new.items()) if old.get(name) != value}


def _listed(names: list[str]) -> str:
    return f"{_shown(names)} {'is' if len(names) == 1 else 'are'}"


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
