"""What a run will do: tasks with projected memory and content keys, checked before anything starts.

A task writes a whole immutable object, or the rows of some tiles of one that is being filled, or of two that hold the
same cells. Its body *skip if done → compute → write → receipt* is `run_task`, here and nowhere else. A task that runs
twice writes the same bytes, so retries, killed workers and two runs at once are harmless.

This module knows neither Dask nor biology: `lloki_atlas.engine.cluster` runs a plan, the stages write one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from lloki_atlas.engine.outputs import Filling, Output, publish_tiles, publishing
from lloki_atlas.errors import LlokiAtlasError, MemoryBudgetError
from lloki_atlas.store.arrays import write_arrays
from lloki_atlas.store.objects import is_complete


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
        Empty for the task that only publishes what tile tasks have filled. That of a task of several tiles (`streams`)
        is a generator, called with `starts` too, the tiles that are missing; for each it yields, in their order,
        `(start, {array name: rows})`, which are on disk before it is asked for the next.
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
    also
        Further objects of which the task fills the same tiles.
    streams
        Whether the function is a generator of tiles.
    device
        Whether the task wants the device of a GPU worker, where there is one.
    writes
        Bytes that the task writes at most, before compression, when it writes a whole object; what it writes of tiles
        follows from their arrays (`projected_writes`).
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
    also: tuple[Output, ...] = ()
    streams: bool = False
    device: bool = False
    writes: int = 0

    @property
    def projected_writes(self) -> int:
        """Bytes that the task will write at most, before compression."""
        return self.writes + sum(_tile_bytes(output) for output in self.outputs)

    @property
    def outputs(self) -> tuple[Output, ...]:
        """All objects that the task fills."""
        return (self.output, *self.also)


@dataclass(frozen=True)
class Plan:
    """Tasks in an order in which every task comes after those it requires.

    `commit` is called on the driver with the outcome and returns whatever the run returns (a catalog); `lease` is held
    from before the first task until after it.
    """

    tasks: tuple[Task, ...]
    commit: Callable[[Outcome], Any]
    lease: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def projected_memory(self) -> int:
        """Peak bytes of the largest task."""
        return max((task.projected_memory for task in self.tasks), default=0)

    def validate(self, memory_per_task: int | None, *, memory_per_device_task: int | None = None) -> None:
        """Refuse a plan with a task that does not fit.

        Parameters
        ----------
        memory_per_task
            Bytes that a task may use, None when there is no limit.
        memory_per_device_task
            Bytes that a task may use that wants a device; as much as any other when None.

        Raises
        ------
        MemoryBudgetError
            Naming the task, what it needs and what there is.
        """
        for task in self.tasks:
            limit = memory_per_task
            if task.device and memory_per_device_task is not None:
                limit = memory_per_device_task
            if limit is not None and task.projected_memory > limit:
                raise MemoryBudgetError(
                    f"{task.name} is projected to need {_megabytes(task.projected_memory)}, a worker has "
                    f"{_megabytes(limit)} a task: use workers with more memory, or make tile_cells, "
                    "slice_memory_mb or search_cells smaller"
                )

    def run(
        self, client: Any = None, *, progress: bool = True, n_workers: int | None = None, n_gpus: int | None = None
    ) -> Any:
        """Run on a Dask client, or on a local cluster made for this run.

        Parameters
        ----------
        client
            A `distributed.Client`; None makes a local cluster of `n_workers` processes.
        progress
            Show a bar with cells per second on standard error.
        n_workers
            Size of the local cluster; as many as there are cores when None.
        n_gpus
            GPU workers: how many of the local cluster, or how many of the client's to wait for. As many as there are
            when None; 0 runs everything on CPU.

        Returns
        -------
        The catalog at the version that holds the results.

        Raises
        ------
        MemoryBudgetError, ClusterError
            Before anything runs, when the workers are too small or missing.
        """
        from lloki_atlas.engine.cluster import run_plan

        with self.lease():
            return run_plan(self, client, progress=progress, n_workers=n_workers, n_gpus=n_gpus)

    def summary(self) -> dict[str, Any]:
        """Per stage and in all: tasks, memory of the largest task and bytes that are written; per stage also cells."""
        stages: dict[str, dict[str, int]] = {}
        for task in self.tasks:
            entry = stages.setdefault(task.stage, {"tasks": 0, "cells": 0, "projected_memory": 0, "writes": 0})
            entry["tasks"] += 1
            entry["cells"] += task.n_cells
            entry["projected_memory"] = max(entry["projected_memory"], task.projected_memory)
            entry["writes"] += task.projected_writes
        return {
            "tasks": len(self.tasks),
            "projected_memory": self.projected_memory,
            "writes": sum(entry["writes"] for entry in stages.values()),
            "stages": stages,
        }


def link(tasks: Iterable[Task]) -> tuple[Task, ...]:
    """Let every task require those of the same plan that publish what it reads.

    Objects that are already on disk need no task, so a plan that continues an earlier run links only what is left.
    """
    tasks = tuple(tasks)
    publisher = {task.output.path: task.name for task in tasks if not task.output.tiles}
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


def split_tiles(tasks: Iterable[Task]) -> tuple[Task, ...]:
    """Cut device tasks of several tiles into tasks of one, which many workers can share."""
    parts: dict[str, list[Task]] = {}
    for task in tasks:
        whole = replace(task, requires=tuple(part.name for name in task.requires for part in parts[name]))
        starts = task.output.tiles if task.device and len(task.output.tiles) > 1 else ()
        parts[task.name] = [_tile_of(whole, start) for start in starts] or [whole]
    return tuple(part for group in parts.values() for part in group)


def _tile_of(task: Task, start: int) -> Task:
    spec = next(iter(task.output.specs.values()))
    return replace(
        task,
        name=f"{task.name}/{start}",
        output=replace(task.output, tiles=(start,)),
        also=tuple(replace(output, tiles=(start,)) for output in task.also),
        n_cells=min(spec.chunk_rows, spec.shape[0] - start) if task.n_cells else 0,
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
    if task.until and is_complete(task.until):
        return True
    return all(not output.missing() if output.tiles else is_complete(output.path) for output in task.outputs)


def _compute(task: Task) -> None:
    output = task.output
    if not task.function:
        publish_tiles(output)
        return
    module, _, name = task.function.partition(":")
    compute = getattr(import_module(module), name)
    if output.folder:
        with publishing(output) as staging:
            Path(staging).mkdir(parents=True)
            compute(staging, **task.arguments)
        return
    if output.tiles:
        _fill_tiles(task, compute)
        return
    arrays = compute(**task.arguments)
    with publishing(output) as staging:
        write_arrays(staging, arrays, dims=dict(output.dims), attributes=dict(output.attributes))


def _fill_tiles(task: Task, compute: Callable[..., Any]) -> None:
    """Write every missing tile as it comes: a kill loses the tiles in flight and no others."""
    missing = {output.path: set(output.missing()) for output in task.outputs}
    starts = [start for start in task.output.tiles if any(start in left for left in missing.values())]
    made = compute(starts=starts, **task.arguments) if task.streams else compute(**task.arguments)
    tiles = made if task.streams else ((start, made) for start in starts)
    filling = {output.path: Filling(output) for output in task.outputs}
    with closing(tiles):
        for start, arrays in tiles:
            for output in task.outputs:
                if start not in missing[output.path]:
                    continue
                try:
                    filling[output.path].write(start, arrays)
                except (LlokiAtlasError, OSError):
                    # another run may have published this object, which takes the staging folder away, meanwhile
                    if not is_complete(output.path):
                        raise
                missing[output.path].discard(start)
    if any(missing.values()):
        raise RuntimeError(f"{task.name} ended without all of its tiles: {sorted(set().union(*missing.values()))}")


def _tile_bytes(output: Output) -> int:
    """Bytes of the tiles that a task fills of an object: their rows of every array."""
    total = 0
    for spec in output.specs.values():
        row_bytes = prod(spec.shape[1:]) * (16 if spec.is_text else np.dtype(spec.dtype).itemsize)
        rows = sum(min(spec.chunk_rows, spec.shape[0] - start) for start in output.tiles)
        total += rows * row_bytes
    return total


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"
