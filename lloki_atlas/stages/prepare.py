"""From a source table to a slice in memory: checked, in micrometre, in spatial order, with canonical symbols."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from lloki_atlas.config import TileConfig, digest
from lloki_atlas.errors import InputError
from lloki_atlas.kernels.ordering import hilbert_order
from lloki_atlas.stages import checks
from lloki_atlas.stages.columns import storable_obs
from lloki_atlas.stages.genes import GeneMap, check_organism, map_symbols
from lloki_atlas.stages.sources import SourceTable

SOURCE_ROW = "source_row"


@dataclass(frozen=True)
class PreparedSlice:
    """One slice, ready to be written.

    Parameters
    ----------
    counts
        (n_cells, n_genes) CSR float32, cells in Hilbert order, every gene of the source.
    coordinates
        (n_cells, 2) float32, micrometre.
    obs
        The source's columns and `source_row`, int64; the index is the cells' names.
    genes
        Source symbol, canonical symbol and outcome of every gene.
    metadata
        What `SliceStore.metadata` gives back (JSON-like).
    elements, regions
        As in the source table.
    """

    counts: csr_matrix
    coordinates: np.ndarray
    obs: pd.DataFrame
    genes: GeneMap
    metadata: Mapping[str, Any]
    elements: Any = None
    regions: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.counts.shape[0] == len(self.coordinates) == len(self.obs):
            raise InputError("counts, coordinates and obs of a slice differ in the number of cells")
        if self.counts.shape[1] != len(self.genes.source):
            raise InputError("counts and genes of a slice differ in the number of genes")

    @property
    def panel(self) -> str:
        """Digest of the canonical symbols: slices of one panel share it."""
        return digest(list(self.genes.symbols))

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Stored names of the label columns."""
        return tuple(self.metadata["label_columns"])


def prepare_slice(
    source: SourceTable,
    *,
    slice_id: str,
    technology: str,
    organism: str,
    coordinate_unit: str,
    reference_symbols: Collection[str],
    um_per_unit: float | None = None,
    label_key: str | Sequence[str] | None = None,
    empty_cells: str = "error",
    accept_normalized: bool = False,
    gene_map: str | Path | None = None,
    tile_cells: int = TileConfig().tile_cells,
) -> PreparedSlice:
    """Check a source table and put it in the form that is stored; nothing is written.

    Parameters
    ----------
    source
        With coordinates.
    slice_id, technology
        What the slice and its platform are called.
    organism
        `mouse` or `human`.
    coordinate_unit, um_per_unit
        Unit of the source's coordinates; `pixel` needs micrometres per pixel, but for a CosMx folder.
    reference_symbols
        Canonical symbols of the catalog's reference.
    label_key
        One or several columns of `obs` with labels of the cells.
    empty_cells
        What to do with cells without any count: "error" or "keep".
    accept_normalized
        Take values that are not whole numbers.
    gene_map
        A table (source symbol, canonical symbol) that wins over the built-in ones.
    tile_cells
        Cells of a tile, for the bounds of the tiles.

    Raises
    ------
    InputError
        If any check fails; the message says how to mend it.
    """
    where, cells = source.description, source.cells
    labels = [label_key] if isinstance(label_key, str) else list(label_key or ())
    checks.check_identity(slice_id, technology=technology)
    check_organism(organism)
    unit, scale = source.scale(coordinate_unit, um_per_unit=um_per_unit)
    checks.check_not_empty(source.counts, where=where)
    checks.check_columns(labels, columns=source.obs.columns, where=where)
    checks.check_unique(cells, what="cell names", where=where, mend="make them unique with obs_names_make_unique()")
    checks.check_unique(
        source.symbols, what="gene symbols", where=where, mend="keep one column of each, or add the columns up"
    )
    if source.coordinates is None:
        raise InputError(f"{where} was opened without coordinates: open it with a spatial_key")
    checks.check_coordinates(source.coordinates, cells=cells, where=where)
    source.require_counts(accept_normalized=accept_normalized)
    n_empty = checks.check_empty_cells(source.counts, cells=cells, where=where, empty_cells=empty_cells)
    genes = map_symbols(source.symbols, organism=organism, gene_map=gene_map)
    checks.check_shared(genes.symbols, reference_symbols=reference_symbols, where=where, organism=organism)

    order = hilbert_order(source.coordinates, names=cells)
    coordinates = np.ascontiguousarray(source.coordinates[order] * scale, dtype=np.float32)
    obs, names = storable_obs(source.obs.iloc[order], reserved=(SOURCE_ROW,))
    obs[SOURCE_ROW] = source.rows[order]
    counts = csr_matrix(source.counts[order])
    metadata = {
        "slice_id": slice_id,
        "technology": technology,
        "organism": organism,
        "coordinate_unit": unit,
        "um_per_unit": scale,
        "label_columns": [names[str(label)] for label in labels],
        "obs_columns": names,
        "source": dict(source.origin),
        "source_digest": source.digest,
        "gene_report": genes.report(),
        "n_empty_cells": n_empty,
        "integer_counts": bool((counts.data == np.rint(counts.data)).all()),
        "tile_cells": tile_cells,
        "tile_bounds": tile_bounds(coordinates, tile_cells),
    }
    return PreparedSlice(counts, coordinates, obs, genes, metadata, source.elements, source.regions)


def tile_bounds(coordinates: np.ndarray, tile_cells: int) -> list[list[float]]:
    """Return (xmin, ymin, xmax, ymax) of every tile of `tile_cells` rows, in the unit of `coordinates`."""
    if tile_cells < 1:
        raise InputError(f"tile_cells is {tile_cells}: it has to be at least 1")
    tiles = (coordinates[start : start + tile_cells] for start in range(0, len(coordinates), tile_cells))
    return [[float(bound) for bound in (*tile.min(axis=0), *tile.max(axis=0))] for tile in tiles]
