"""Digests of whole folders, to show that nothing in them was touched."""

from __future__ import annotations

import hashlib
from pathlib import Path


def folder_digest(path: str | Path) -> str:
    """Digest the relative path of every file and folder under `path`, and every file's bytes."""
    path = Path(path)
    whole = hashlib.sha256()
    for entry in sorted(path.rglob("*")):
        content = entry.read_bytes() if entry.is_file() else b"folder"
        line = f"{entry.relative_to(path).as_posix()}\0{hashlib.sha256(content).hexdigest()}\n"
        whole.update(line.encode())
    return whole.hexdigest()
