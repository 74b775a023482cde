"""Functions that tasks of tests call, and tasks and plans made of them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from lloki_atlas.engine.outputs import Output
from lloki_atlas.engine.plan import Outcome, Plan, Task
from lloki_atlas.errors import InputError, NotFoundError
from lloki_atlas.store.arrays import ArraySpec

N_ROWS = 10
TILE_ROWS = 4


def numbers(log: str, name: str, start: int = 0, stop: int = N_ROWS, reads: str = "") -> dict[str, np.ndarray]:
    """Two numbers a row that follow from the row alone; the call is noted in `log`."""
    note(log, name)
    rows = np.arange(start, stop, dtype=np.float32)
    return {"values": np.stack([rows, np.sqrt(rows)], axis=1)}


def ones(shape: list[int]) -> dict[str, np.ndarray]:
    """An array `x` of ones."""
    return {"x": np.ones(shape, dtype=np.float32)}


def folder(staging: str, log: str, name: str) -> None:
    """Write a file of text."""
    note(log, name)
    (Path(staging) / "text.txt").write_text("filled by the task itself")


def refuse(log: str, name: str, message: str = "this task refuses its input") -> dict[str, np.ndarray]:
    """Fail with an error of the package."""
    note(log, name)
    raise InputError(message)


def break_down(log: str, name: str) -> dict[str, np.ndarray]:
    """Fail with an error that the package does not know."""
    note(log, name)
    raise ZeroDivisionError("a defect")


def lose_inputs(log: str, name: str, final: str = "", error: str = "") -> dict[str, np.ndarray]:
    """Fail as a task does whose inputs were removed because somebody else had published `final` meanwhile."""
    note(log, name)
    if final:
        Path(final).mkdir(parents=True)
        Path(f"{final}.json").write_text("{}")
    if error:
        raise ZeroDivisionError(error)
    raise NotFoundError("the inputs are gone")


def lose_workers(log: str, name: str) -> dict[str, np.ndarray]:
    """Fail as a task does that killed worker after worker."""
    from distributed.scheduler import KilledWorker

    raise KilledWorker(name, SimpleNamespace(address="tcp://127.0.0.1:1"), 3)


def die_once(log: str, name: str) -> dict[str, np.ndarray]:
    """Kill the worker the first time."""
    note(log, name)
    if notes(log).count(name) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return numbers(log, f"{name} again")


def note(log: str, name: str) -> None:
    """Append one line."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as handle:
        handle.write(f"{name}\n")


def notes(log: str | Path) -> list[str]:
    """Calls so far, in order."""
    return Path(log).read_text().splitlines() if Path(log).exists() else []


def whole_task(root: Path, name: str, function: str = "numbers", **parts: Any) -> Task:
    """A task that writes a whole object `<root>/objects/<name>.zarr`."""
    reads = {"reads": str(root / "objects" / f"{parts.pop('reads')}.zarr")} if "reads" in parts else {}
    values = {
        "stage": "first",
        "function": f"support.tasks:{function}",
        "arguments": {"log": str(root / "log"), "name": name, **reads},
        "output": Output(
            path=str(root / "objects" / f"{name}.zarr"),
            staging=str(root / "staging" / name),
            lineage={"made": name},
            dims={"values": ("cell", "coordinate")},
            attributes={"unit": "none"},
            folder=function == "folder",
        ),
        "n_cells": N_ROWS,
        **parts,
    }
    return Task(name=name, **values)


def tile_tasks(root: Path, name: str, *, broken: tuple[int, ...] = ()) -> list[Task]:
    """Tasks that fill an object in tiles, and the one that publishes it; `broken` tiles refuse."""
    path, staging = str(root / "objects" / f"{name}.zarr"), str(root / "staging" / name)
    specs = {"values": ArraySpec((N_ROWS, 2), "float32", TILE_ROWS, ("cell", "coordinate"))}
    output = {"path": path, "staging": staging, "lineage": {"made": name}, "specs": specs, "attributes": {"tiled": 1}}
    tiles = []
    for start in range(0, N_ROWS, TILE_ROWS):
        arguments = {"log": str(root / "log"), "name": f"{name}/{start}"}
        if start not in broken:
            arguments |= {"start": start, "stop": min(start + TILE_ROWS, N_ROWS)}
        tiles.append(
            Task(
                name=f"{name}/{start}",
                stage="second",
                function="support.tasks:refuse" if start in broken else "support.tasks:numbers",
                arguments=arguments,
                output=Output(**output, tiles=(start,)),
                n_cells=TILE_ROWS,
            )
        )
    names = tuple(tile.name for tile in tiles)
    return [*tiles, Task(f"{name}/publish", "second", "", {}, Output(**output), requires=names)]


def plan_of(*tasks: Task) -> tuple[Plan, list[Outcome]]:
    """A plan, and the list that its commits append their outcome to."""
    outcomes: list[Outcome] = []

    def commit(outcome: Outcome) -> str:
        outcomes.append(outcome)
        return "committed"

    return Plan(tasks, commit), outcomes
