"""What tests of housekeeping share: catalogs grown old, and looks at what a folder holds."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lloki_atlas.config import canonical_json, digest
from lloki_atlas.errors import ConflictError
from lloki_atlas.store.catalog import Catalog, commit, open_catalog
from lloki_atlas.store.leases import writing
from lloki_atlas.store.records import Change, VersionRecord
from lloki_atlas.store.retention import gc

from .stores import slice_record


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for no disk: what survives a power failure is tested elsewhere."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def grow_old(root: Path, *, hours: float = 48.0) -> None:
    """Let everything below `root` be as old as that."""
    for entry in [root, *root.rglob("*")]:
        status = entry.lstat()
        seconds = status.st_mtime - 3600 * hours
        os.utime(entry, (seconds, seconds), follow_symlinks=False)


def tree(root: Path) -> set[str]:
    """Relative paths of all files and links below."""
    return {str(entry.relative_to(root)) for entry in root.rglob("*") if entry.is_symlink() or entry.is_file()}


def object_names(root: Path) -> set[str]:
    """`kind/name` of the folders of all objects, complete or not."""
    kinds = [
        entry for entry in root.iterdir() if entry.is_dir() and entry.name not in ("versions", "staging", "writers")
    ]
    return {f"{kind.name}/{entry.name}" for kind in kinds for entry in kind.iterdir() if entry.is_dir()}


def needed(catalog: Catalog) -> set[str]:
    """The same of what a version reaches."""
    return {
        f"{name.partition('/')[0]}/{catalog.path(*name.split('/')).name}" for name in sorted(catalog.state.references())
    }


def rewrite_record(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change the content of a version record as somebody would who knows how digests are made."""
    content = json.loads(file.read_bytes())
    del content["digest"]
    edit(content)
    file.write_bytes(canonical_json({**content, "digest": digest(content)}))


def record_of(file: Path) -> VersionRecord:
    """Parse a version record."""
    return VersionRecord.from_json(json.loads(file.read_bytes()), where=str(file))


def write_in_process(root: Path, writer: int, start: Any, results: Any) -> None:
    """Commit 8 slices, most of them of objects that lie there as garbage; puts the versions made."""
    catalog = open_catalog(root, mode="r+")
    start.wait()
    versions = []
    for step in range(8):
        with writing(root, f"writer {writer}"):
            record = slice_record(catalog, f"w{writer}-{step}")
            time.sleep(0.005)  # in which a collector would take it
            catalog = commit(catalog, Change(slices={record.slice_id: record}), message="")
        versions.append(catalog.version)
        with writing(root, f"writer {writer}"):
            slice_record(catalog, f"w{1 - writer}-{step + 1}")  # garbage, until the other writer names it
        time.sleep(0.02)
    results.put(versions)


def collect_in_process(root: Path, start: Any, end: Any, results: Any) -> None:
    """Collect without grace until told to end; puts how often it could, how often not, and how much went."""
    catalog = open_catalog(root, mode="r+")
    start.wait()
    done = refused = n_objects = 0
    while not end.is_set():
        try:
            n_objects += len(gc(catalog, grace_hours=0).objects)
            done += 1
        except ConflictError:
            refused += 1
        time.sleep(0.03)  # a writer that waits looks several times a second
    results.put((done, refused, n_objects))
