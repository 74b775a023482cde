"""Ingest: a source becomes an immutable slice of the catalog, a SpatialData store that its readers open as it is.

Everything is checked before the first byte is written, so a refusal leaves the catalog as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lloki_atlas.config import digest
from lloki_atlas.errors import FormatError, InputError, LlokiAtlasError, NotFoundError
from lloki_atlas.stages.genes import tables_digest
from lloki_atlas.stages.lineage import atlas_config
from lloki_atlas.stages.prepare import PreparedSlice, prepare_slice
from lloki_atlas.stages.requests import REQUEST, request_digest, source_digest
from lloki_atlas.stages.slice_files import write_slice
from lloki_atlas.stages.sources import SourceTable, open_source
from lloki_atlas.store.arrays import read_arrays
from lloki_atlas.store.catalog import Catalog, commit
from lloki_atlas.store.leases import writing
from lloki_atlas.store.objects import is_complete, read_receipt
from lloki_atlas.store.publishing import own_staging, publish
from lloki_atlas.store.records import Change, SliceRecord
from lloki_atlas.store.slices import SliceStore

__all__ = ["PreparedSlice", "ingest", "make_slice", "prepare_slice", "write_slice"]

VERSION = 1


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
    replace: bool | None = None,
    reference_symbols: Callable[[], Iterable[str]] | None = None,
) -> Catalog:
    """Add one slice to a catalog, or a new version of one.

    Parameters
    ----------
    catalog
        Open for commits, with a reference.
    source
        Path of an h5ad file, of a SpatialData store or of a vendor's output folder; an AnnData, or a SpatialData.
    slice_id, technology
        What the slice and its platform are called.
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
    replace
        What becomes of a slice that has this id and other content. True: this is its new version, False: it is refused.
        None: it is the new version if the slice was made of the file at this path, which changed or is read in another
        way, and refused if another source had that id. Earlier versions of the catalog keep the slice as it was.
    reference_symbols
        Gives the reference's canonical symbols; None reads them from the catalog.

    Returns
    -------
    Catalog
        At the new version; the same catalog when it has this very slice already, which needs no parsing where the same
        was asked of the same bytes.

    Raises
    ------
    InputError
        If the source cannot be used, or another slice has that id; the catalog is as before.
    ConflictError
        If another writer added or replaced that slice meanwhile.
    """
    if catalog.mode == "r":
        raise InputError(f"{catalog.root} is open for reading: open it with mode='r+' to ingest")
    with writing(catalog.root, f"ingest {slice_id}"):
        record = make_slice(
            catalog,
            source,
            slice_id=slice_id,
            replace=replace,
            reference_symbols=reference_symbols,
            technology=technology,
            organism=organism,
            coordinate_unit=coordinate_unit,
            um_per_unit=um_per_unit,
            spatial_key=spatial_key,
            label_key=label_key,
            layer=layer,
            slice_key=slice_key,
            slice_value=slice_value,
            table=table,
            empty_cells=empty_cells,
            accept_normalized=accept_normalized,
            gene_map=gene_map,
        )
        if record is None:
            return catalog
        return commit(catalog, Change(slices={slice_id: record}), message=f"ingest {slice_id}")


def make_slice(
    catalog: Catalog,
    source: Any,
    *,
    slice_id: str,
    replace: bool | None = None,
    reference_symbols: Callable[[], Iterable[str]] | None = None,
    **options: Any,
) -> SliceRecord | None:
    """Publish the object of a slice; nothing is committed.

    Parameters
    ----------
    catalog
        Knows the reference, the settings, and the slice of that id if there is one.
    source, slice_id, replace, reference_symbols, options
        As for `ingest`.

    Returns
    -------
    SliceRecord
        What to commit; None when the catalog has this very slice already.

    Raises
    ------
    InputError
        If the source cannot be used, or another slice has that id; nothing was published.
    """
    tile_cells = atlas_config(catalog).tile.tile_cells
    asked = {"slice_id": slice_id, **options}

    def request(of_source: str) -> str:
        return request_digest(of_source, asked, version=VERSION, tile_cells=tile_cells)

    held = catalog.state.slices.get(slice_id)
    known = None if held is None else _request_of(catalog, held)
    if known is not None and isinstance(source, str | Path) and _digest_of(source, request) == known:
        return None
    reading = ("layer", "spatial_key", "slice_key", "slice_value", "table")
    opened = open_source(source, **{name: options.pop(name) for name in reading if name in options})
    prepared = prepare_slice(
        opened,
        slice_id=slice_id,
        reference_symbols=_reference_symbols(catalog, reference_symbols),
        tile_cells=tile_cells,
        **options,
    )
    lineage = _lineage(opened, prepared)
    key = digest(lineage)
    is_held = held is not None and held.objects.get("ingest") == key
    if held is not None and not is_held:
        _check_replaceable(catalog, held, opened.origin["path"], replace=replace)
    stored = lineage if opened.origin["path"] is None else {**lineage, REQUEST: request(opened.digest)}
    _publish_slice(catalog, prepared, key=key, lineage=stored)
    if is_held:  # its object was lost, or is there
        return None
    return SliceRecord(
        slice_id=slice_id,
        technology=str(options["technology"]),
        organism=str(options["organism"]),
        panel=prepared.panel,
        n_cells=prepared.counts.shape[0],
        n_genes=prepared.counts.shape[1],
        label_columns=prepared.label_columns,
        # no later stage: what was made of other cells is not this slice's
        objects={"ingest": key},
    )


def _digest_of(source: str | Path, request: Callable[[str], str]) -> str | None:
    """Digest of what is asked of a source; None where it cannot be read, which opening it explains."""
    try:
        return request(source_digest(Path(source).expanduser()))
    except (OSError, LlokiAtlasError):
        return None


def _request_of(catalog: Catalog, held: SliceRecord) -> str | None:
    """Digest of what a slice was made for; None for a slice of an earlier release, or of a source in memory."""
    path = catalog.path("slices", held.objects["ingest"])
    try:
        return read_receipt(path).lineage.get(REQUEST) if is_complete(path) else None
    except (FormatError, NotFoundError):
        return None


def _check_replaceable(catalog: Catalog, held: SliceRecord, path: str | None, *, replace: bool | None) -> None:
    if replace is None and path is not None:
        metadata = SliceStore(catalog.path("slices", held.objects["ingest"])).metadata
        replace = metadata.get("source", {}).get("path") == path
    if not replace:
        raise InputError(
            f"slice '{held.slice_id}' is in {catalog.root} already with other content: choose another id, or say that "
            "it is a new version of that slice (--replace)"
        )


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
    with own_staging(catalog.path("staging", key)) as staging:
        write_slice(prepared, staging)
        publish(staging, final, lineage=lineage)
