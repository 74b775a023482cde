"""Write an h5ad block by block, in the layout that anndata reads, with the memory of one block."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

_TEXT = h5py.string_dtype("utf-8")
_CHUNK = 65536
_CHUNK_ROWS = 8192


@dataclass(frozen=True)
class Block:
    """Consecutive cells of a file.

    counts : (n, n_genes) integers; names : n cell names; columns : obs columns, codes for categorical ones;
    coordinates : (n, 2) float32, micrometre, or None
    """

    counts: np.ndarray
    names: list[str]
    columns: dict[str, np.ndarray]
    coordinates: np.ndarray | None

    def __post_init__(self) -> None:
        lengths = {len(self.counts), len(self.names), *(len(column) for column in self.columns.values())}
        if self.coordinates is not None:
            lengths.add(len(self.coordinates))
        assert len(lengths) == 1, f"a block's parts have different lengths: {sorted(lengths)}"


def write_h5ad(
    path: Path,
    blocks: Iterable[Block],
    *,
    n_cells: int,
    symbols: tuple[str, ...],
    categories: dict[str, tuple[str, ...]],
    numbers: tuple[str, ...] = (),
    spatial: bool = True,
    source: dict[str, str | float],
) -> None:
    """Write blocks of cells as one h5ad; the file appears at `path` whole or not at all.

    Parameters
    ----------
    path
        The file, replaced if it exists.
    blocks
        `n_cells` cells in all; taken one at a time.
    symbols
        Gene symbols, `var_names`.
    categories, numbers
        Categorical obs columns with their categories, and float32 ones.
    spatial
        Whether blocks have coordinates, written to `obsm["spatial"]`.
    source
        What goes to `uns["source"]`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with h5py.File(temporary, "w") as file:
            _create(file, n_cells, symbols, categories, numbers, spatial=spatial, source=source)
            filled = 0
            for block in blocks:
                _append(file, block, start=filled)
                filled += len(block.names)
            assert filled == n_cells, f"{filled} cells were given for {n_cells}"
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _create(
    file: Any,
    n_cells: int,
    symbols: tuple[str, ...],
    categories: dict[str, tuple[str, ...]],
    numbers: tuple[str, ...],
    *,
    spatial: bool,
    source: dict[str, str | float],
) -> None:
    _encode(file, "anndata", "0.1.0")
    for name in ("layers", "obsm", "obsp", "uns", "varm", "varp"):
        _group(file, name, "dict", "0.1.0")
    matrix = _group(file, "X", "csr_matrix", "0.1.0")
    matrix.attrs["shape"] = np.array([n_cells, len(symbols)], dtype=np.int64)
    matrix.create_dataset("data", (0,), np.float32, maxshape=(None,), chunks=(_CHUNK,), compression=1, shuffle=True)
    matrix.create_dataset("indices", (0,), np.int32, maxshape=(None,), chunks=(_CHUNK,), compression=1, shuffle=True)
    matrix.create_dataset("indptr", data=np.zeros(1, np.int64), maxshape=(None,), chunks=(_CHUNK_ROWS,))

    _text_array(_frame(file, "var", ()), "_index", symbols)
    obs = _frame(file, "obs", (*categories, *numbers))
    _encode(obs.create_dataset("_index", (n_cells,), _TEXT, chunks=(min(n_cells, _CHUNK_ROWS),)), "string-array")
    for name, values in categories.items():
        column = _group(obs, name, "categorical", "0.2.0")
        column.attrs["ordered"] = np.bool_(False)
        _text_array(column, "categories", values)
        _encode(_rows(column, "codes", (n_cells,), np.int8), "array")
    for name in numbers:
        _encode(_rows(obs, name, (n_cells,), np.float32), "array")
    if spatial:
        _encode(_rows(file["obsm"], "spatial", (n_cells, 2), np.float32), "array")
    notes = _group(file["uns"], "source", "dict", "0.1.0")
    for name, value in source.items():
        if isinstance(value, str):
            _encode(notes.create_dataset(name, data=value, dtype=_TEXT), "string")
        else:
            _encode(notes.create_dataset(name, data=float(value)), "numeric-scalar")


def _append(file: Any, block: Block, *, start: int) -> None:
    stop = start + len(block.names)
    rows, columns = np.nonzero(block.counts)
    matrix = file["X"]
    n_stored = matrix["data"].shape[0]
    for name, values in (("data", block.counts[rows, columns]), ("indices", columns)):
        matrix[name].resize((n_stored + rows.size,))
        matrix[name][n_stored:] = values.astype(matrix[name].dtype)
    matrix["indptr"].resize((stop + 1,))
    matrix["indptr"][start + 1 :] = n_stored + np.cumsum(np.bincount(rows, minlength=stop - start))
    obs = file["obs"]
    obs["_index"][start:stop] = np.array(block.names, dtype=object)
    for name, values in block.columns.items():
        target = obs[name]
        (target["codes"] if isinstance(target, h5py.Group) else target)[start:stop] = values
    if block.coordinates is not None:
        file["obsm/spatial"][start:stop] = block.coordinates


def _encode(item: Any, kind: str, version: str = "0.2.0") -> Any:
    item.attrs["encoding-type"] = kind
    item.attrs["encoding-version"] = version
    return item


def _group(parent: Any, name: str, kind: str, version: str) -> Any:
    return _encode(parent.create_group(name), kind, version)


def _frame(file: Any, name: str, columns: tuple[str, ...]) -> Any:
    frame = _group(file, name, "dataframe", "0.2.0")
    frame.attrs["_index"] = "_index"
    # text also where there is no column: an empty float array would not be read back as names
    frame.attrs["column-order"] = np.array(columns, dtype=_TEXT)
    return frame


def _text_array(parent: Any, name: str, values: tuple[str, ...]) -> None:
    _encode(parent.create_dataset(name, data=np.array(values, dtype=object), dtype=_TEXT), "string-array")


def _rows(parent: Any, name: str, shape: tuple[int, ...], dtype: type) -> Any:
    chunks = (min(shape[0], _CHUNK_ROWS), *shape[1:])
    return parent.create_dataset(name, shape, dtype, chunks=chunks, compression=1, shuffle=True)
