"""What a run will do: tasks with projected memory and content keys, checked before anything starts.

Every task writes one thing: a whole immutable object, or the rows of one tile in an object that is being filled.
Its body *skip if done → compute → write → receipt* is `run_task`, here and nowhere else. A task that runs twice
writes the same bytes, so retries, killed workers and two runs at once are harmless.

This module knows neither Dask nor biology: `lloki_atlas.engine.cluster` runs a plan, the stages write one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from lloki_atlas.config import canonical_json
from lloki_atlas.errors import FormatError, LlokiAtlasError, MemoryBudgetError
from lloki_atlas.store.arrays import ArraySpec, create_arrays, read_rows, write_arrays, write_rows
from lloki_atlas.store.objects import is_complete, publish, write_durable


@dataclass(frozen=True)
class Output:
    """Where a task's result goes.

    Parameters
    ----------
    path
        The finished object, `<root>/<kind>/<key>...`.
    staging
        Where it is filled before it is published by one rename.
    lineage
        What the object was made of; part of its receipt.
    rows
        None when the task writes the whole object, else the first row of its tile.
    specs
        The arrays of an object that is filled tile by tile.
    dims
        Dimension names per array of an object that is written whole.
    attributes
        Attributes of the object.
    folder
        True when the task's function fills the staging folder by itself.
    """

    path: str
    staging: str
    lineage: Mapping[str, Any]
    rows: int | None = None
    specs: Mapping[str, ArraySpec] = field(default_factory=dict)
    dims: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    folder: bool = False

    @property
    def marker(self) -> Path:
        """The file that says that this tile's rows are on disk."""
        return Path(f"{self.staging}.tiles") / f"{self.rows}.json"


@dataclass(frozen=True)
class Task:
    """One unit of work.

    Parameters
    ----------
    name
        Unique within the plan, such as `embed/slice_1/4096`.
    stage
        Name of the stage, for progress and for the report of a plan.
    function
        `module:function`; called with `arguments`, returns `{array name: array}` (or None when it fills a folder).
        Empty for the task that only publishes what tile tasks have filled.
    arguments
        Plain values only: paths, numbers, settings.
    output
        Where the result goes.
    requires
        Names of tasks of the same plan that have to be done before.
    n_cells
        Cells the task treats, for the rate in the progress bar.
    projected_memory
        Peak host memory above the worker's own, in bytes.
    slice_id
        The slice it belongs to, if it belongs to one.
    until
        An object that makes the task superfluous once it is there, whatever became of the task's own output; "" for
        none.
    """

    name: str
    stage: str
    function: str
    arguments: Mapping[str, Any]
    output: Output
    requires: tuple[str, ...] = ()
    n_cells: int = 0
    projected_memory: int = 0
    slice_id: str | None = None
    until: str = ""


@dataclass(frozen=True)
class Plan:
    """Tasks in an order in which every task comes after those it requires.

    `commit` is called on the driver with the outcome and returns whatever the run returns (a catalog).
    """

    tasks: tuple[Task, ...]
    commit: Callable[[Outcome], Any]

    @property
    def projected_memory(self) -> int:
        """Peak bytes of the largest task."""
        return max((task.projected_memory for task in self.tasks), default=0)

    def validate(self, memory_per_task: int | None) -> None:
        """Refuse a plan with a task that does not fit.

        Parameters
        ----------
        memory_per_task
            Bytes that a task may use, None when there is no limit.

        Raises
        ------
        MemoryBudgetError
            Naming the task, what it needs and what there is.
        """
        if memory_per_task is None:
            return
        for task in self.tasks:
            if task.projected_memory > memory_per_task:
                raise MemoryBudgetError(
                    f"{task.name} is projected to need {_megabytes(task.projected_memory)}, a worker has "
                    f"{_megabytes(memory_per_task)} a task: use workers with more memory, or make tile_cells, "
                    "slice_memory_mb or search_cells smaller"
                )

    def run(self, client: Any = None, *, progress: bool = True, n_workers: int | None = None) -> Any:
        """Run on a Dask client, or on a local cluster made for this run.

        Parameters
        ----------
        client
            A `distributed.Client`; None makes a local cluster of `n_workers` processes.
        progress
            Show a bar with cells per second on standard error.
        n_workers
            Size of the local cluster; as many as there are cores when None.

        Returns
        -------
        The catalog at the version that holds the results.

        Raises
        ------
        MemoryBudgetError, ClusterError
            Before anything runs, when the workers are too small or missing.
        """
        from lloki_atlas.engine.cluster import run_plan

        return run_plan(self, client, progress=progress, n_workers=n_workers)

    def summary(self) -> dict[str, Any]:
        """Per stage: tasks, cells and the largest task's bytes."""
        stages: dict[str, dict[str, int]] = {}
        for task in self.tasks:
            entry = stages.setdefault(task.stage, {"tasks": 0, "cells": 0, "projected_memory": 0})
            entry["tasks"] += 1
            entry["cells"] += task.n_cells
            entry["projected_memory"] = max(entry["projected_memory"], task.projected_memory)
        return {"tasks": len(self.tasks), "projected_memory": self.projected_memory, "stages": stages}


