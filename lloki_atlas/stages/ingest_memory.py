"""How large a source is and what it takes to ingest it, known before any count is read: bytes above the process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import h5py

from lloki_atlas.errors import InputError
from lloki_atlas.stages.vendors import find_vendor

# measured on slices of 1e5 to 4e5 cells: 27 a count as CSR or CSC, 400 a cell and 25 a column
_ENTRY_BYTES = 32
_CELL_BYTES = 512
_COLUMN_BYTES = 96  # text
_BASE_BYTES = 160 * 2**20  # libraries, a compressed chunk and what is made of it
# of a vendor's tables, which are text or compressed
_FILE_FACTOR = 16


class SourceSize(NamedTuple):
    """Cells, stored counts at most, and columns of `obs`; `n_bytes` of files of another kind."""

    n_cells: int = 0
    n_entries: int = 0
    n_columns: int = 0
    n_bytes: int = 0


def source_size(source: str | Path, *, layer: str | None = None, table: str | None = None) -> SourceSize:
    """Read the size of a source from its metadata.

    Parameters
    ----------
    source
        Path of an h5ad file, a SpatialData store or a vendor's folder.
    layer, table
        As for `ingest`.

    Returns
    -------
    SourceSize
        Zeros where it cannot be told: ingesting the source will say what is the matter. Of a dense matrix every value
        counts, since how many are not zero is not known.
    """
    path = Path(source).expanduser()
    try:
        if not path.is_dir():
            return _h5ad_size(path, layer)
        vendor = None if (path / "tables").is_dir() else find_vendor(path)
        if vendor is not None:
            return SourceSize(n_bytes=sum(file.stat().st_size for file in vendor.files.values()))
        return _zarr_size(path, layer, table)
    except (InputError, OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, StopIteration):
        return SourceSize()


def ingest_memory(size: SourceSize) -> int:
    """Projected peak of ingesting a source of that size, in bytes."""
    cells = size.n_cells * (_CELL_BYTES + size.n_columns * _COLUMN_BYTES)
    return size.n_entries * _ENTRY_BYTES + cells + size.n_bytes * _FILE_FACTOR + _BASE_BYTES


def _h5ad_size(path: Path, layer: str | None) -> SourceSize:
    with h5py.File(path, "r") as file:
        matrix = file["X"] if layer is None else file["layers"][layer]
        if isinstance(matrix, h5py.Dataset):
            n_cells, n_genes = matrix.shape
            n_entries = n_cells * n_genes
        else:
            n_cells, n_entries = matrix.attrs["shape"][0], matrix["data"].shape[0]
        return SourceSize(int(n_cells), int(n_entries), len(file["obs"].attrs.get("column-order", ())))


def _zarr_size(path: Path, layer: str | None, table: str | None) -> SourceSize:
    folder = path / "tables"
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    group = folder / (table or ("table" if "table" in names else names[0]))
    matrix = group / ("X" if layer is None else f"layers/{layer}")
    attributes, shape = _zarr_node(matrix)
    if shape is not None:
        n_cells, n_entries = shape[0], shape[0] * shape[1]
    else:
        n_cells, n_entries = attributes["shape"][0], (_zarr_node(matrix / "data")[1] or [0])[0]
    return SourceSize(int(n_cells), int(n_entries), len(_zarr_node(group / "obs")[0].get("column-order", ())))


def _zarr_node(folder: Path) -> tuple[dict[str, Any], list[int] | None]:
    """Attributes of a group or an array of Zarr v3 or v2, and the shape of an array."""
    if (folder / "zarr.json").is_file():
        content = json.loads((folder / "zarr.json").read_bytes())
        return content.get("attributes", {}), content.get("shape")
    attributes = folder / ".zattrs"
    array = folder / ".zarray"
    return (
        json.loads(attributes.read_bytes()) if attributes.is_file() else {},
        json.loads(array.read_bytes())["shape"] if array.is_file() else None,
    )
