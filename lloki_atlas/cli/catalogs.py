"""Commands about a catalog as such: status, sparsity, log, verify."""

from __future__ import annotations

from typing import Annotated

import typer

from lloki_atlas.cli.output import emit, table

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Root = Annotated[str, typer.Argument(help="Folder of the catalog.")]
Version = Annotated[int | None, typer.Option("--version", help="An earlier version.", show_default="the newest")]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    for command in (status, sparsity, log, verify):
        app.command()(command)


def status(root: Root, version: Version = None, as_json: Json = False) -> None:
    """Say for each slice whether a stage's output is done, missing or stale, and which models encoded it."""
    from lloki_atlas.stages.lineage import STAGES
    from lloki_atlas.stages.pipeline import status as describe
    from lloki_atlas.store.catalog import open_catalog

    state = describe(open_catalog(root, version=version))
    rows = [
        (
            *(part["slice_id"], part["technology"], f"{part['n_cells']:,}", part["n_genes"]),
            *part["stages"].values(),
            *(part[name] or "-" for name in ("autoencoder", "token")),
        )
        for part in state["slices"]
    ]
    text = f"version {state['version']}, {state['n_cells']:,} cells\n" + table(
        ["slice", "technology", "cells", "genes", *STAGES, "autoencoder", "token"], rows
    )
    emit(state, as_json=as_json, text=text)


def sparsity(root: Root, version: Version = None, as_json: Json = False) -> None:
    """Compare each slice's sparsity before and after propagation with the target taken from the reference."""
    from lloki_atlas.stages.reports import propagation_report
    from lloki_atlas.store.catalog import open_catalog

    reports = propagation_report(open_catalog(root, version=version))
    rows = []
    for report in reports:
        found, correlation = report["sparsity"], report["sparsity"]["target_correlation"]
        means = [f"{found[name]['mean']:.3f}" for name in ("own", "target", "achieved", "reference")]
        rows.append(
            [
                report["slice_id"],
                found["n_genes"],
                *means,
                f"{100 * found['cells_with_budget']:.1f} %",
                "-" if correlation is None else f"{correlation:.3f}",
                report["n_iterations"],
                f"{min(report['recall']):.3f}",
            ]
        )
    header = ["slice", "genes", "own", "target", "achieved", "reference", "may fill in", "correlation", "iterations"]
    text = "mean share of shared genes without a count\n" + table([*header, "recall"], rows)
    emit(reports, as_json=as_json, text=text)


def log(root: Root, as_json: Json = False) -> None:
    """List the versions, newest first."""
    from lloki_atlas.store.catalog import history, open_catalog

    versions = sorted(history(open_catalog(root)), key=lambda record: -record.version)
    content = [
        {
            "version": record.version,
            "time": record.time,
            "message": record.message,
            "slices": sorted(record.change.slices),
            "code_version": record.code_version,
        }
        for record in versions
    ]
    rows = [(part["version"], part["time"], part["message"]) for part in content]
    emit(content, as_json=as_json, text=table(["version", "time", "message"], rows))


def verify(root: Root, version: Version = None, as_json: Json = False) -> None:
    """Read every object of a version again and compare it with its digest; exit code 4 if one is damaged."""
    from lloki_atlas.errors import FormatError
    from lloki_atlas.store.catalog import open_catalog
    from lloki_atlas.store.catalog import verify as check

    catalog = open_catalog(root, version=version)
    problems = check(catalog)
    emit(
        {"version": catalog.version, "problems": problems},
        as_json=as_json,
        text="\n".join(problems) or f"version {catalog.version} is whole",
    )
    if problems:
        raise typer.Exit(FormatError.exit_code)
