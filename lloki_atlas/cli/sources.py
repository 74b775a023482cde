"""The command that takes sources in: ingest, of one file or of hundreds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lloki_atlas.cli.atlas import Cluster, Json, Quiet, Root, Workers, client_of
from lloki_atlas.cli.output import emit
from lloki_atlas.errors import InputError


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command()(ingest)


def ingest(
    root: Root,
    sources: Annotated[
        list[str],
        typer.Argument(
            help="h5ad files, SpatialData stores, vendors' folders; folders of these, patterns in quotes, or sheets "
            "(CSV, TOML) with a line a slice."
        ),
    ],
    technology: Annotated[str | None, typer.Option("--technology", help="Platform, such as MERFISH.")] = None,
    organism: Annotated[str | None, typer.Option("--organism", help="mouse or human.")] = None,
    unit: Annotated[
        str | None, typer.Option("--unit", help="Of the coordinates: micrometer, millimeter, nanometer, pixel.")
    ] = None,
    um_per_unit: Annotated[float | None, typer.Option("--um-per-unit", help="Micrometres per pixel.")] = None,
    slice_id: Annotated[
        str | None, typer.Option("--slice-id", help="Name of the slice.", show_default="file name")
    ] = None,
    slice_key: Annotated[str | None, typer.Option("--slice-key", help="obs column; each value is a slice.")] = None,
    label_key: Annotated[
        list[str] | None, typer.Option("--label-key", help="obs column to query by; repeatable.")
    ] = None,
    layer: Annotated[str | None, typer.Option("--layer", help="Layer that holds the counts.", show_default="X")] = None,
    table: Annotated[str | None, typer.Option("--table", help="Table of a SpatialData store.")] = None,
    spatial_key: Annotated[
        str | None, typer.Option("--spatial-key", help="obsm key of the coordinates.", show_default="spatial")
    ] = None,
    keep_empty_cells: Annotated[bool, typer.Option("--keep-empty-cells", help="List cells without counts.")] = False,
    accept_normalized: Annotated[bool, typer.Option("--accept-normalized", help="Take non-integer values.")] = False,
    gene_map: Annotated[Path | None, typer.Option("--gene-map", help="Table: source symbol, canonical symbol.")] = None,
    replace: Annotated[
        bool | None,
        typer.Option(
            "--replace/--no-replace",
            help="A known id with other content: a new version of that slice, or refused.",
            show_default="new version if the same file changed",
        ),
    ] = None,
    all_or_nothing: Annotated[
        bool, typer.Option("--all-or-nothing", help="Refuse all sources when one is refused.")
    ] = False,
    workers: Workers = None,
    cluster: Cluster = "local",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Check slices and store them; what cannot be used is listed, changes nothing, and ends with exit code 3."""
    from lloki_atlas.stages.source_lists import SHEETS, find_sources
    from lloki_atlas.store.catalog import open_catalog

    needed = {"--technology": technology, "--organism": organism, "--unit": unit}
    missing = [name for name, value in needed.items() if value is None]
    if missing and not any(source.lower().endswith(SHEETS) for source in sources):
        raise typer.BadParameter(f"give {', '.join(missing)}, or a sheet that does")
    if slice_id is not None and len(sources) > 1:
        raise InputError("one --slice-id cannot name several sources: ingest them one by one, or leave it out")
    catalog = open_catalog(root, mode="r+")
    entries = find_sources(
        sources,
        slice_id=slice_id,
        technology=technology,
        organism=organism,
        coordinate_unit=unit,
        um_per_unit=um_per_unit,
        spatial_key=spatial_key,
        label_key=label_key or None,
        layer=layer,
        slice_key=slice_key,
        table=table,
        empty_cells="keep" if keep_empty_cells else None,
        accept_normalized=accept_normalized or None,
        gene_map=None if gene_map is None else str(gene_map),
    )
    if len(entries) == 1:
        _ingest_one(catalog, entries[0], replace=replace, as_json=as_json)
    else:
        options = {"replace": replace, "all_or_nothing": all_or_nothing, "n_workers": workers, "progress": not quiet}
        with client_of(cluster) as client:
            _ingest_many(catalog, entries, client=client, as_json=as_json, **options)


def _ingest_one(catalog: Any, entry: Any, *, replace: bool | None, as_json: bool) -> None:
    """Store one slice in this process."""
    from dataclasses import asdict

    from lloki_atlas.stages.ingest import ingest as store

    options = {name: value for name, value in asdict(entry).items() if name not in ("source", "url")}
    catalog = store(catalog, entry.source, replace=replace, **options)
    emit(
        {"version": catalog.version, "slices": [entry.slice_id]},
        as_json=as_json,
        text=f"version {catalog.version}: {entry.slice_id}",
    )


def _ingest_many(catalog: Any, entries: list[Any], *, client: Any, as_json: bool, **options: Any) -> None:
    from lloki_atlas.stages.ingest_many import ingest_many

    done = ingest_many(catalog, entries, client=client, **options)
    parts = {name: list(getattr(done, name)) for name in ("added", "replaced", "unchanged")}
    taken = {name for names in parts.values() for name in names}
    emit(
        {
            "version": done.catalog.version,
            "slices": [entry.slice_id for entry in entries if entry.slice_id in taken],
            **parts,
            "refused": dict(done.refused),
        },
        as_json=as_json,
        text=f"version {done.catalog.version}: "
        + ", ".join(f"{len(names)} {name}" for name, names in {**parts, "refused": done.refused}.items()),
    )
    for name, reason in done.refused.items():
        typer.echo(f"error: {name}: {' '.join(reason.split())}", err=True)
    if done.refused:
        raise typer.Exit(InputError.exit_code)
