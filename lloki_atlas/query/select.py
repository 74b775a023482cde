"""Select cells of a committed version, lazily: nothing but the columns of the filter is read until it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, vstack

from lloki_atlas.errors import InputError, NotFoundError
from lloki_atlas.query.where import Filter, parse_filter
from lloki_atlas.stages.lineage import expected_objects, stage_status
from lloki_atlas.store.arrays import read_rows
from lloki_atlas.store.catalog import Catalog
from lloki_atlas.store.records import SliceRecord
from lloki_atlas.store.slices import SliceStore

if TYPE_CHECKING:
    import xarray
    from anndata import AnnData

EMBEDDINGS = {"X_fp": ("embed", 512), "X_lloki": ("integrate", 128)}
SLICE_COLUMNS = ("slice_id", "technology", "organism")
OWN_COLUMNS = ("cell", *SLICE_COLUMNS, "x", "y")
Region = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class CellSelection:
    """Cells of one version, in order of slice id and of rows in the slice; made by `select_cells`.

    Parameters
    ----------
    catalog
        The version that is read.
    slices
        Slice ids, sorted.
    where
        The filter, or None.
    region
        (xmin, ymin, xmax, ymax) or a polygon (n, 2), µm, or None.
    """

    catalog: Catalog
    slices: tuple[str, ...]
    where: Filter | None = None
    region: Region | None = None

    @cached_property
    def rows(self) -> dict[str, np.ndarray]:
        """Rows per slice, ascending."""
        return {name: self._rows_of(name) for name in self.slices}

    @property
    def n_cells(self) -> int:
        """Number of selected cells."""
        return sum(len(rows) for rows in self.rows.values())

    def __len__(self) -> int:
        return self.n_cells

    def __repr__(self) -> str:
        return f"CellSelection of {self.n_cells} cells in {len(self.slices)} slices of version {self.catalog.version}"

    def to_dataframe(self) -> pd.DataFrame:
        """One row a cell: `cell`, `slice_id`, `technology`, `organism`, `x`, `y` (µm) and every label column."""
        return cells_table(self.catalog, self.rows)

    def embedding(self, name: str = "X_lloki") -> np.ndarray:
        """(n_cells, 128) or (n_cells, 512) float32; NaN where a cell has no (current) embedding."""
        size = embedding_size(name)
        parts = [_embedding_of(self.catalog, slice_id, name)[rows] for slice_id, rows in self.rows.items()]
        return np.concatenate(parts) if parts else np.zeros((0, size), dtype=np.float32)

    def iter_tiles(self, name: str = "X_lloki") -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield (slice id, rows, their embedding) for each tile that holds selected cells, one tile in memory."""
        for slice_id, rows in self.rows.items():
            for tile in SliceStore(_slice_path(self.catalog, slice_id)).tiles():
                inside = rows[(rows >= tile.start) & (rows < tile.stop)]
                if len(inside):
                    block = _embedding_of(self.catalog, slice_id, name, tile.start, tile.stop)
                    yield slice_id, inside, block[inside - tile.start]

    def to_anndata(self, *, counts: bool = False) -> AnnData:
        """Cells as AnnData: `obs`, `obsm["spatial"]` (µm), `obsm["X_fp"]`, `obsm["X_lloki"]`.

        Parameters
        ----------
        counts
            Fill `X` with counts over the union of the slices' canonical symbols (CSR float32; a gene that a slice does
            not measure is not stored). Without it `X` is empty.
        """
        from anndata import AnnData

        obs = self.to_dataframe()
        spatial = obs[["x", "y"]].to_numpy(dtype=np.float32)
        obs.index = pd.Index(obs["slice_id"].astype(str) + ":" + obs["cell"].astype(str))
        obs = obs.drop(columns=["x", "y"])
        X, symbols = self._counts() if counts else (None, [])
        return AnnData(
            X=X,
            obs=obs,
            var=pd.DataFrame(index=pd.Index(symbols, dtype=object)),
            obsm={"spatial": spatial, "X_fp": self.embedding("X_fp"), "X_lloki": self.embedding("X_lloki")},
            uns={"lloki_atlas": {"catalog": str(self.catalog.root), "version": self.catalog.version}},
        )

    def to_xarray(self) -> xarray.Dataset:
        """Cells as a Dataset: `X_fp`, `X_lloki`, `spatial` over `cell`, the columns of `obs` as coordinates.

        The column `cell` is called `name`. Missing text is empty, other missing values are NaN.
        """
        import xarray

        obs = self.to_dataframe()
        columns = {name: ("cell", _plain(obs[name])) for name in obs if name not in ("x", "y")}
        axis = np.array(["x", "y"], dtype=object)  # numpy's own text has no place in the Zarr v3 format
        return xarray.Dataset(
            {
                "X_fp": (("cell", "X_fp_dimension"), self.embedding("X_fp")),
                "X_lloki": (("cell", "X_lloki_dimension"), self.embedding("X_lloki")),
                "spatial": (("cell", "axis"), obs[["x", "y"]].to_numpy(dtype=np.float32), {"units": "micrometer"}),
            },
            coords={("name" if key == "cell" else key): value for key, value in columns.items()} | {"axis": axis},
            attrs={"catalog": str(self.catalog.root), "version": self.catalog.version},
        )

    def _rows_of(self, slice_id: str) -> np.ndarray:
        record = self.catalog.slice(slice_id)
        store = SliceStore(_slice_path(self.catalog, slice_id))
        keep = np.ones(record.n_cells, dtype=bool)
        if self.where is not None:
            keep &= self.where.mask(_filter_table(store, record, self.where.columns), record.n_cells)
        if self.region is not None:
            keep &= inside_region(store.coordinates(), self.region)
        return np.flatnonzero(keep)

    def _counts(self) -> tuple[csr_matrix, list[str]]:
        stores = {name: SliceStore(_slice_path(self.catalog, name)) for name in self.slices}
        symbols = sorted({symbol for store in stores.values() for symbol in store.symbols if symbol})
        position = {symbol: column for column, symbol in enumerate(symbols)}
        parts = [csr_matrix((0, len(symbols)), dtype=np.float32)]
        for name, rows in self.rows.items():
            mapped = [column for column, symbol in enumerate(stores[name].symbols) if symbol]
            block = csr_matrix(stores[name].counts()[rows][:, mapped])
            target = np.array([position[stores[name].symbols[column]] for column in mapped], dtype=np.int32)
            parts.append(csr_matrix((block.data, target[block.indices], block.indptr), shape=(len(rows), len(symbols))))
        return csr_matrix(vstack(parts, format="csr")), symbols


