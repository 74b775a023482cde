"""Ingest of hundreds of sources: a task each, in parallel, and a commit for every batch of them.

A task leaves the slice's object and an answer in the staging area: the record to commit, that there is nothing to do,
or why the source is refused. So a source that cannot be used sinks no other, and what is committed is decided on the
driver. A crash loses the answers of a batch and no object: those are found again by their keys.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from dataclasses import replace as replaced
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from lloki_atlas.config import canonical_json, to_dict
from lloki_atlas.engine.outputs import Output
from lloki_atlas.engine.plan import Outcome, Plan, Task
from lloki_atlas.errors import ConflictError, InputError, LlokiAtlasError
from lloki_atlas.stages.ingest import make_slice
from lloki_atlas.stages.ingest_memory import ingest_memory, source_size
from lloki_atlas.stages.lineage import atlas_config
from lloki_atlas.stages.manifest import SliceSource
from lloki_atlas.stages.source_lists import Given, find_sources
from lloki_atlas.store.catalog import Catalog, commit, open_catalog
from lloki_atlas.store.durable import remove_tree
from lloki_atlas.store.leases import writing
from lloki_atlas.store.objects import receipt_path
from lloki_atlas.store.places import place
from lloki_atlas.store.records import CatalogState, Change, SliceRecord

# slices a commit: of 500 make 8 versions, and a crash has at most so many sources read again
BATCH = 64
ANSWER = "answer.json"
# what a slice source says beside how it is read
_NOT_READ = ("source", "slice_id", "url")

# what a task says of a source: `record`, JSON-like, None where the catalog has the slice already; or `refused`, why
Answer = dict[str, Any]


@dataclass(frozen=True)
class Ingested:
    """What became of many sources, by slice id; `refused` holds a sentence each.

    `catalog` is at the version that holds what was taken.
    """

    catalog: Catalog
    added: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)


def ingest_many(
    catalog: Catalog,
    sources: Given | Iterable[Given],
    *,
    client: Any = None,
    n_workers: int | None = None,
    progress: bool = True,
    replace: bool | None = None,
    all_or_nothing: bool = False,
    batch: int = BATCH,
    technology: str | None = None,
    organism: str | None = None,
    coordinate_unit: str | None = None,
    um_per_unit: float | None = None,
    spatial_key: str | None = None,
    label_key: str | Sequence[str] | None = None,
    layer: str | None = None,
    slice_key: str | None = None,
    table: str | None = None,
    empty_cells: str | None = None,
    accept_normalized: bool | None = None,
    gene_map: str | Path | None = None,
) -> Ingested:
    """Add many slices to a catalog in parallel.

    Parameters
    ----------
    catalog
        Open for commits, with a reference.
    sources
        One or several of: a source, a pattern, a folder of sources, a sheet with a line a slice, a `SliceSource`; see
        `find_sources`. A slice is called like its file where nothing else is said.
    client, n_workers
        A `distributed.Client`, or the size of a local cluster made for this; workers need no GPU.
    progress
        Show a bar with cells per second on standard error.
    replace
        As for `ingest`; None makes a source that changed where it was a new version of its slice.
    all_or_nothing
        Refuse all sources when one is refused, and make one version of all.
    batch
        Slices a commit.
    technology, organism, coordinate_unit, um_per_unit, spatial_key, label_key, layer, slice_key, table, empty_cells,
    accept_normalized, gene_map
        As for `ingest`, of every slice whose sheet does not say otherwise.

    Returns
    -------
    Ingested
        The catalog, and what became of every slice; the same catalog when nothing is new.

    Raises
    ------
    InputError
        Before anything runs, when there is no source, a sheet cannot be used, or two slices have one id; with
        `all_or_nothing` when a source is refused, and then nothing was committed.
    ClusterError
        When there are no workers.
    """
    if catalog.mode == "r":
        raise InputError(f"{catalog.root} is open for reading: open it with mode='r+' to ingest")
    if catalog.state.reference is None:
        raise InputError(f"{catalog.root} has no reference: create it with a scRNA-seq reference, then ingest slices")
    if batch < 1:
        raise InputError(f"batch is {batch}: it has to be at least 1")
    entries = find_sources(
        sources,
        technology=technology,
        organism=organism,
        coordinate_unit=coordinate_unit,
        um_per_unit=um_per_unit,
        spatial_key=spatial_key,
        label_key=list(label_key) if isinstance(label_key, tuple | list) else label_key,
        layer=layer,
        slice_key=slice_key,
        table=table,
        empty_cells=empty_cells,
        accept_normalized=accept_normalized,
        gene_map=None if gene_map is None else str(Path(gene_map).expanduser().absolute()),
    )
    from lloki_atlas.engine.cluster import local_client, memory_per_task

    workers = min(n_workers or os.cpu_count() or 1, len(entries))
    done = Ingested(catalog)
    used_client = nullcontext(client) if client is not None else local_client(workers, 0)
    with writing(catalog.root, "ingest"), used_client as used:
        tasks = _plan_tasks(catalog, entries, replace=replace)
        fitting, too_large = _split_by_memory(tasks, memory_per_task(used))
        done = _taken(done, too_large, whole=all_or_nothing)
        size = len(fitting) if all_or_nothing else batch
        groups = [fitting[first : first + size] for first in range(0, len(fitting), size or 1)]
        for number, group in enumerate(groups, start=1):
            stage = "ingest" if len(groups) == 1 else f"ingest {number}/{len(groups)}"
            answers, defect = _run([replaced(task, stage=stage) for task in group], used, progress=progress)
            done = _taken(done, answers, whole=all_or_nothing)
            if defect is not None:
                raise defect
    return done


def answer(
    staging: str, root: str, state: dict[str, Any], source: str, slice_id: str, options: dict[str, Any],
    replace: bool | None,
) -> None:  # fmt: skip
    """Task body: publish the slice of one source, and write into `staging` what is to be committed, or why not."""
    slices = {name: SliceRecord.from_json(record) for name, record in state["slices"].items()}
    known = CatalogState(config=state["config"], reference=state["reference"], slices=slices)
    content: dict[str, Any]
    with warnings.catch_warnings():
        # what libraries remark on a source would be said by every worker
        warnings.simplefilter("ignore")
        try:
            record = make_slice(
                Catalog(place(root), 0, known, "r+"), source, slice_id=slice_id, replace=replace, **options
            )
        except LlokiAtlasError as error:
            if isinstance(error, OSError):  # not the source, but where the catalog is
                raise
            content = {"refused": str(error)}
        else:
            content = {"record": None if record is None else record.to_json()}
    (Path(staging) / ANSWER).write_bytes(canonical_json(content))


def _plan_tasks(catalog: Catalog, entries: Sequence[SliceSource], *, replace: bool | None) -> list[Task]:
    """One task a slice."""
    run = uuid4().hex[:8]
    sizes = cache(source_size)
    config = {"tile": to_dict(atlas_config(catalog).tile)}
    tasks = []
    for number, entry in enumerate(entries):
        name = str(entry.slice_id)
        held = catalog.state.slices.get(name)
        size = sizes(entry.source, layer=entry.layer, table=entry.table)
        ticket = str(catalog.path("staging", f"ingest-{run}-{number}"))
        tasks.append(
            Task(
                name=f"ingest/{name}",
                stage="ingest",
                function="lloki_atlas.stages.ingest_many:answer",
                arguments={
                    "root": str(catalog.root),
                    "state": {
                        "config": config,
                        "reference": catalog.state.reference,
                        "slices": {} if held is None else {name: held.to_json()},
                    },
                    "source": entry.source,
                    "slice_id": name,
                    "options": {field: value for field, value in asdict(entry).items() if field not in _NOT_READ},
                    "replace": replace,
                },
                output=Output(ticket, ticket, {"stage": "ingest", "slice_id": name}, folder=True),
                n_cells=max(size.n_cells, 1),
                projected_memory=ingest_memory(size),
                slice_id=name,
            )
        )
    return tasks


def _split_by_memory(tasks: Sequence[Task], limit: int | None) -> tuple[list[Task], dict[str, Answer]]:
    """Tasks that fit a worker, and refusals of the others."""
    too_large = [task for task in tasks if limit is not None and task.projected_memory > limit]
    refused: dict[str, Answer] = {
        str(task.slice_id): {
            "refused": f"{task.arguments['source']} is projected to need {task.projected_memory / 2**20:,.0f} MiB, a "
            f"worker has {(limit or 0) / 2**20:,.0f} MiB a task: use fewer workers, or some with more memory"
        }
        for task in too_large
    }
    return [task for task in tasks if task.slice_id not in refused], refused


def _run(tasks: Sequence[Task], client: Any, *, progress: bool) -> tuple[dict[str, Answer], BaseException | None]:
    """Run tasks: their answers, and an error that is not of a source."""
    outcomes: list[Outcome] = []
    try:
        try:
            Plan(tuple(tasks), commit=outcomes.append).run(client, progress=progress, n_gpus=0)
        except Exception:
            if not outcomes:  # nothing was started
                raise
        failed = outcomes[0].failed
        answers: dict[str, Answer] = {}
        for task in tasks:
            if task.name not in failed:
                answers[str(task.slice_id)] = json.loads((place(task.output.path) / ANSWER).read_bytes())
            elif type(failed[task.name]).__name__ == "KilledWorker":
                answers[str(task.slice_id)] = {
                    "refused": f"{task.arguments['source']} killed its workers again and again: give them more memory"
                }
        others = [failed[task.name] for task in tasks if str(task.slice_id) not in answers]
        return answers, next(iter(others), None)
    finally:
        for task in tasks:
            remove_tree(task.output.path)
            receipt_path(place(task.output.path)).unlink(missing_ok=True)


def _taken(done: Ingested, answers: Mapping[str, Answer], *, whole: bool) -> Ingested:
    """Commit the records among the answers; with `whole` only if no source is refused."""
    refused = {name: str(given["refused"]) for name, given in answers.items() if "refused" in given}
    if whole and refused:
        name, reason = next(iter(refused.items()))
        others = f" (and {len(refused) - 1} more are refused)" if len(refused) > 1 else ""
        raise InputError(f"nothing was ingested, '{name}' cannot be: {reason}{others}")
    records = {name: SliceRecord.from_json(given["record"]) for name, given in answers.items() if given.get("record")}
    unchanged = tuple(name for name in answers if name not in records and name not in refused)
    catalog, conflicts = _commit(done.catalog, records)
    taken = [name for name in records if name not in conflicts]
    return Ingested(
        catalog,
        added=(*done.added, *(name for name in taken if name not in done.catalog.state.slices)),
        replaced=(*done.replaced, *(name for name in taken if name in done.catalog.state.slices)),
        unchanged=(*done.unchanged, *unchanged),
        refused={**done.refused, **refused, **conflicts},
    )


def _commit(catalog: Catalog, records: Mapping[str, SliceRecord]) -> tuple[Catalog, dict[str, str]]:
    """Make a version of all slices but those that another writer was first with, which are refused."""
    conflicts: dict[str, str] = {}
    while left := {name: record for name, record in records.items() if name not in conflicts}:
        message = f"ingest {len(left)} slices" if len(left) > 1 else f"ingest {next(iter(left))}"
        try:
            return commit(catalog, Change(slices=left), message=message), conflicts
        except ConflictError:
            head = open_catalog(catalog.root, mode="r+")
            theirs = [name for name in left if head.state.slices.get(name) != catalog.state.slices.get(name)]
            if not theirs:
                raise
            conflicts |= dict.fromkeys(theirs, "another writer changed this slice meanwhile: ingest it again")
            catalog = head
    return catalog, conflicts
