"""Exact nearest cells over a committed version, slice by slice, with the filter applied before the search."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.neighbors import Neighbors, merge_neighbors, nearest_rows
from lloki_atlas.query.select import (
    CellSelection,
    Region,
    cells_table,
    embedding_size,
    select_cells,
    stale_slices,
)
from lloki_atlas.stages.lineage import encoder_key
from lloki_atlas.store.catalog import Catalog

if TYPE_CHECKING:
    import xarray
    from anndata import AnnData

Metric = Literal["cosine", "euclidean"]
OWN = "own"
MAX_PAIRS = 2**30
# models that decide which space an embedding lies in
_ROLES = {"X_fp": ("embedder",), "X_lloki": ("embedder", "autoencoder")}


@dataclass(frozen=True)
class NearestCells:
    """Nearest cells of each query, nearest first.

    Parameters
    ----------
    neighbors
        `indices` (n_queries, n_neighbors) into `cells`, -1 where fewer were found, and `distances`.
    cells
        The cells that were found, one row each: `cell`, `slice_id`, `technology`, `x`, `y`, labels.
    query
        The queried cells, if they are cells of the atlas.
    """

    neighbors: Neighbors
    cells: pd.DataFrame
    query: pd.DataFrame | None

    def to_dataframe(self) -> pd.DataFrame:
        """One row a pair: `query` (position), `rank`, `slice_id`, `cell`, `technology`, `distance`, labels."""
        position, rank = np.nonzero(self.neighbors.indices >= 0)
        found = self.cells.iloc[self.neighbors.indices[position, rank]].reset_index(drop=True)
        head = pd.DataFrame(
            {
                "query": position,
                "rank": rank,
                "slice_id": found["slice_id"],
                "cell": found["cell"],
                "technology": found["technology"],
                "distance": self.neighbors.distances[position, rank],
            }
        )
        return pd.concat([head, found.drop(columns=["slice_id", "cell", "technology"])], axis=1)

    def to_anndata(self) -> AnnData:
        """Found pairs as AnnData: `obs` is the table of `to_dataframe`, `obsm["spatial"]` in µm."""
        from anndata import AnnData

        pairs = self.to_dataframe()
        pairs.index = pd.Index(
            [f"{q}:{s}:{c}" for q, s, c in zip(pairs["query"], pairs["slice_id"], pairs["cell"], strict=True)]
        )
        return AnnData(
            X=None,
            obs=pairs.drop(columns=["x", "y"]),
            obsm={"spatial": pairs[["x", "y"]].to_numpy(dtype=np.float32)},
        )

    def to_xarray(self) -> xarray.Dataset:
        """Distances and names over (`query`, `neighbor`); empty text and NaN where fewer cells were found."""
        import xarray

        indices = self.neighbors.indices
        found = indices >= 0

        def spread(column: str) -> np.ndarray:
            values = self.cells[column].astype(str).to_numpy(dtype=object)
            return np.where(found, values[np.maximum(indices, 0)] if len(values) else "", "").astype(str)

        dims = ("query", "neighbor")
        return xarray.Dataset(
            {
                "distance": (dims, np.where(found, self.neighbors.distances, np.nan)),
                **{column: (dims, spread(column)) for column in ("slice_id", "cell", "technology")},
            }
        )


def nearest_cells(
    catalog: Catalog,
    query: CellSelection | np.ndarray | Any,
    *,
    n_neighbors: int = 15,
    where: str | None = None,
    region: Region | None = None,
    slices: list[str] | None = None,
    exclude_slice: str | None = None,
    embedding: str = "X_lloki",
    metric: Metric = "cosine",
) -> NearestCells:
    """Find the nearest cells of the atlas, exactly.

    Parameters
    ----------
    catalog
        Any version.
    query
        Cells of the atlas (`select_cells(...)`; a cell is never its own neighbour), an array (n_queries, 128), or an
        AnnData with the embedding in `obsm`.
    n_neighbors
        Cells to find per query.
    where, region, slices
        Which cells may be found, as for `select_cells`; the filter is applied before the search.
    exclude_slice
        A slice id, or `"own"` to leave out each query's own slice (of a selection, or of `obs["slice_id"]`).
    embedding
        `X_lloki` or `X_fp`.
    metric
        `cosine` (1 - cosine similarity) or `euclidean`.

    Returns
    -------
    Neighbours, nearest first; ties go to the smaller slice id, then to the earlier row. Slices whose embedding is of
    other settings or another model than the version has are left out, with a warning.

    Raises
    ------
    InputError
        If the query has another width than the embedding, holds NaN, is of another model, or nothing is left to search.
    NotFoundError
        If a slice or a column does not exist.
    """
    vectors, frame = _query_vectors(query, embedding)
    if not 1 <= n_neighbors * len(vectors) <= MAX_PAIRS:
        raise InputError(
            f"n_neighbors is {n_neighbors} for {len(vectors)} queries: ask for at least 1 and at most {MAX_PAIRS:,} "
            "pairs at a time"
        )
    if exclude_slice not in (None, OWN):
        catalog.slice(exclude_slice)
    own_rows = _own_rows(query, catalog, embedding)
    candidates = select_cells(catalog, where=where, region=region, slices=slices)
    _warn_of_stale(candidates, embedding)
    best = Neighbors(
        np.full((len(vectors), n_neighbors), -1, dtype=np.int32),
        np.full((len(vectors), n_neighbors), np.inf, dtype=np.float32),
    )
    own_slice = frame["slice_id"].astype(str).to_numpy() if frame is not None else None
    if exclude_slice == OWN and own_slice is None:
        raise InputError("exclude_slice='own' needs queries that say their slice: a selection, or obs['slice_id']")
    offsets = dict(
        zip(candidates.slices, np.cumsum([0, *(len(r) for r in candidates.rows.values())])[:-1], strict=True)
    )
    seen = 0
    for slice_id, rows, block in candidates.iter_tiles(embedding):
        if slice_id == exclude_slice:
            continue
        usable = np.isfinite(block[:, 0])
        asked = np.arange(len(vectors))
        if exclude_slice == OWN and own_slice is not None:
            asked = np.flatnonzero(own_slice != slice_id)
        if not usable.any() or not len(asked):
            continue
        seen += int(usable.sum())
        rows, block = rows[usable], np.ascontiguousarray(block[usable])
        part = _search(
            vectors[asked], block, n_neighbors, metric, _self_rows(own_rows, own_slice, slice_id, asked), rows
        )
        positions = np.searchsorted(candidates.rows[slice_id], rows) + offsets[slice_id]
        shifted = Neighbors(
            np.where(part.indices >= 0, positions[np.maximum(part.indices, 0)], -1).astype(np.int32), part.distances
        )
        merged = merge_neighbors(
            Neighbors(best.indices[asked], best.distances[asked]), shifted, n_neighbors=n_neighbors
        )
        best.indices[asked], best.distances[asked] = merged.indices, merged.distances
    if not seen:
        raise InputError(
            "no cell with a current embedding is left to search: loosen the filter, or run the atlas first"
        )
    return _collect(candidates, best, frame)


def _query_vectors(query: Any, embedding: str) -> tuple[np.ndarray, pd.DataFrame | None]:
    """Vectors (n, d), and the queried cells if they say what they are."""
    size, frame = embedding_size(embedding), None
    if isinstance(query, CellSelection):
        vectors, frame = query.embedding(embedding), query.to_dataframe()
    elif hasattr(query, "obsm"):
        if embedding not in query.obsm:
            raise InputError(f"the query has no obsm['{embedding}']")
        vectors = _numbers(query.obsm[embedding])
        frame = query.obs.reset_index(drop=True) if "slice_id" in query.obs else None
    else:
        vectors = _numbers(query)
    if vectors.ndim != 2 or vectors.shape[1] != size:
        raise InputError(f"the query has shape {vectors.shape}: {embedding} has {size} numbers a cell")
    if not len(vectors):
        raise InputError("the query is empty: no cell matches")
    lost = ~np.isfinite(vectors).all(axis=1)
    if lost.any():
        raise InputError(
            f"{int(lost.sum())} of {len(vectors)} query cells have no embedding (first at position "
            f"{int(np.argmax(lost))}): leave them out, or run the atlas first"
        )
    return np.ascontiguousarray(vectors, dtype=np.float32), frame


def _numbers(values: Any) -> np.ndarray:
    try:
        array = np.asarray(values)
        return np.atleast_2d(array if array.dtype.kind in "iuf" else array.astype(np.float64))
    except (TypeError, ValueError):
        raise InputError("the query holds something else than numbers: give an array (n_queries, size)") from None


def _own_rows(query: Any, catalog: Catalog, embedding: str) -> np.ndarray | None:
    """Row of each cell of a selection in its slice, -1 where this version has other cells by that name."""
    if not isinstance(query, CellSelection):
        return None
    differing = [
        role for role in _ROLES[embedding] if query.catalog.state.models.get(role) != catalog.state.models.get(role)
    ]
    if embedding == "X_lloki" and not differing:
        records = (query.catalog.slice(slice_id) for slice_id in query.rows)
        changed = {r.technology for r in records if encoder_key(query.catalog, r) != encoder_key(catalog, r)}
        differing = [f"token of '{technology}'" for technology in sorted(changed)]
    if differing:
        raise InputError(
            f"the query's {embedding} is of version {query.catalog.version}, whose {differing[0]} is another one: "
            f"select the cells in version {catalog.version}"
        )
    parts = []
    for slice_id, rows in query.rows.items():
        held = catalog.state.slices.get(slice_id)
        same = held is not None and held.objects["ingest"] == query.catalog.slice(slice_id).objects["ingest"]
        parts.append(rows if same else np.full(len(rows), -1))
    return np.concatenate(parts)


def _warn_of_stale(candidates: CellSelection, embedding: str) -> None:
    stale = stale_slices(candidates.catalog, candidates.slices, embedding)
    if stale:
        more = f" and {len(stale) - 3} more" if len(stale) > 3 else ""
        warnings.warn(
            f"slices left out: {', '.join(stale[:3])}{more}; their {embedding} was made with other settings or another "
            "model than the atlas has now, run the atlas first",
            stacklevel=3,
        )


def _self_rows(
    own_rows: np.ndarray | None, own_slice: np.ndarray | None, slice_id: str, asked: np.ndarray
) -> np.ndarray | None:
    """Row of each asked query in this slice, -1 where it is of another one; None for foreign queries."""
    if own_rows is None or own_slice is None:
        return None
    return np.where(own_slice[asked] == slice_id, own_rows[asked], -1)


def _search(
    vectors: np.ndarray,
    block: np.ndarray,
    n_neighbors: int,
    metric: Metric,
    self_rows: np.ndarray | None,
    rows: np.ndarray,
) -> Neighbors:
    if self_rows is None or (self_rows < 0).all():
        return nearest_rows(vectors, block, n_neighbors=n_neighbors, metric=metric)
    # one more, so that n_neighbors are left when the cell itself is taken out
    found = nearest_rows(vectors, block, n_neighbors=n_neighbors + 1, metric=metric)
    itself = (
        (found.indices >= 0) & (rows[np.maximum(found.indices, 0)] == self_rows[:, None]) & (self_rows >= 0)[:, None]
    )
    order = np.argsort(itself, axis=1, kind="stable")
    indices = np.where(itself, -1, found.indices)
    distances = np.where(itself, np.float32(np.inf), found.distances)
    return Neighbors(
        np.ascontiguousarray(np.take_along_axis(indices, order, axis=1)[:, :n_neighbors]),
        np.ascontiguousarray(np.take_along_axis(distances, order, axis=1)[:, :n_neighbors]),
    )


def _collect(candidates: CellSelection, best: Neighbors, frame: pd.DataFrame | None) -> NearestCells:
    """Read the columns of the cells that were found, and renumber the neighbours to that table."""
    found = np.unique(best.indices[best.indices >= 0])
    bounds = np.cumsum([0, *(len(rows) for rows in candidates.rows.values())])
    chosen = {
        name: rows[found[(found >= start) & (found < stop)] - start]
        for (name, rows), start, stop in zip(candidates.rows.items(), bounds[:-1], bounds[1:], strict=True)
    }
    renumbered = np.where(best.indices >= 0, np.searchsorted(found, best.indices), -1).astype(np.int32)
    return NearestCells(Neighbors(renumbered, best.distances), cells_table(candidates.catalog, chosen), frame)