def select_cells(
    catalog: Catalog,
    *,
    where: str | None = None,
    region: Region | None = None,
    slices: Iterable[str] | None = None,
) -> CellSelection:
    """Select cells of the opened version.

    Parameters
    ----------
    catalog
        Any version.
    where
        Filter over `slice_id`, `technology`, `organism`, `cell`, `x`, `y` (µm) and the label columns, such as
        `technology != "osmFISH" and cell_type_coarse in ("Excitatory", "Inhibitory")`. In a slice that lacks a label
        column its value is missing.
    region
        A box (xmin, ymin, xmax, ymax) or a polygon (n, 2) in µm, in each slice's own coordinates.
    slices
        Slice ids; all slices when None.

    Returns
    -------
    A lazy selection.

    Raises
    ------
    InputError
        If the filter or the region cannot be read.
    NotFoundError
        If a slice or a column does not exist.
    """
    names = tuple(sorted(catalog.state.slices)) if slices is None else tuple(sorted(set(slices)))
    records = [catalog.slice(name) for name in names]
    parsed = None if where is None else parse_filter(where)
    if parsed is not None:
        known = {*OWN_COLUMNS, *(c for record in records for c in record.label_columns)}
        for column in parsed.columns:
            if column not in known:
                raise NotFoundError(f"no slice has a column '{column}': choose from {', '.join(sorted(known))}")
    if region is not None:
        inside_region(np.zeros((1, 2), dtype=np.float32), region)
    return CellSelection(catalog, names, parsed, region)


