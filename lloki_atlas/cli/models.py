"""Commands that make models: pretrain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lloki_atlas.cli.atlas import Json, Quiet
from lloki_atlas.cli.output import emit


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(pretrain)


def pretrain(
    reference: Annotated[Path, typer.Argument(help="scRNA-seq counts, h5ad.")],
    out: Annotated[Path, typer.Argument(help="Folder of the checkpoint; made if missing.")],
    organism: Annotated[str, typer.Option("--organism", help="`mouse` or `human`.")],
    panels: Annotated[
        list[Path] | None,
        typer.Option(
            "--panels", help="A slice that will be embedded, for its genes and their mean counts; repeatable."
        ),
    ] = None,
    layers: Annotated[int, typer.Option("--layers", min=1, help="Transformer layers.")] = 3,
    width: Annotated[int, typer.Option("--width", min=1, max=512, help="Numbers of an embedding.")] = 128,
    heads: Annotated[int, typer.Option("--heads", min=1, help="Attention heads.")] = 4,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the reference.")] = 100,
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0, help="Begin no epoch that would end later.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed.")] = 0,
    layer: Annotated[str | None, typer.Option("--layer", help="Layer that holds the counts.", show_default="X")] = None,
    gene_map: Annotated[Path | None, typer.Option("--gene-map", help="Table: source symbol, canonical symbol.")] = None,
    device: Annotated[str, typer.Option("--device", help="A torch device, or `auto`.")] = "auto",
    precision: Annotated[str, typer.Option("--precision", help="`float32`, or `bfloat16` on CUDA.")] = "float32",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads of torch.", show_default="all cores")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train an embedder of scGPT's architecture on a scRNA-seq reference; run it again to continue."""
    from lloki_atlas.stages.pretrain import pretrain as train

    report = train(
        reference,
        out,
        organism=organism,
        panels=panels or (),
        layer=layer,
        gene_map=gene_map,
        minutes=minutes,
        device=device,
        n_threads=threads,
        progress=not quiet,
        n_layers=layers,
        width=width,
        n_heads=heads,
        n_epochs=epochs,
        precision=precision,
        random_state=seed,
    )
    done, loss = report["n_epochs_done"], report["history"][-1]["total"]
    emit(
        {"checkpoint": str(out), **report},
        as_json=as_json,
        text=f"{out}: {done} epochs, loss {loss:.3f}\nuse it: lloki-atlas create ... --embedder scgpt:{out}",
    )
