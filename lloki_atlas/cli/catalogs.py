"""Commands about a catalog as such: what it holds, its versions, and its housekeeping."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lloki_atlas.cli.output import emit, table

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Root = Annotated[str, typer.Argument(help="Folder of the catalog.")]
Version = Annotated[int | None, typer.Option("--version", help="An earlier version.", show_default="the newest")]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    for command in (status, sparsity, log, verify, remove, rollback, gc, export_version, import_version):
        app.command()(command)


def status(root: Root, version: Version = None, as_json: Json = False) -> None:
    """Say for each slice whether a stage's output is done, missing or stale, and which models encoded it."""
    from lloki_atlas.stages.lineage import STAGES
    from lloki_atlas.stages.status import status as describe
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
    text += "".join(f"\n{line}" for line in _reasons(state))
    emit(state, as_json=as_json, text=text)


def _reasons(state: dict[str, Any]) -> list[str]:
    """Why outputs are missing or stale, a line for all slices that share a reason; --json has them one by one."""
    shared: dict[tuple[str, str], list[str]] = {}
    for part in state["slices"]:
        for stage, why in part["reasons"].items():
            shared.setdefault((stage, why), []).append(part["slice_id"])
    from lloki_atlas.stages.status import NOT_RUN

    lines = []
    for (stage, why), names in shared.items():
        if why != NOT_RUN:
            lines.append(f"{stage} of {names[0] if len(names) == 1 else f'{len(names)} slices'}: {why}")
    return [*lines, f"autoencoder: {state['autoencoder_reason']}"] if state["autoencoder_reason"] else lines


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

    catalog = open_catalog(root)
    versions = sorted(history(catalog), key=lambda record: -record.version)
    content = [
        {
            "version": record.version,
            "time": record.time,
            "message": record.message,
            "slices": sorted(record.change.slices),
            "code_version": record.code_version,
            "retained": record.version >= catalog.state.oldest,
        }
        for record in versions
    ]
    rows = [
        (part["version"], part["time"], part["message"] if part["retained"] else f"{part['message']} (given up)")
        for part in content
    ]
    emit(content, as_json=as_json, text=table(["version", "time", "message"], rows))


def verify(
    root: Root,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte of every version that is retained.")] = False,
    version: Version = None,
    as_json: Json = False,
) -> None:
    """Compare records, receipts and sizes, or with --deep every byte; exit code 4 names what is damaged."""
    from lloki_atlas.errors import FormatError
    from lloki_atlas.store.catalog import list_versions, open_catalog
    from lloki_atlas.store.catalog import verify as read_version
    from lloki_atlas.store.verification import verify_deep, verify_quick

    if deep and version is None:
        problems = verify_deep(root)
        number = list_versions(root)[-1] if not problems else None
    else:
        catalog = open_catalog(root, version=version)
        problems = read_version(catalog) if deep else verify_quick(catalog)
        number = catalog.version
    what = "every version that is retained is whole" if deep and version is None else f"version {number} is whole"
    if not deep:
        what += ", as far as sizes tell: --deep reads every byte"
    emit({"version": number, "problems": problems}, as_json=as_json, text="\n".join(problems) or what)
    if problems:
        raise typer.Exit(FormatError.exit_code)


def remove(
    root: Root,
    slices: Annotated[list[str], typer.Argument(help="Slices to remove.")],
    as_json: Json = False,
) -> None:
    """Make a new version without some slices; earlier versions keep them."""
    from lloki_atlas.store.catalog import open_catalog
    from lloki_atlas.store.revert import remove as remove_slices

    catalog = remove_slices(open_catalog(root, mode="r+"), slices)
    left = len(catalog.state.slices)
    text = f"version {catalog.version}: without {', '.join(sorted(set(slices)))}; {left} slices left"
    emit({"version": catalog.version, "removed": sorted(set(slices)), "n_slices": left}, as_json=as_json, text=text)


def rollback(
    root: Root,
    to: Annotated[int, typer.Option("--to", help="The version to return to.")],
    as_json: Json = False,
) -> None:
    """Make a new version that says what an earlier one said; nothing of the history is lost."""
    from lloki_atlas.store.catalog import open_catalog
    from lloki_atlas.store.revert import rollback as roll_back

    before = open_catalog(root, mode="r+")
    catalog = roll_back(before, to)
    same = catalog.version == before.version
    text = f"version {catalog.version} " + ("says that already" if same else f"says what version {to} said")
    emit({"version": catalog.version, "to": to}, as_json=as_json, text=text)


def gc(
    root: Root,
    keep_versions: Annotated[
        int | None, typer.Option("--keep-versions", help="Give up all but so many versions.", show_default="keep all")
    ] = None,
    grace_hours: Annotated[float, typer.Option("--grace-hours", help="Leave alone what is younger.")] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Remove objects that no retained version reaches, and what interrupted runs left behind."""
    from lloki_atlas.store.catalog import open_catalog
    from lloki_atlas.store.retention import gc as collect

    catalog = open_catalog(root, mode="r" if dry_run else "r+")
    found = collect(catalog, keep_versions=keep_versions, grace_hours=grace_hours, dry_run=dry_run)
    n_young = f", {found.n_young} too young to go" if found.n_young else ""
    n_versions = f", {len(found.versions)} versions given up" if found.versions else ""
    text = (
        f"{'would remove' if dry_run else 'removed'} {len(found.objects)} objects, {len(found.leftovers)} leftovers, "
        f"{found.n_bytes / 1e6:,.1f} MB{n_versions}{n_young}"
    )
    emit(found.to_json(), as_json=as_json, text=text)


def export_version(
    root: Root,
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    version: Version = None,
    as_json: Json = False,
) -> None:
    """Write one version with all its objects into a folder that is a catalog of its own."""
    from lloki_atlas.store.catalog import open_catalog
    from lloki_atlas.store.portable import export_version as export

    catalog = open_catalog(root, version=version)
    exported = export(catalog, out)
    n_slices, n_objects = len(exported.state.slices), len(exported.state.objects)
    content = {
        "version": catalog.version,
        "root": str(exported.root),
        "n_slices": n_slices,
        "n_objects": n_objects,
    }
    text = f"{exported.root}: version {catalog.version}, {n_slices} slices, {n_objects} objects"
    emit(content, as_json=as_json, text=text)


def import_version(
    root: Root,
    folder: Annotated[str, typer.Argument(help="The other catalog, such as an exported folder.")],
    slices: Annotated[
        list[str] | None, typer.Option("--slices", help="Slice to take; repeatable.", show_default="all")
    ] = None,
    version: Annotated[
        int | None, typer.Option("--version", help="Version of the other catalog.", show_default="the newest")
    ] = None,
    as_json: Json = False,
) -> None:
    """Take slices of another catalog into this one; every byte is checked on the way."""
    from lloki_atlas.store.catalog import open_catalog
    from lloki_atlas.store.portable import import_version as take

    before = open_catalog(root, mode="r+")
    catalog = take(before, folder, slices=slices or None, version=version)
    taken = sorted(set(catalog.state.slices) - set(before.state.slices))
    text = f"version {catalog.version}: took {', '.join(taken)}" if taken else "nothing to take"
    emit({"version": catalog.version, "slices": taken}, as_json=as_json, text=text)
