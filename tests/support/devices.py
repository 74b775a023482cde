"""Tasks of several tiles, functions that say where they ran, and GPU workers on a machine without a GPU."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from support.tasks import N_ROWS, TILE_ROWS, note, notes

from lloki_atlas.engine import cluster
from lloki_atlas.engine.devices import VISIBLE
from lloki_atlas.engine.outputs import Output
from lloki_atlas.engine.plan import Task
from lloki_atlas.store.arrays import ArraySpec

Tile = tuple[int, dict[str, np.ndarray]]

# a name that no machine has: what runs there finds no device and computes on CPU
FAKE_GPU = "GPU-of-a-test"
STARTS = tuple(range(0, N_ROWS, TILE_ROWS))


@contextmanager
def local_client_with_gpu(n_workers: int, gpus: tuple[str, ...] = (FAKE_GPU,)) -> Iterator[Any]:
    """A local cluster with GPU workers, which have none."""
    with (
        mock.patch.object(cluster, "visible_gpus", return_value=gpus),
        cluster.local_client(n_workers) as client,
    ):
        yield client


def place(log: str, name: str, **reads: str) -> dict[str, np.ndarray]:
    """Note the GPU that this process may use."""
    note(log, f"{name} on {os.environ.get(VISIBLE)}")
    return {"values": np.zeros((N_ROWS, 2), dtype=np.float32)}


def tiles(starts: list[int], log: str = "", name: str = "") -> Iterator[Tile]:
    """Rows of tiles and their squares; notes in `log` which are asked for."""
    if log:
        note(log, f"{name} {starts}")
    for start in starts:
        yield start, rows_of(start)


def rows_of(start: int) -> dict[str, np.ndarray]:
    """Rows of one tile: what `tiles` yields."""
    rows = np.arange(start, min(start + TILE_ROWS, N_ROWS), dtype=np.float32)
    values = np.stack([rows, np.sqrt(rows)], axis=1)
    return {"values": values, "squares": values**2}


def tiles_that_break(log: str, name: str, starts: list[int], after: int) -> Iterator[Tile]:
    """Fail after so many tiles."""
    for start, arrays in tiles(starts, log, name):
        if STARTS.index(start) >= after:
            raise ZeroDivisionError("a defect")
        yield start, arrays


def too_few_tiles(log: str, name: str, starts: list[int]) -> Iterator[Tile]:
    """Forget the last tile."""
    yield from tiles(starts[:-1], log, name)


def killed_once(log: str, name: str, function: str, after: int, **arguments: Any) -> Iterator[Tile]:
    """Stream what `function` streams, and kill the worker when so many tiles are written: the first time."""
    note(log, f"{name} {arguments['starts']} on {os.environ.get(VISIBLE)}")
    first = sum(line.startswith(f"{name} ") for line in notes(log)) == 1
    module, _, attribute = function.partition(":")
    compute = getattr(import_module(module), attribute)
    for number, tile in enumerate(compute(**arguments)):
        if first and number == after:
            os.kill(os.getpid(), signal.SIGKILL)
        yield tile


def tiled(root: Path, name: str, array: str = "values") -> Output:
    """An object that is filled tile by tile."""
    return Output(
        path=str(root / "objects" / f"{name}.zarr"),
        staging=str(root / "staging" / name),
        lineage={"made": name},
        specs={array: ArraySpec((N_ROWS, 2), "float32", TILE_ROWS, ("cell", "coordinate"))},
    )


def stream_task(root: Path, name: str, function: str = "tiles", **parts: Any) -> list[Task]:
    """A task of three tiles that fills two objects, and the tasks that publish them."""
    output, also = tiled(root, name), tiled(root, f"{name}-squares", "squares")
    arguments = {"log": str(root / "log"), "name": name, **parts.pop("arguments", {})}
    task = Task(
        name=name,
        stage="stream",
        function=f"support.devices:{function}",
        arguments=arguments,
        output=_with_tiles(output),
        n_cells=N_ROWS,
        also=(_with_tiles(also),),
        streams=True,
        device=True,
        **parts,
    )
    return [
        task,
        Task(f"{name}/publish", "stream", "", {}, output, requires=(name,)),
        Task(f"{name}/publish also", "squares", "", {}, also, requires=(name,)),
    ]


def _with_tiles(output: Output) -> Output:
    return replace(output, tiles=STARTS)
