"""Ingest: a source becomes an immutable slice of the catalog, a SpatialData store that its readers open as it is.

Everything is checked before the first byte is written, so a refusal leaves the catalog as it was.
"""

from __future__ import annotations

import json
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lloki_atlas.config import digest
from lloki_atlas.errors import InputError
from lloki_atlas.stages.genes import tables_digest
from lloki_atlas.stages.lineage import atlas_config
from lloki_atlas.stages.prepare import PreparedSlice, prepare_slice
from lloki_atlas.stages.readers import REGION_ATTRIBUTES
from lloki_atlas.stages.sources import SourceTable, open_source
from lloki_atlas.stages.units import MICROMETER
from lloki_atlas.store.arrays import read_arrays
from lloki_atlas.store.catalog import Catalog, commit
from lloki_atlas.store.objects import is_complete, publish
from lloki_atlas.store.records import Change, SliceRecord

__all__ = ["PreparedSlice", "ingest", "prepare_slice", "write_slice"]

VERSION = 1
TABLE = "table"
METADATA = "lloki_atlas"


def ingest(
    catalog: Catalog,
    source: Any,
    *,
    slice_id: str,
    technology: str,
    organism: str,
    coordinate_unit: str,
    um_per_unit: float | None = None,
    spatial_key: str = "spatial",
    label_key: str | Sequence[str] | None = None,
    layer: str | None = None,
    slice_key: str | None = None,
    slice_value: Any = None,
    table: str | None = None,
    empty_cells: str = "error",
    accept_normalized: bool = False,
    gene_map: str | Path | None = None,
    reference_symbols: Callable[[], Iterable[str]] | None = None,
) -> Catalog:
    """Add one slice to a catalog.

    Parameters
    ----------
    catalog
        Open for commits, with a reference.
    source
        Path of an h5ad file or of a SpatialData store, an AnnData, or a SpatialData.
    slice_id, technology
        What the slice and its platform are called; an id is given once.
    organism
        `mouse` or `human`.
    coordinate_unit, um_per_unit
        `micrometer`, `millimeter`, `nanometer`, or `pixel` with the micrometres per pixel.
    spatial_key
        Key of `obsm` with the coordinates.
    label_key
        One or several columns of `obs` with labels of the cells.
    layer
        Layer with the counts; `X` when None.
    slice_key, slice_value
        Take only the cells whose `obs[slice_key]` is this value.
    table
        Name of the table of a SpatialData source.
    empty_cells
        What to do with cells without any count: "error" or "keep".
    accept_normalized
        Take values that are not whole numbers.
    gene_map
        Tab-separated table (source symbol, canonical symbol) that wins over the built-in ones.
    reference_symbols
        Gives the reference's canonical symbols; None reads them from the catalog.

    Returns
    -------
    Catalog
        At the new version; the same catalog when it has this very slice already.

    Raises
    ------
    InputError
        If the source cannot be used, or another slice has that id; the catalog is as before.
    ConflictError
        If another writer added that id meanwhile.
    """
    if catalog.mode == "r":
        raise InputError(f"{catalog.root} is open for reading: open it with mode='r+' to ingest")
    tile_cells = atlas_config(catalog).tile.tile_cells
    opened = open_source(
        source, layer=layer, spatial_key=spatial_key, slice_key=slice_key, slice_value=slice_value, table=table
    )
    prepared = prepare_slice(
        opened,
        slice_id=slice_id,
        technology=technology,
        organism=organism,
        coordinate_unit=coordinate_unit,
        um_per_unit=um_per_unit,
        label_key=label_key,
        reference_symbols=_reference_symbols(catalog, reference_symbols),
        empty_cells=empty_cells,
        accept_normalized=accept_normalized,
        gene_map=gene_map,
        tile_cells=tile_cells,
    )
    lineage = _lineage(opened, prepared)
    key = digest(lineage)
    if slice_id in catalog.state.slices:
        if catalog.slice(slice_id).objects.get("ingest") == key:
            return catalog
        raise InputError(f"slice '{slice_id}' is in {catalog.root} already with other content: choose another id")
    _publish_slice(catalog, prepared, key=key, lineage=lineage)
    record = SliceRecord(
        slice_id=slice_id,
        technology=technology,
        organism=organism,
        panel=prepared.panel,
        n_cells=prepared.counts.shape[0],
        n_genes=prepared.counts.shape[1],
        label_columns=prepared.label_columns,
        objects={"ingest": key},
    )
    return commit(catalog, Change(slices={slice_id: record}), message=f"ingest {slice_id}")


