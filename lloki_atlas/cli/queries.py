"""Commands that ask a committed atlas: query, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lloki_atlas.cli.output import emit, table

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Root = Annotated[str, typer.Argument(help="Folder of the catalog.")]
Version = Annotated[int | None, typer.Option("--version", help="An earlier version.", show_default="the newest")]
Where = Annotated[
    str | None, typer.Option("--where", help="Which cells, such as: technology != 'osmFISH' and cell_type == 'Sst'.")
]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    for command in (query, export):
        app.command()(command)


def query(
    root: Root,
    slice_id: Annotated[str, typer.Option("--slice", help="Slice of the queried cells.")],
    cell: Annotated[list[str], typer.Option("--cell", help="Name of a queried cell; repeatable.")],
    n_neighbors: Annotated[int, typer.Option("-k", "--n-neighbors", help="Cells to find per query.")] = 15,
    where: Where = None,
    exclude_own_slice: Annotated[bool, typer.Option("--exclude-own-slice", help="Only cells of other slices.")] = False,
    embedding: Annotated[str, typer.Option("--embedding", help="X_lloki or X_fp.")] = "X_lloki",
    version: Version = None,
    as_json: Json = False,
) -> None:
    """Find the nearest cells of the atlas to some of its cells."""
    from lloki_atlas.errors import NotFoundError
    from lloki_atlas.query import nearest_cells, select_cells
    from lloki_atlas.store.catalog import open_catalog

    catalog = open_catalog(root, version=version)
    names = ", ".join(repr(name) for name in cell)
    asked = select_cells(catalog, slices=[slice_id], where=f"cell in ({names},)")
    frame = asked.to_dataframe()
    for name in cell:
        if name not in set(frame["cell"]):
            raise NotFoundError(f"slice '{slice_id}' has no cell '{name}': list them with `lloki-atlas export`")
    found = nearest_cells(
        catalog,
        asked,
        n_neighbors=n_neighbors,
        where=where,
        exclude_slice="own" if exclude_own_slice else None,
        embedding=embedding,
    ).to_dataframe()
    labels = [column for column in found.columns if column not in ("query", "rank", "organism")]
    content: dict[str, Any] = {
        "version": catalog.version,
        "query": [
            {
                "slice_id": slice_id,
                "cell": name,
                "neighbors": _records(found[found["query"] == position], labels),
            }
            for position, name in enumerate(frame["cell"])
        ],
    }
    emit(content, as_json=as_json, text="\n\n".join(_text(part, labels) for part in content["query"]))


def export(
    root: Root,
    slice_id: Annotated[str, typer.Argument(help="Slice to write.")],
    out: Annotated[Path, typer.Argument(help="File to write: .h5ad, or .zarr for an xarray Dataset.")],
    where: Where = None,
    version: Version = None,
) -> None:
    """Write a slice with its embeddings as AnnData (.h5ad, with counts) or as an xarray Dataset (.zarr)."""
    from lloki_atlas.errors import InputError
    from lloki_atlas.query import select_cells
    from lloki_atlas.store.catalog import open_catalog

    if out.suffix not in (".h5ad", ".zarr"):
        raise InputError(f"{out} ends in '{out.suffix}': name a file .h5ad or a folder .zarr")
    if out.exists():
        raise InputError(f"{out} exists: choose another name, nothing is overwritten")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent}: make it, or choose another one")
    selection = select_cells(open_catalog(root, version=version), slices=[slice_id], where=where)
    if out.suffix == ".h5ad":
        selection.to_anndata(counts=True).write_h5ad(out)
    else:
        selection.to_xarray().to_zarr(out, consolidated=False)
    typer.echo(f"{out}: {selection.n_cells:,} cells")


def _records(found: Any, columns: list[str]) -> list[dict[str, Any]]:
    rows = found[columns].astype(object)
    return rows.where(rows.notna(), None).to_dict(orient="records")


def _text(part: dict[str, Any], labels: list[str]) -> str:
    columns = [column for column in labels if column not in ("x", "y")]
    rows = [
        [f"{neighbor[column]:.4f}" if column == "distance" else neighbor[column] for column in columns]
        for neighbor in part["neighbors"]
    ]
    return f"{part['slice_id']} {part['cell']}\n" + table(columns, rows)