def link(tasks: Iterable[Task]) -> tuple[Task, ...]:
    """Let every task require those of the same plan that publish what it reads.

    Objects that are already on disk need no task, so a plan that continues an earlier run links only what is left.
    """
    tasks = tuple(tasks)
    publisher = {task.output.path: task.name for task in tasks if task.output.rows is None}
    return tuple(
        replace(
            task,
            requires=tuple(
                dict.fromkeys(
                    [*task.requires, *(publisher[text] for text in _texts(task.arguments) if text in publisher)]
                )
            ),
        )
        for task in tasks
    )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


@dataclass(frozen=True)
class Outcome:
    """What a run came to: names of tasks that are done, and why others are not."""

    done: frozenset[str]
    failed: Mapping[str, BaseException]


def run_task(task: Task, *dependencies: Any) -> str:
    """Skip if done → compute → write → receipt. Returns the task's name.

    `dependencies` are the names of finished tasks: Dask hands them in, only their being there matters.
    """
    if _is_done(task):
        return task.name
    try:
        _compute(task)
    except (LlokiAtlasError, OSError):
        # another run may have finished, and cleaned up behind itself, meanwhile
        if not _is_done(task):
            raise
    return task.name


def _is_done(task: Task) -> bool:
    output = task.output
    superfluous = bool(task.until) and is_complete(task.until)
    return superfluous or is_complete(output.path) or (output.rows is not None and output.marker.exists())


def _compute(task: Task) -> None:
    output = task.output
    if not task.function:
        _publish_tiles(output)
        return
    module, _, name = task.function.partition(":")
    compute = getattr(import_module(module), name)
    if output.folder:
        with _own_staging(output) as staging:
            Path(staging).mkdir(parents=True)
            compute(staging, **task.arguments)
        return
    arrays = compute(**task.arguments)
    if output.rows is None:
        with _own_staging(output) as staging:
            write_arrays(staging, arrays, dims=dict(output.dims), attributes=dict(output.attributes))
    else:
        create_arrays(output.staging, dict(output.specs), attributes=dict(output.attributes))
        for array_name, values in arrays.items():
            write_rows(output.staging, array_name, output.rows, values)
        output.marker.parent.mkdir(parents=True, exist_ok=True)
        stored = {name: np.asarray(values, dtype=output.specs[name].dtype) for name, values in arrays.items()}
        write_durable(output.marker, canonical_json({"sha256": _rows_digest(stored)}))


@contextmanager
def _own_staging(output: Output) -> Iterator[str]:
    """A folder of this attempt's own, published at the end: two runs at once never write into each other's."""
    staging = f"{output.staging}-{uuid4().hex[:8]}"
    try:
        yield staging
        publish(staging, output.path, lineage=dict(output.lineage))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish_tiles(output: Output) -> None:
    _check_tiles(output)
    # markers go first: one that outlived the rows it speaks of would let them be skipped for ever
    shutil.rmtree(f"{output.staging}.tiles", ignore_errors=True)
    publish(output.staging, output.path, lineage=dict(output.lineage))


def _check_tiles(output: Output) -> None:
    """Compare the rows on disk with their markers: a marker may outlive its rows when the power fails.

    Raises
    ------
    FormatError
        After the marker is gone, so that the next run fills the tile again.
    """
    for marker in sorted(Path(f"{output.staging}.tiles").glob("*.json")):
        start = int(marker.stem)
        rows = {
            name: read_rows(output.staging, name, start, min(start + spec.chunk_rows, spec.shape[0]))
            for name, spec in output.specs.items()
        }
        if json.loads(marker.read_bytes())["sha256"] != _rows_digest(rows):
            marker.unlink()
            raise FormatError(f"rows {start} and on of {output.staging} are not what was written: run again")


def _rows_digest(arrays: Mapping[str, np.ndarray]) -> str:
    state = hashlib.sha256()
    for name in sorted(arrays):
        state.update(name.encode())
        state.update(np.ascontiguousarray(arrays[name]).tobytes())
    return state.hexdigest()


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"
