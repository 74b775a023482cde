"""SliceStore: the cells of one slice in spatial order, read by row range from its SpatialData store.

Only the table is read, with zarr alone; spatialdata's own reader would load all of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import zarr
from scipy import sparse

from lloki_atlas.errors import FormatError, InputError, NotFoundError
from lloki_atlas.store.arrays import read_values
from lloki_atlas.store.buckets import storage_errors
from lloki_atlas.store.chunks import zarr_store
from lloki_atlas.store.objects import require_whole
from lloki_atlas.store.places import Place, place

TABLE = "tables/table"


@dataclass(frozen=True)
class Tile:
    """Rows `start` to `stop` of a slice, neighbours in space; `bounds` is (xmin, ymin, xmax, ymax) in micrometre."""

    index: int
    start: int
    stop: int
    bounds: tuple[float, float, float, float]

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise FormatError(f"tile {self.index} has rows {self.start} to {self.stop}: it has to hold a cell")


@dataclass(frozen=True, init=False)
class SliceStore:
    """One slice on disk, opened lazily and read-only; cheap to make and to pickle.

    Raises
    ------
    NotFoundError
        On first use, when there is no store at `path`.
    FormatError
        On first use, when its table is not the one that ingest writes.
    """

    path: Place

    def __init__(self, path: str | Place) -> None:
        object.__setattr__(self, "path", place(path))

    def __reduce__(self) -> tuple[type[SliceStore], tuple[Place]]:
        # what is cached stays here
        return type(self), (self.path,)

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self._shape[0]

    @property
    def n_genes(self) -> int:
        """Number of genes of the panel."""
        return self._shape[1]

    @property
    def n_counts(self) -> int:
        """Number of counts that are not zero."""
        return int(self._member("X/data").shape[0])

    @property
    def tile_cells(self) -> int:
        """Cells of a tile, but for the last one."""
        return int(self.metadata["tile_cells"])

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What ingest recorded: slice_id, technology, organism, units, label columns, tiles, source, gene report."""
        try:
            content = json.loads(str(self._read("uns/lloki_atlas", ())))
        except ValueError as error:
            raise FormatError(f"the metadata of {self.path} are garbled: ingest the slice again") from error
        if not isinstance(content, dict):
            raise FormatError(f"the metadata of {self.path} are not a table: ingest the slice again")
        return content

    @cached_property
    def genes(self) -> tuple[str, ...]:
        """Gene symbols as the source wrote them."""
        return tuple(str(name) for name in self._read("var/" + self._index_name("var")))

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        """Canonical symbol of each gene; "" where there is none."""
        column = self._column("var", "symbol", 0, self.n_genes)
        return tuple("" if pd.isna(name) else str(name) for name in column)

    @cached_property
    def mapping(self) -> tuple[str, ...]:
        """How ingest found the canonical symbol of each gene, such as "control" for a probe that is no gene."""
        return tuple(str(how) for how in self._column("var", "mapping", 0, self.n_genes))

    def tiles(self) -> tuple[Tile, ...]:
        """Return the tiles, which cover the rows in order."""
        size, bounds = self.tile_cells, self.metadata["tile_bounds"]
        starts = range(0, self.n_cells, size)
        if len(bounds) != len(starts):
            raise FormatError(f"{self.path} has {len(bounds)} tile bounds for {len(starts)} tiles: ingest it again")
        return tuple(
            Tile(index, start, min(start + size, self.n_cells), (float(b[0]), float(b[1]), float(b[2]), float(b[3])))
            for index, (start, b) in enumerate(zip(starts, bounds, strict=True))
        )

    def counts(self, start: int = 0, stop: int | None = None) -> sparse.csr_matrix:
        """Read counts of rows `start` to `stop`: (stop - start, n_genes) CSR float32."""
        start, stop = self._range(start, stop)
        indptr = self._read("X/indptr", slice(start, stop + 1)).astype(np.int64)
        first, last = int(indptr[0]), int(indptr[-1])
        data = self._read("X/data", slice(first, last)).astype(np.float32, copy=False)
        indices = self._read("X/indices", slice(first, last))
        if len(data) != last - first or len(indices) != last - first:
            raise FormatError(f"the counts of {self.path} end before row {stop}: restore it or ingest the slice again")
        return sparse.csr_matrix((data, indices, indptr - first), shape=(stop - start, self.n_genes))

    def coordinates(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read positions of rows `start` to `stop`: (stop - start, 2) float32, micrometre."""
        start, stop = self._range(start, stop)
        return np.ascontiguousarray(self._read("obsm/spatial", slice(start, stop))[:, :2], dtype=np.float32)

    def obs(self, columns: Sequence[str] | None = None, start: int = 0, stop: int | None = None) -> pd.DataFrame:
        """Read columns of rows `start` to `stop`, all columns unless named; the index is the cells' names.

        Raises
        ------
        NotFoundError
            If a column of that name does not exist.
        """
        start, stop = self._range(start, stop)
        known = [str(name) for name in self._member("obs").attrs["column-order"]]
        wanted = known if columns is None else list(columns)
        for name in wanted:
            if name not in known:
                raise NotFoundError(f"there is no column '{name}' in {self.path}: choose from {', '.join(known)}")
        index = pd.Index(self._read("obs/" + self._index_name("obs"), slice(start, stop)), dtype=object)
        return pd.DataFrame({name: self._column("obs", name, start, stop) for name in wanted}, index=index)

    @cached_property
    def _table(self) -> zarr.Group:
        if not (self.path / "zarr.json").is_file():
            raise NotFoundError(f"there is no slice store at {self.path}: ingest the slice")
        require_whole(self.path)
        try:
            with storage_errors(self.path):
                return zarr.open_group(
                    zarr_store(self.path), path=TABLE, mode="r", zarr_format=3, use_consolidated=False
                )
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise FormatError(f"{self.path} has no readable table '{TABLE}': ingest the slice again") from error

    @cached_property
    def _arrays(self) -> dict[str, zarr.Array]:
        return {}

    @cached_property
    def _shape(self) -> tuple[int, int]:
        attributes = self._member("X").attrs
        if attributes.get("encoding-type") != "csr_matrix":
            raise FormatError(f"the counts of {self.path} are not stored as CSR: ingest the slice again")
        n_cells, n_genes = attributes["shape"]
        return int(n_cells), int(n_genes)

    def _member(self, name: str) -> Any:
        table = self._table
        try:
            with storage_errors(self.path):
                return table[name]
        except (KeyError, ValueError) as error:
            raise FormatError(f"{self.path} has no '{TABLE}/{name}': ingest the slice again") from error

    def _read(self, name: str, selection: Any = slice(None)) -> np.ndarray:
        if name not in self._arrays:
            self._arrays[name] = self._member(name)
        return read_values(self._arrays[name], selection)

    def _index_name(self, frame: str) -> str:
        return str(self._member(frame).attrs["_index"])

    def _range(self, start: int, stop: int | None) -> tuple[int, int]:
        stop = self.n_cells if stop is None else stop
        if not 0 <= start <= stop <= self.n_cells:
            raise InputError(f"rows {start} to {stop} lie outside {self.path}: it has {self.n_cells} cells")
        return int(start), int(stop)

    def _column(self, frame: str, name: str, start: int, stop: int) -> Any:
        """Read rows of one column of `obs` or `var`, by anndata's encoding."""
        place = f"{frame}/{name}"
        encoding = self._member(place).attrs.get("encoding-type", "array")
        rows = slice(start, stop)
        if encoding in ("array", "string-array"):
            return self._read(place, rows)
        if encoding == "categorical":
            codes, categories = self._read(f"{place}/codes", rows), pd.Index(self._read(f"{place}/categories"))
            ordered = bool(self._member(place).attrs.get("ordered", False))
            try:
                return pd.Categorical.from_codes(codes, categories=categories, ordered=ordered)
            except ValueError as error:
                raise FormatError(f"column '{place}' of {self.path} is damaged: ingest the slice again") from error
        if encoding in ("nullable-integer", "nullable-boolean", "nullable-string-array"):
            values, missing = self._read(f"{place}/values", rows), self._read(f"{place}/mask", rows)
            if encoding == "nullable-integer":
                return pd.arrays.IntegerArray(values, missing)
            if encoding == "nullable-boolean":
                return pd.arrays.BooleanArray(values, missing)
            text = values.astype(object)
            text[missing] = None
            return pd.array(text, dtype="string")
        raise FormatError(f"column '{place}' of {self.path} has the unknown encoding '{encoding}': ingest it again")
