"""Commands that make an atlas: demo, simulate, build, create, configure, plan, run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from lloki_atlas.cli.output import emit, table

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Worker processes of the local cluster; as many as cores by default."),
]
Gpus = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        min=0,
        help="GPU workers: of the local cluster, or of the scheduler's to wait for; 0: none.",
        show_default="all there are",
    ),
]
DeviceMemory = Annotated[
    int | None,
    typer.Option(
        "--device-memory", min=1, help="Most of a GPU's memory for this run, MiB.", show_default="the atlas's"
    ),
]
Cluster = Annotated[str, typer.Option("--cluster", help="`local`, or the address of a scheduler, tcp://host:8786.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Root = Annotated[str, typer.Argument(help="Folder of the catalog, or an address such as s3://bucket/atlas.")]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    for command in (demo, simulate, build, create, configure, plan, run):
        app.command()(command)


def demo(
    folder: Annotated[Path, typer.Argument(help="Where to put it; made if missing.")] = Path("lloki-atlas-demo"),
    cells: Annotated[int, typer.Option("--cells", help="Cells to simulate, over four slices.")] = 6000,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Simulate four slices of four platforms, build an atlas of them and ask it a question."""
    from lloki_atlas.cli.tour import tour
    from lloki_atlas.simulation import simulate as make
    from lloki_atlas.stages.build import build as construct

    typer.echo(f"simulating {cells:,} cells of four platforms in {folder / 'sources'}", err=True)
    manifest = make(folder / "sources", n_cells=cells)
    typer.echo(tour(construct(manifest, root=folder / "atlas", n_workers=workers, progress=not quiet)))


def simulate(
    folder: Annotated[Path, typer.Argument(help="Where to put the files.")],
    cells: Annotated[int, typer.Option("--cells", help="Cells in all.")] = 8000,
    slices: Annotated[int, typer.Option("--slices", help="Slices; platforms take turns.")] = 4,
    seed: Annotated[int, typer.Option("--seed", help="Seed.")] = 0,
    as_json: Json = False,
) -> None:
    """Write seeded slices of four platforms, a matching reference and a manifest (`atlas.toml`)."""
    from lloki_atlas.simulation import simulate as make

    manifest = make(folder, n_cells=cells, n_slices=slices, random_state=seed)
    emit({"manifest": str(manifest)}, as_json=as_json, text=f"{manifest}\nbuild it: lloki-atlas build {manifest}")


def build(
    manifest: Annotated[Path, typer.Argument(help="A manifest, such as catalogs/mouse-cortex.toml.")],
    root: Annotated[
        str | None, typer.Option("--root", help="Folder or address of the catalog.", show_default="NAME.atlas")
    ] = None,
    until: Annotated[str, typer.Option("--until", help="Last stage.")] = "integrate",
    workers: Workers = None,
    gpus: Gpus = None,
    device_memory: DeviceMemory = None,
    cluster: Cluster = "local",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Build the atlas of a manifest, start to end; run it again to continue."""
    from lloki_atlas.stages.build import build as construct
    from lloki_atlas.stages.status import status

    with client_of(cluster) as client:
        catalog = construct(
            manifest,
            root=root,
            until=until,
            client=client,
            n_workers=workers,
            n_gpus=gpus,
            device_memory_mb=device_memory,
            progress=not quiet,
        )
    state = status(catalog)
    emit(
        {"root": str(catalog.root), **state},
        as_json=as_json,
        text=f"{catalog.root}: version {catalog.version}, {state['n_cells']:,} cells in {len(state['slices'])} slices",
    )


def create(
    root: Root,
    reference: Annotated[Path, typer.Option("--reference", help="scRNA-seq counts, h5ad.")],
    organism: Annotated[str, typer.Option("--organism", help="mouse or human.")],
    embedder: Annotated[
        str, typer.Option("--embedder", help="`reference`, or `scgpt:CHECKPOINT_FOLDER`.")
    ] = "reference",
    label_key: Annotated[str | None, typer.Option("--label-key", help="Cell types in the reference's obs.")] = None,
    settings: Annotated[Path | None, typer.Option("--settings", help="TOML: tables `tile`, `propagation`, …")] = None,
    as_json: Json = False,
) -> None:
    """Create an empty catalog with its scRNA-seq reference and embedder."""
    from lloki_atlas.config import AtlasConfig, load_toml
    from lloki_atlas.stages.create import create_catalog

    catalog = create_catalog(
        root,
        reference=reference,
        organism=organism,
        label_key=label_key,
        embedder=embedder,
        config=AtlasConfig.from_dict(load_toml(settings)) if settings else None,
    )
    emit({"root": str(root), "version": catalog.version}, as_json=as_json, text=f"{root}: version {catalog.version}")


def configure(
    root: Root,
    settings: Annotated[
        list[str], typer.Option("--set", help="section.name=value, such as propagation.alpha=0.5; repeatable.")
    ],
    as_json: Json = False,
) -> None:
    """Change settings of a catalog; `status` says what becomes stale, and `run` makes it again."""
    from lloki_atlas.stages.configure import configure as change
    from lloki_atlas.stages.configure import parse_settings
    from lloki_atlas.store.catalog import open_catalog

    catalog = change(open_catalog(root, mode="r+"), parse_settings(settings))
    emit({"version": catalog.version}, as_json=as_json, text=f"version {catalog.version}")


def plan(
    root: Root, until: Annotated[str, typer.Option(help="Last stage.")] = "integrate", as_json: Json = False
) -> None:
    """Say what a run would do, stage by stage: tasks, cells, memory of a task, and bytes that it writes at most."""
    from lloki_atlas.stages.pipeline import plan as make
    from lloki_atlas.store.catalog import open_catalog

    summary = make(open_catalog(root), until=until).summary()
    rows = [
        (
            *(stage, part["tasks"], f"{part['cells']:,}"),
            *(f"{part[name] / 2**20:,.0f} MiB" for name in ("projected_memory", "writes")),
        )
        for stage, part in summary["stages"].items()
    ]
    text = table(["stage", "tasks", "cells", "memory a task", "writes at most"], rows) if rows else "nothing to do"
    emit(summary, as_json=as_json, text=text)


def run(
    root: Root,
    until: Annotated[str, typer.Option("--until", help="Last stage.")] = "integrate",
    slices: Annotated[
        list[str] | None, typer.Option("--slices", help="Slice id; repeatable.", show_default="all")
    ] = None,
    workers: Workers = None,
    gpus: Gpus = None,
    device_memory: DeviceMemory = None,
    cluster: Cluster = "local",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run everything that is missing or stale, and commit it."""
    from lloki_atlas.stages.pipeline import run as execute
    from lloki_atlas.store.catalog import open_catalog

    with client_of(cluster) as client:
        catalog = execute(
            open_catalog(root, mode="r+"),
            client=client,
            n_workers=workers,
            n_gpus=gpus,
            device_memory_mb=device_memory,
            progress=not quiet,
            until=until,
            slices=slices or None,
        )
    emit({"version": catalog.version}, as_json=as_json, text=f"version {catalog.version}")


@contextmanager
def client_of(cluster: str) -> Iterator[Any]:
    """Connect to a scheduler's address; `local` leaves it to the run to make its own workers."""
    if cluster == "local":
        yield None
        return
    from lloki_atlas.engine.cluster import connect

    with connect(cluster) as client:
        yield client
