"""Objects of a bucket as local folders, for what reads plain files: fetched once, checked, kept.

They are kept under `LLOKI_ATLAS_CACHE`, or else the user's cache folder. Objects never change, so nothing there is ever
out of date, and all of it may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path

from lloki_atlas.config import digest
from lloki_atlas.errors import FormatError
from lloki_atlas.store.objects import object_name, read_receipt
from lloki_atlas.store.places import ObjectPlace, Place, place


def local_folder(path: str | Place) -> Path:
    """Return the object at `path` as a local folder: itself, or a copy of what is in a bucket.

    Objects of one kind are copied side by side, as they lie in the catalog.

    Raises
    ------
    NotFoundError
        If it has no receipt.
    FormatError
        If a file is not what the receipt says.
    """
    source = place(path)
    if isinstance(source, Path):
        return source
    folder = _cache() / digest(str(source.parent)) / source.name
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{source.name}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        for file, entry in read_receipt(source).files.items():
            content = (source / file).read_bytes()
            if [len(content), hashlib.sha256(content).hexdigest()] != list(entry):
                raise FormatError(f"file {file} of {object_name(source)} was altered: verify the catalog")
            target = partial / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        os.rename(partial, folder)  # noqa: PTH104
    except OSError:
        if not folder.is_dir():  # another process was first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def local_file(path: str | Place) -> Path:
    """Where this machine keeps a file of its own under the name `path`: there, or in the cache for a bucket."""
    file = place(path)
    if isinstance(file, ObjectPlace):
        return _cache() / digest(str(file.parent)) / file.name
    return file


def _cache() -> Path:
    chosen = os.environ.get("LLOKI_ATLAS_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lloki-atlas"
