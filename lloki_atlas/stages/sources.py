"""Reading a source: h5ad, AnnData, SpatialData or a vendor's output folder; always into the same plain table.

Coordinates stay in the source's unit here, and nothing is judged but whether the parts that were asked for exist.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from lloki_atlas.config import digest
from lloki_atlas.errors import FormatError, InputError
from lloki_atlas.stages.checks import check_counts
from lloki_atlas.stages.elements import elements_digest, region_centroids
from lloki_atlas.stages.matrices import check_numbers, read_counts
from lloki_atlas.stages.parts import Parts
from lloki_atlas.stages.readers import opened_parts
from lloki_atlas.stages.units import coordinate_scale
from lloki_atlas.store.objects import file_digests


@dataclass(frozen=True)
class SourceTable:
    """One slice, or one reference, as its source has it.

    Parameters
    ----------
    counts
        (n_cells, n_genes) CSR float32.
    symbols
        Gene symbols as published.
    obs
        Columns of the cells; the index is the cells' names.
    coordinates
        (n_cells, 2) float64 in the source's unit; None where none were asked for.
    rows
        (n_cells,) int64, row of each cell in the source.
    description
        What to call the source in messages.
    origin
        Where it came from: kind, path, layer, keys (JSON-like).
    digest
        Digest of the file, of the folder, or of the arrays in memory.
    elements
        Path or object that holds the other elements of a SpatialData source; None for other sources.
    regions
        `region`, `region_key` and `instance_key` of a SpatialData table that annotates shapes or labels.
    unit
        What the coordinates are in, where the source says it, and the usual micrometres per unit.
    """

    counts: csr_matrix
    symbols: tuple[str, ...]
    obs: pd.DataFrame
    coordinates: np.ndarray | None
    rows: np.ndarray
    description: str
    origin: Mapping[str, Any]
    digest: str
    elements: Any = None
    regions: Mapping[str, Any] = field(default_factory=dict)
    unit: tuple[str, float] | None = None

    def __post_init__(self) -> None:
        n_cells, n_genes = self.counts.shape
        placed = n_cells if self.coordinates is None else len(self.coordinates)
        if not n_cells == len(self.obs) == len(self.rows) == placed:
            raise InputError(f"counts, obs and coordinates of {self.description} differ in the number of cells")
        if len(self.symbols) != n_genes:
            raise InputError(f"{self.description} has {len(self.symbols)} symbols for {n_genes} genes")

    @property
    def cells(self) -> tuple[str, ...]:
        """Names of the cells."""
        return tuple(self.obs.index)

    def require_counts(self, *, accept_normalized: bool = False) -> None:
        """Refuse a table whose values cannot be counts."""
        check_counts(self.counts, where=self.description, accept_normalized=accept_normalized)

    def scale(self, coordinate_unit: str, *, um_per_unit: float | None = None) -> tuple[str, float]:
        """Resolve the unit of the coordinates; a source that says its own is not read in another one.

        Parameters
        ----------
        coordinate_unit, um_per_unit
            As for `coordinate_scale`; the micrometres per pixel may be left out where the source has usual ones.

        Returns
        -------
        The unit's full name, and micrometres per unit.

        Raises
        ------
        InputError
            If the unit cannot be used, or the source is in another one.
        """
        if self.unit is None:
            return coordinate_scale(coordinate_unit, um_per_unit=um_per_unit)
        own, usual = self.unit
        if um_per_unit is None and own == "pixel" and str(coordinate_unit).strip().lower() in ("pixel", "pixels", "px"):
            um_per_unit = usual
        unit, factor = coordinate_scale(coordinate_unit, um_per_unit=um_per_unit)
        if unit != own:
            raise InputError(f"the positions of {self.description} are in {own}, not in {unit}: say {own}")
        return unit, factor


def open_source(
    source: Any,
    *,
    layer: str | None = None,
    spatial_key: str | None = "spatial",
    slice_key: str | None = None,
    slice_value: Any = None,
    table: str | None = None,
) -> SourceTable:
    """Read one table; a dense matrix is read a block of rows at a time.

    Parameters
    ----------
    source
        Path of an h5ad file, of a SpatialData store or of an output folder of Xenium, MERSCOPE or CosMx; an AnnData,
        or a SpatialData.
    layer
        Layer that holds the counts; `X` when None.
    spatial_key
        Key of `obsm` with the coordinates, None when there are none to read. A SpatialData table without that key
        takes the centroids of the shapes that it annotates.
    slice_key, slice_value
        Read only the cells whose `obs[slice_key]` is this value (compared as text).
    table
        Name of the table of a SpatialData source; not needed when it has one table, or one named `table`.

    Raises
    ------
    InputError
        If the source cannot be read, or lacks a part that was asked for.
    """
    if (slice_key is None) != (slice_value is None):
        raise InputError("slice_key and slice_value go together: give both, or neither")
    with opened_parts(source, table=table) as parts:
        rows = _section_rows(parts, slice_key, slice_value)
        counts = read_counts(_matrix(parts, layer), rows, where=parts.description)
        obs = parts.obs if rows is None else parts.obs.iloc[rows]
        obs = obs.set_axis(pd.Index(obs.index.astype(str), dtype=object, name=None))
        coordinates = None if spatial_key is None else _coordinates(parts, spatial_key, obs, rows)
        opened = SourceTable(
            counts=counts,
            symbols=tuple(str(symbol) for symbol in parts.var_names),
            obs=obs,
            coordinates=coordinates,
            rows=np.arange(len(obs), dtype=np.int64) if rows is None else rows,
            description=parts.description,
            origin={
                **parts.origin,
                "layer": layer,
                "spatial_key": spatial_key,
                "slice_key": slice_key,
                "slice_value": None if slice_value is None else str(slice_value),
            },
            digest="",
            elements=parts.elements,
            regions=parts.regions,
            unit=parts.unit,
        )
        object.__setattr__(opened, "digest", _source_digest(opened, parts.files))
    return opened


def section_values(source: Any, slice_key: str, *, table: str | None = None) -> list[str]:
    """List the values of `obs[slice_key]` as text, in order of appearance; cells without a value are left out."""
    with opened_parts(source, table=table) as parts:
        return list(dict.fromkeys(_section_column(parts, slice_key).dropna()))


def _section_rows(parts: Parts, slice_key: str | None, slice_value: Any) -> np.ndarray | None:
    if slice_key is None:
        return None
    column = _section_column(parts, slice_key)
    rows = np.flatnonzero((column == str(slice_value)).to_numpy(dtype=bool, na_value=False))
    if not len(rows):
        known = ", ".join(dict.fromkeys(column.dropna()))
        raise InputError(f"no cell of {parts.description} has {slice_key} '{slice_value}': choose from {known}")
    return rows.astype(np.int64)


def _section_column(parts: Parts, slice_key: str) -> pd.Series:
    if slice_key not in parts.obs:
        known = ", ".join(str(name) for name in parts.obs.columns)
        raise InputError(f"{parts.description} has no obs column '{slice_key}': choose slice_key from {known}")
    column = parts.obs[slice_key]
    return column.astype(str).astype(object).where(column.notna().to_numpy(), None)


def _matrix(parts: Parts, layer: str | None) -> Any:
    if layer is not None:
        if layer not in parts.layers:
            known = ", ".join(sorted(parts.layers)) or "none, leave layer out"
            raise InputError(f"{parts.description} has no layer '{layer}': choose from {known}")
    elif parts.X is None:
        known = ", ".join(sorted(parts.layers)) or "none"
        raise InputError(f"{parts.description} has no X: pass the layer that holds the counts ({known})")
    matrix = parts.X if layer is None else parts.layers[layer]
    check_numbers(getattr(matrix, "dtype", None), where=parts.description)
    shape, expected = _shape(matrix), (len(parts.obs), len(parts.var_names))
    if shape is not None and shape != expected:
        raise InputError(
            f"the counts of {parts.description} are {shape[0]} × {shape[1]} for {expected[0]} cells and {expected[1]} "
            "genes: copy or export it again"
        )
    return matrix


def _shape(matrix: Any) -> tuple[int, ...] | None:
    """Rows and columns of a matrix in memory or on disk; None where it says neither."""
    shape = getattr(matrix, "shape", None)
    if shape is None and hasattr(matrix, "attrs"):
        shape = matrix.attrs.get("shape", matrix.attrs.get("h5sparse_shape"))
    shape = None if shape is None else tuple(int(length) for length in shape)
    return shape if shape is None or len(shape) == 2 else (*shape, 1, 1)[:2]


def _coordinates(parts: Parts, spatial_key: str, obs: pd.DataFrame, rows: np.ndarray | None) -> np.ndarray:
    if spatial_key in parts.obsm:
        item = parts.read(parts.obsm[spatial_key])
        values = np.asarray(item.compute(scheduler="synchronous") if hasattr(item, "compute") else item)
        values = values if rows is None else values[rows]
    elif parts.elements is not None and parts.regions:
        values = region_centroids(parts.elements, obs, regions=parts.regions, where=parts.description)
    else:
        known = ", ".join(sorted(parts.obsm)) or "none"
        raise InputError(
            f"{parts.description} has no obsm['{spatial_key}']: put an (n_cells, 2) array of positions there, "
            f"or name another key with spatial_key= (there is {known})"
        )
    return _plane(values, where=f"obsm['{spatial_key}'] of {parts.description}")


def _plane(values: np.ndarray, *, where: str) -> np.ndarray:
    """Positions in a plane; a third column is left out only where it is constant."""
    if values.ndim != 2 or values.shape[1] not in (2, 3):
        raise InputError(f"{where} has shape {values.shape}: give two columns, x and y")
    try:
        plane = np.ascontiguousarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{where} does not hold numbers: give two columns, x and y") from None
    if plane.shape[1] == 3:
        if len(plane) and not (plane[:, 2] == plane[0, 2]).all():
            raise InputError(f"{where} has three columns: choose the two that lie in the section, and pass them alone")
        plane = np.ascontiguousarray(plane[:, :2])
    return plane


def _source_digest(opened: SourceTable, files: Mapping[str, Path]) -> str:
    path = opened.origin["path"]
    if path is None:
        return _content_digest(opened)
    if files:
        return digest({name: _file_digest(file) for name, file in sorted(files.items())})
    if Path(path).is_dir():
        try:
            return digest(file_digests(path))
        except FormatError as error:
            raise InputError(f"{path} cannot be read whole: copy it without links ({error})") from error
    return _file_digest(Path(path))


def _file_digest(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _content_digest(opened: SourceTable) -> str:
    """Digest what is in memory: a csr, a csc and a dense matrix of the same counts have the same one."""
    state = hashlib.sha256()
    for values in (opened.counts.indptr.astype(np.int64), opened.counts.indices.astype(np.int64), opened.counts.data):
        state.update(np.ascontiguousarray(values).data)
    if opened.coordinates is not None:
        state.update(np.ascontiguousarray(opened.coordinates).data)
    state.update(np.ascontiguousarray(opened.rows).data)
    columns = {str(name): opened.obs[name].astype(str).tolist() for name in opened.obs}
    state.update(digest([opened.symbols, opened.cells, columns]).encode())
    if opened.elements is not None:
        state.update(elements_digest(opened.elements).encode())
    return state.hexdigest()
