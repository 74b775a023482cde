"""Making a finished folder an object: by one rename on a file system, object by object in a bucket; the receipt last.

Calling again is harmless whatever happened before: an object that is there stays as it is.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from lloki_atlas.config import canonical_json
from lloki_atlas.errors import NotFoundError
from lloki_atlas.store.durable import (
    create_exclusive,
    ensure_folder,
    files_below,
    remove_tree,
    sync_file,
    sync_folder,
    write_durable,
)
from lloki_atlas.store.objects import (
    Receipt,
    file_digest,
    file_digests,
    is_complete,
    object_name,
    read_receipt,
    receipt_path,
)
from lloki_atlas.store.places import ObjectPlace, Place, place

# zarr writes each key under such a name and renames it; a killed writer leaves it behind
_LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.(partial|tmp)$")
# requests to a bucket at once
_REQUESTS = 8


def publish(
    staging: str | Place,
    final: str | Place,
    *,
    lineage: Mapping[str, Any],
    written: Mapping[str, list[Any]] | None = None,
) -> Receipt:
    """Make a finished folder an object, durably, then write its receipt.

    An object that is there already stays as it is and `staging` is dropped; one whose writer died before the receipt
    gets it.

    Parameters
    ----------
    staging
        The finished folder: on the same file system as `final`; for one in a bucket, in that bucket or a local folder.
    final
        Where the object lives; the receipt is `<final>.json`.
    lineage
        What made it: stage, its version, parameters, keys of the inputs (JSON-like).
    written
        Digests of files whose bytes are in storage already, as `file_digests` has them; they are not read again.

    Returns
    -------
    Receipt
        The stored receipt, that of the first publisher.

    Raises
    ------
    NotFoundError
        If neither folder exists.
    StorageError
        If a bucket cannot be reached.
    """
    staging, final = place(staging), place(final)
    if not is_complete(final):
        if isinstance(final, ObjectPlace):
            files = _put_in_place(staging, final, written or {})
        else:
            files = _move_in_place(Path(str(staging)), final, written or {})
        receipt = Receipt(final.name, dict(lineage), file_digests(final) if files is None else files)
        data = canonical_json(receipt.to_json())
        if not create_exclusive(receipt_path(final), data) and files not in (None, read_receipt(final).files):
            # the folder of an old receipt had been deleted: what is there now is what the receipt has to say
            write_durable(receipt_path(final), data)
    remove_tree(staging)
    return read_receipt(final)


@contextmanager
def own_staging(staging: str | Place) -> Iterator[Path]:
    """The name of a local folder of one's own to fill and publish; it is gone at the end.

    Beside `staging`, where a rename can take it to its place, or among the machine's temporary files for a bucket.
    """
    staging = place(staging)
    name = f"{staging.name}-{uuid4().hex[:8]}"
    if isinstance(staging, ObjectPlace):
        with tempfile.TemporaryDirectory(prefix="lloki-atlas-") as folder:
            yield Path(folder) / name
        return
    own = staging.with_name(name)
    own.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _move_in_place(staging: Path, final: Path, written: Mapping[str, list[Any]]) -> dict[str, list[Any]] | None:
    """Sync and rename; the digests, or None when a folder is in place already: a rename made it, so it is whole."""
    if _holds_files(final):
        return None
    _require(_holds_files(staging), staging, final)
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
    for relative in sorted(files_below(staging)):
        if _LEFTOVER.search(relative):
            (staging / relative).unlink(missing_ok=True)
            continue
        files[relative] = written.get(relative) or file_digest(staging / relative)
        if relative not in written:
            sync_file(staging / relative)
    for folder, _, _ in os.walk(staging, topdown=False):
        sync_folder(Path(folder))
    return files


def _put_in_place(staging: Place, final: ObjectPlace, written: Mapping[str, list[Any]]) -> dict[str, list[Any]] | None:
    """Store every file of the folder; the digests, or None when another publisher came first.

    Files that are in place without a receipt prove nothing, their writer may have died half-way: they are stored again.
    """

    def put(relative: str) -> list[Any]:
        source = staging / relative
        if isinstance(source, ObjectPlace):
            entry = written.get(relative) or file_digest(source)
            source.copy_to(final / relative)
            return entry
        content = source.read_bytes()
        (final / relative).write_bytes(content)
        return [len(content), hashlib.sha256(content).hexdigest()]

    names = sorted(name for name in _listed(staging) if not _LEFTOVER.search(name))
    if not names and is_complete(final):
        return None
    _require(bool(names), staging, final)
    try:
        with ThreadPoolExecutor(_REQUESTS) as pool:
            files = dict(zip(names, pool.map(put, names), strict=True))
    except FileNotFoundError:
        # the first publisher drops the staging folder
        if not is_complete(final):
            raise
        return None
    for stray in set(final.files()) - set(files):
        (final / stray).unlink(missing_ok=True)
    return files


def _listed(folder: Place) -> list[str]:
    return list(files_below(folder)) if folder.is_dir() else []


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _require(present: bool, staging: Place, final: Place) -> None:
    if not present:
        raise NotFoundError(f"there is nothing to publish as {object_name(final)}: {staging} does not exist")
