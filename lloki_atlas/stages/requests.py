"""What ingest was asked for, as a digest: the same request of the same bytes needs no parsing to be known again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lloki_atlas.config import digest
from lloki_atlas.stages.genes import tables_digest
from lloki_atlas.stages.source_files import checked_path
from lloki_atlas.stages.vendors import find_vendor
from lloki_atlas.store.objects import file_digests

# name in the lineage of a slice's receipt
REQUEST = "request"


def request_digest(source_digest: str, options: Mapping[str, Any], *, version: int, tile_cells: int) -> str:
    """Digest of everything that decides which slice is made of a source, or whether it is refused.

    Parameters
    ----------
    source_digest
        Digest of the source's bytes.
    options
        Keyword arguments of `ingest` that say how it is read.
    version
        Of the ingest stage.
    tile_cells
        Cells of a tile.
    """
    gene_map, label_key = options.get("gene_map"), options.get("label_key")
    # one slice may be asked for in several ways; an unknown one is parsed, which is slow and no more
    content = {
        **{name: str(value) for name, value in options.items() if value is not None},
        "label_key": [label_key] if isinstance(label_key, str) else list(label_key or ()),
        "gene_map": None if gene_map is None else _file_digest(Path(gene_map)),
    }
    return digest(
        {
            "source": source_digest,
            "version": version,
            "tile_cells": tile_cells,
            "gene_tables": tables_digest(),
            "options": content,
        }
    )


def source_digest(path: Path) -> str:
    """Digest of a source on disk without reading what is in it: the one that `open_source` finds."""
    # a pipe would be waited for
    path = checked_path(path)
    if not path.is_dir():
        return _file_digest(path)
    vendor = None if (path / "tables").is_dir() else find_vendor(path)
    if vendor is not None:
        return digest({name: _file_digest(file) for name, file in sorted(vendor.files.items())})
    return digest(file_digests(path))


def _file_digest(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
