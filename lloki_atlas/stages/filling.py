"""Tasks that fill the arrays of a slice tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lloki_atlas.engine.outputs import Output
from lloki_atlas.engine.plan import Task
from lloki_atlas.store.arrays import ArraySpec
from lloki_atlas.store.catalog import Catalog
from lloki_atlas.store.records import SliceRecord
from lloki_atlas.store.slices import SliceStore


def tiled_output(
    catalog: Catalog,
    record: SliceRecord,
    key: str,
    *,
    array: tuple[str, int, str],
    lineage: dict[str, Any],
    path: str = "",
) -> Output:
    """Where one (n_cells, size) array of a slice goes, one chunk a tile.

    Parameters
    ----------
    catalog, record, key
        The slice, and the key of the stage's output.
    array
        Name, size and dtype.
    lineage
        What the array is made of.
    path
        Given for an array on the way to the stage's output.
    """
    name, size, dtype = array
    return Output(
        path=path or str(catalog.path("embeddings", key)),
        staging=f"{path}.new" if path else str(catalog.path("staging", key)),
        lineage=lineage,
        attributes={"slice_id": record.slice_id},
        specs={
            name: ArraySpec(
                shape=(record.n_cells, size),
                dtype=dtype,
                chunk_rows=min(tile_cells(catalog, record), record.n_cells),
                dims=("cell", f"{name}_dimension"),
                attributes={},
            )
        },
    )


def tile_tasks(
    record: SliceRecord,
    output: Output,
    *,
    stage: str,
    function: str,
    arguments: dict[str, Any],
    memory: Callable[[int], int],
    until: str = "",
    step: str = "",
) -> list[Task]:
    """One task a tile, called with `start` and `stop`, and the task that publishes.

    Parameters
    ----------
    record, output
        The slice, and what is filled.
    stage, function, arguments
        As in `Task`.
    memory
        Projected bytes of a task of so many cells.
    until
        What makes the tasks superfluous, for an array on the way to another.
    step
        Part of their names, for such an array; its cells do not count.
    """
    size = _chunk_rows(output)
    prefix = _prefix(stage, record, step)
    tiles = [
        Task(
            name=f"{prefix}/{start}",
            stage=stage,
            function=function,
            arguments={**arguments, "start": start, "stop": min(start + size, record.n_cells)},
            output=replace(output, tiles=(start,)),
            n_cells=0 if step else min(size, record.n_cells - start),
            projected_memory=memory(size),
            slice_id=record.slice_id,
            until=until,
        )
        for start in range(0, record.n_cells, size)
    ]
    names = tuple(tile.name for tile in tiles)
    return [*tiles, publish_task(record, output, prefix=prefix, requires=names, stage=stage, until=until)]


def stream_tasks(
    record: SliceRecord,
    output: Output,
    *,
    stage: str,
    function: str,
    arguments: dict[str, Any],
    memory: Callable[[int], int],
    tiles_per_task: int,
    device: bool = True,
    also: tuple[Output, ...] = (),
    until: str = "",
    step: str = "",
) -> list[Task]:
    """Tasks that stream several tiles each, and the one that publishes.

    Parameters
    ----------
    record, output, stage, function, arguments, until, step
        As for `tile_tasks`; the function is a generator.
    memory
        Projected bytes of a task of so many tiles.
    tiles_per_task
        Tiles of a task, but for the last.
    device
        Whether they go through a device; such tasks are cut into single tiles where there is none.
    also
        Objects that the tasks fill as well; other tasks publish them.
    """
    size = _chunk_rows(output)
    prefix = _prefix(stage, record, step)
    starts = tuple(range(0, record.n_cells, size))
    tasks = []
    for first in range(0, len(starts), tiles_per_task):
        tiles = starts[first : first + tiles_per_task]
        tasks.append(
            Task(
                name=f"{prefix}/{tiles[0]}",
                stage=stage,
                function=function,
                arguments=arguments,
                output=replace(output, tiles=tiles),
                n_cells=0 if step else min(tiles[-1] + size, record.n_cells) - tiles[0],
                projected_memory=memory(len(tiles)),
                slice_id=record.slice_id,
                also=tuple(replace(other, tiles=tiles) for other in also),
                streams=True,
                device=device,
                until=until,
            )
        )
    names = tuple(task.name for task in tasks)
    return [*tasks, publish_task(record, output, prefix=prefix, requires=names, stage=stage, until=until)]


def publish_task(
    record: SliceRecord,
    output: Output,
    *,
    stage: str,
    prefix: str,
    requires: tuple[str, ...],
    until: str = "",
    n_cells: int = 0,
) -> Task:
    """The task that publishes an object when all its tiles are there."""
    return Task(
        name=f"{prefix}/publish",
        stage=stage,
        function="",
        arguments={},
        output=output,
        requires=requires,
        n_cells=n_cells,
        slice_id=record.slice_id,
        until=until,
    )


def tile_cells(catalog: Catalog, record: SliceRecord) -> int:
    """Cells of a tile of the slice, but for the last one."""
    return SliceStore(catalog.path("slices", record.objects["ingest"])).tile_cells


def _prefix(stage: str, record: SliceRecord, step: str) -> str:
    return f"{stage}/{record.slice_id}" + (f"/{step}" if step else "")


def _chunk_rows(output: Output) -> int:
    return next(iter(output.specs.values())).chunk_rows