def cells_table(catalog: Catalog, rows: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """One row a cell, for some rows of some slices: names, technology, position (µm), labels."""
    labels = (label for name in rows for label in catalog.slice(name).label_columns)
    columns = list(dict.fromkeys([*OWN_COLUMNS, *labels]))
    parts = [_slice_table(catalog, name, chosen) for name, chosen in rows.items() if len(chosen)]
    if not parts:
        return pd.DataFrame({c: np.zeros(0, dtype=np.float32 if c in ("x", "y") else object) for c in columns})
    return pd.concat(parts, ignore_index=True).reindex(columns=columns)


def _slice_table(catalog: Catalog, slice_id: str, rows: np.ndarray) -> pd.DataFrame:
    record = catalog.slice(slice_id)
    store = SliceStore(_slice_path(catalog, slice_id))
    labels = store.obs(list(record.label_columns)).iloc[rows]
    coordinates = store.coordinates()[rows]
    frame = pd.DataFrame({"cell": labels.index.astype(str).to_numpy()})
    for column in SLICE_COLUMNS:
        frame[column] = getattr(record, column)
    frame["x"], frame["y"] = coordinates[:, 0], coordinates[:, 1]
    for column in labels.columns:
        if column in OWN_COLUMNS:
            continue  # as in a filter, what the catalog says of a cell goes before what its source said
        values = labels[column]
        frame[column] = values.to_numpy(dtype=object) if isinstance(values.dtype, pd.CategoricalDtype) else values.array
    return frame


def inside_region(coordinates: np.ndarray, region: Region) -> np.ndarray:
    """Tell which points (n, 2) lie in a box (4 numbers) or a polygon (m, 2), border included for boxes."""
    try:
        shape = np.asarray(region, dtype=np.float64)
    except (TypeError, ValueError):
        shape = np.zeros(0)
    if shape.shape == (4,) and np.isfinite(shape).all() and shape[0] <= shape[2] and shape[1] <= shape[3]:
        x, y = coordinates[:, 0], coordinates[:, 1]
        return (x >= shape[0]) & (y >= shape[1]) & (x <= shape[2]) & (y <= shape[3])
    if shape.ndim == 2 and shape.shape[1] == 2 and len(shape) >= 3 and np.isfinite(shape).all():
        from shapely import Polygon, contains_xy

        return np.asarray(contains_xy(Polygon(shape), coordinates[:, 0], coordinates[:, 1]), dtype=bool)
    raise InputError("a region is (xmin, ymin, xmax, ymax) or a polygon of at least three (x, y) points, in µm")


def _plain(column: pd.Series) -> np.ndarray:
    """Values of a column as numpy and xarray hold and store them."""
    if pd.api.types.is_numeric_dtype(column.dtype):
        return column.to_numpy(dtype=np.float64, na_value=np.nan) if column.hasnans else column.to_numpy()
    missing = column.isna().to_numpy()
    values = column.to_numpy(dtype=object)
    if all(isinstance(value, str) for value in values[~missing]):
        values = np.where(missing, "", values)
    return values


def stale_slices(catalog: Catalog, slices: Iterable[str], embedding: str) -> list[str]:
    """Return those of some slices whose embedding is there, but is not the one that the version expects."""
    stage = EMBEDDINGS[embedding][0]
    return [name for name in slices if stage_status(catalog, catalog.slice(name))[stage] == "stale"]


def embedding_size(name: str) -> int:
    """Numbers a cell of an embedding; InputError when there is none of that name."""
    if name not in EMBEDDINGS:
        raise InputError(f"there is no embedding '{name}': choose from {', '.join(EMBEDDINGS)}")
    return EMBEDDINGS[name][1]


def _filter_table(store: SliceStore, record: SliceRecord, columns: tuple[str, ...]) -> dict[str, Any]:
    n_cells = record.n_cells
    held = [column for column in columns if column in record.label_columns]
    obs = store.obs(held) if held or "cell" in columns else None
    table: dict[str, Any] = {}
    for column in columns:
        if column in SLICE_COLUMNS:
            table[column] = pd.Series(np.full(n_cells, getattr(record, column), dtype=object))
        elif column in ("x", "y"):
            table[column] = pd.Series(store.coordinates()[:, "xy".index(column)])
        elif column == "cell" and obs is not None:
            table[column] = pd.Series(obs.index.astype(str).to_numpy(dtype=object))
        elif column in held and obs is not None:
            table[column] = obs[column].reset_index(drop=True)
        else:
            table[column] = pd.Series(np.full(n_cells, np.nan))
    return table


def _embedding_of(catalog: Catalog, slice_id: str, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    record = catalog.slice(slice_id)
    size, stage = embedding_size(name), EMBEDDINGS[name][0]
    stop = record.n_cells if stop is None else stop
    key = record.objects.get(stage)
    # one query never mixes spaces: what another model made counts as missing
    if key is None or key != expected_objects(catalog, record).get(stage):
        return np.full((stop - start, size), np.nan, dtype=np.float32)
    return read_rows(catalog.path("embeddings", key), name, start, stop).astype(np.float32)


def _slice_path(catalog: Catalog, slice_id: str) -> Any:
    return catalog.path("slices", catalog.slice(slice_id).objects["ingest"])