def write_slice(prepared: PreparedSlice, folder: str | Path) -> None:
    """Write a slice as a SpatialData store: the table `table`, and the elements that its source has beside it.

    Parameters
    ----------
    prepared
        The slice.
    folder
        Where; it may not exist.
    """
    from anndata import AnnData
    from spatialdata import SpatialData

    genes = prepared.genes
    var = pd.DataFrame(
        {"symbol": np.array(genes.canonical, dtype=object), "mapping": pd.Categorical(genes.how)},
        index=pd.Index(genes.source, dtype=object),
    )
    uns: dict[str, Any] = {METADATA: json.dumps(prepared.metadata, sort_keys=True, allow_nan=False)}
    regions = _kept_regions(prepared)
    if regions:
        uns[REGION_ATTRIBUTES] = regions
    table = AnnData(X=prepared.counts, obs=prepared.obs, var=var, obsm={"spatial": prepared.coordinates}, uns=uns)
    with warnings.catch_warnings():
        # about regions that are no element, and about names of dask's internals
        warnings.simplefilter("ignore")
        elements = _carried_elements(prepared, regions=regions)
        SpatialData.init_from_elements({**elements, TABLE: table}).write(folder)


def _reference_symbols(catalog: Catalog, given: Callable[[], Iterable[str]] | None) -> set[str]:
    if given is not None:
        return {str(symbol) for symbol in given()}
    if catalog.state.reference is None:
        raise InputError(f"{catalog.root} has no reference: create it with a scRNA-seq reference, then ingest slices")
    stored = read_arrays(catalog.path("references", catalog.state.reference), ["symbols"])
    return {str(symbol) for symbol in stored["symbols"]}


def _lineage(source: SourceTable, prepared: PreparedSlice) -> dict[str, Any]:
    """What a slice is made of; where its source lies is not part of it, and neither is the reference."""
    metadata = prepared.metadata
    genes = prepared.genes
    return {
        "stage": "ingest",
        "version": VERSION,
        "source_digest": source.digest,
        "source": {name: value for name, value in source.origin.items() if name not in ("kind", "path")},
        "symbols": digest([genes.source, genes.canonical, genes.how]),
        "gene_tables": tables_digest(),
        **{name: metadata[name] for name in ("slice_id", "technology", "organism", "coordinate_unit", "um_per_unit")},
        **{name: metadata[name] for name in ("label_columns", "tile_cells")},
    }


def _publish_slice(catalog: Catalog, prepared: PreparedSlice, *, key: str, lineage: dict[str, Any]) -> None:
    final = catalog.path("slices", key)
    if is_complete(final):
        return
    # two writers of one slice stage it apart
    staging = catalog.path("staging", f"{key}-{uuid.uuid4().hex[:8]}")
    staging.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_slice(prepared, staging)
        publish(staging, final, lineage=lineage)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _kept_regions(prepared: PreparedSlice) -> dict[str, Any]:
    """Which elements the stored table annotates: of the source's regions those that have a cell in this slice."""
    columns = prepared.metadata["obs_columns"]
    keys = {name: columns.get(prepared.regions.get(name, "")) for name in ("region_key", "instance_key")}
    if None in keys.values():
        return {}
    present = list(dict.fromkeys(prepared.obs[keys["region_key"]].astype(str)))
    return {"region": present if len(present) > 1 else present[0], **keys}


def _carried_elements(prepared: PreparedSlice, *, regions: dict[str, Any]) -> dict[str, Any]:
    """Elements of the source but for tables and regions without a cell, with a transformation to micrometre."""
    from spatialdata import read_zarr
    from spatialdata.transformations import get_transformation, set_transformation

    source = prepared.elements
    if source is None:
        return {}
    if isinstance(source, Path):
        source = read_zarr(source, selection=("points", "shapes", "images", "labels"))
    kept = [str(name) for name in np.atleast_1d(regions["region"])] if regions else []
    others = set(prepared.regions.get("region", ())) - set(kept)
    carried: dict[str, Any] = {}
    for kind in ("points", "shapes", "images", "labels"):
        for name, element in getattr(source, kind).items():
            if name in others:
                continue
            clone = element.copy() if kind == "points" else element.copy(deep=False)
            known = dict(get_transformation(clone, get_all=True))
            to_micrometer = _to_micrometer(source, element, kept, scale=prepared.metadata["um_per_unit"])
            if to_micrometer is not None:
                known[MICROMETER] = to_micrometer
            set_transformation(clone, known, set_all=True)
            carried[name] = clone
    return carried


def _to_micrometer(source: Any, element: Any, regions: list[str], *, scale: float) -> Any:
    """Transformation of an element into the table's coordinates, times micrometres per unit.

    The table's coordinates are those of the shapes that it annotates, or else the source's `global` ones.
    """
    from spatialdata.transformations import (
        Scale,
        Sequence,
        get_transformation,
        get_transformation_between_coordinate_systems,
    )

    to_unit = Scale([scale, scale], axes=("x", "y"))
    annotated = next((source[name] for name in regions if name in source), None)
    if element is annotated:
        return to_unit
    try:
        if annotated is None:
            return Sequence([get_transformation(element, to_coordinate_system="global"), to_unit])
        return Sequence([get_transformation_between_coordinate_systems(source, element, annotated), to_unit])
    except (ValueError, RuntimeError):
        # nothing says where this element lies with regard to the cells
        return None
