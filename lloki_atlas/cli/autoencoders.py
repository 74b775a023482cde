"""Commands about the autoencoder of an atlas: train, adapt."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lloki_atlas.cli.atlas import Cluster, DeviceMemory, Gpus, Json, Quiet, Root, Workers, client_of
from lloki_atlas.cli.output import emit, table


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    for command in (train, adapt):
        app.command()(command)


def train(
    root: Root,
    slices: Annotated[list[str] | None, typer.Option("--slices", help="Slice to train on; repeatable.")] = None,
    label_key: Annotated[str | None, typer.Option("--label-key", help="Cell types that refine the pairs.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed.", show_default="the atlas's")] = None,
    search: Annotated[
        bool | None,
        typer.Option(
            "--search/--no-search",
            help="Choose conservation weight and epochs on held-out cells.",
            show_default="the atlas's",
        ),
    ] = None,
    workers: Workers = None,
    gpus: Gpus = None,
    device_memory: DeviceMemory = None,
    cluster: Cluster = "local",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train the autoencoder anew and encode the atlas with it."""
    from lloki_atlas.stages.pipeline import train_autoencoder
    from lloki_atlas.store.catalog import open_catalog

    with client_of(cluster) as client:
        catalog = train_autoencoder(
            open_catalog(root, mode="r+"),
            slices=slices or None,
            label_key=label_key,
            random_state=seed,
            search=search,
            client=client,
            n_workers=workers,
            n_gpus=gpus,
            device_memory_mb=device_memory,
            progress=not quiet,
        )
    emit({"version": catalog.version}, as_json=as_json, text=f"version {catalog.version}")


def adapt(
    root: Root,
    technology: Annotated[str, typer.Option("--technology", help="The new technology, as it was ingested.")],
    slices: Annotated[
        list[str] | None,
        typer.Option("--slices", help="Slice to adapt on; repeatable.", show_default="all of its new panels"),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed.", show_default="the atlas's")] = None,
    workers: Workers = None,
    gpus: Gpus = None,
    device_memory: DeviceMemory = None,
    cluster: Cluster = "local",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Take a new technology into a finished atlas: train its token and encode its slices; nothing old changes."""
    from lloki_atlas.stages.adapt import adapt_autoencoder, adaptation_report
    from lloki_atlas.store.catalog import open_catalog

    with client_of(cluster) as client:
        catalog = adapt_autoencoder(
            open_catalog(root, mode="r+"),
            technology=technology,
            slices=slices or None,
            random_state=seed,
            client=client,
            n_workers=workers,
            n_gpus=gpus,
            device_memory_mb=device_memory,
            progress=not quiet,
        )
    report = adaptation_report(catalog, technology)
    emit(
        {"version": catalog.version, "platforms": report},
        as_json=as_json,
        text="\n".join([f"version {catalog.version}", *(_adapted(part) for part in report)]),
    )


def _adapted(part: dict[str, Any]) -> str:
    """What was measured of one token, for people."""
    structure, least = part["structure"], part["structure_of_atlas"]
    rows = [
        ("slices", ", ".join(part["slices"])),
        ("adapted on", f"{part['n_cells']:,} cells, beside {part['n_atlas_cells']:,} of the atlas"),
        ("shared structure", f"{structure:.2f}; platforms of the atlas at least {least:.2f}"),
        ("with a mutual neighbour", f"{100 * part['paired']:.0f} % of the cells, mean cosine {part['similarity']:.2f}"),
        ("moved", f"{100 * part['moved']:.0f} % of a latent's length, from where the mean token puts it"),
        ("mixing", f"{part['mixing_before']:.2f} with the mean token, {part['mixing']:.2f} now; 1 is a random order"),
        ("token", part["path"]),
    ]
    text = f"{part['platform']}\n{table(rows[0], rows[1:])}"
    if structure + 2 * part["structure_error"] < least:
        text += "\nshares less structure than any platform of the atlas: check gene symbols, organism and gene map"
    return text
