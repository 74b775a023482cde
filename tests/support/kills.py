"""Kill the writer of a catalog at its write points, look at what is left, take the step again, and look again.

One process has everything imported and compiled; it forks a child for each kill and each look, so that a kill costs a
part of a second and not the start of Python. It has no threads of its own when it forks.
"""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.core.sync import cleanup_resources

from lloki_atlas.store.catalog import open_catalog

from .aftermath import Findings, Snapshot, after_kill, after_resume, snapshot
from .atlases import make_sources, reference_profile
from .kill_steps import FINISHED, STEPS, perform
from .write_points import KILLS, Point, WritePoints


@dataclass(frozen=True)
class Kill:
    """A step and the point of it to die at."""

    step: str
    point: Point

    def __str__(self) -> str:
        return f"{self.step}: {self.point}"


@dataclass(frozen=True)
class Result:
    """What came of a kill."""

    kill: Kill
    killed: bool
    acknowledged: tuple[int, ...]
    after_kill: Findings
    after_resume: Findings
    error: str = ""  # of a look, or of the step taken again
    seconds: float = 0.0

    @property
    def findings(self) -> Findings:
        """All that is wrong."""
        return self.after_kill + self.after_resume

    @property
    def is_well(self) -> bool:
        """Whether nothing is."""
        return self.killed and not self.error and not self.findings


@dataclass
class Rig:
    """The undisturbed atlas after each step, and what is done to copies of it.

    Parameters
    ----------
    folder
        Where everything is made.
    steps
        Names of the steps to prepare; those they follow are prepared with them.
    """

    folder: Path
    steps: Sequence[str] = tuple(STEPS)
    undisturbed: dict[str, Snapshot] = field(default_factory=dict)

    def __post_init__(self) -> None:
        zarr.config.set({"threading.max_workers": 1})  # calls come in one order, so that a point has one number
        self.sources = make_sources(self.folder / "sources")
        reference_profile(self.sources)
        for name in _with_those_before(self.steps):
            # here and not in a child: what is compiled and loaded is there for all of them
            perform(name, self._prepare(name, self._whole(name)), self.sources, lambda version: None)
            self.undisturbed[name] = snapshot(self._whole(name))
        cleanup_resources()
        # what is there stays, so that children do not copy it to mark it
        gc.collect()
        gc.freeze()
        if threading.active_count() > 1:
            raise RuntimeError(f"threads would be lost in a fork: {threading.enumerate()}")

    def points(self, name: str) -> list[Point]:
        """Every write point of a step; there is no file that none of them made."""
        root = self._prepare(name, self.folder / "listed")

        before = {path for path in root.rglob("*") if path.is_file()}

        def listed(say: Callable[[Any], None]) -> None:
            watch = WritePoints(root)
            watch.install()
            perform(name, root, self.sources, lambda version: None)
            made = {path for path in root.rglob("*") if path.is_file()} - before
            unseen = sorted(str(path) for path in made if str(path) not in watch.written)
            if unseen:
                raise RuntimeError(f"no write point made {', '.join(unseen)}")
            say(watch.seen)

        said, status = in_child(listed)
        shutil.rmtree(root)
        if status != 0:
            raise RuntimeError(f"the step {name} failed while its points were listed: {said}")
        return list(said[0])

    def kill(self, kill: Kill) -> Result:
        """Take a step on a copy, die at the point, look, take the step again, look."""
        started = time.perf_counter()
        root = self._prepare(kill.step, self.folder / "disturbed")
        before = self.undisturbed.get(STEPS[kill.step].after)
        held = open_catalog(root) if before is not None else None

        def disturbed(say: Callable[[Any], None]) -> None:
            WritePoints(root, stop=kill.point).install()
            perform(kill.step, root, self.sources, say)

        acknowledged, status = in_child(disturbed)
        undisturbed = self.undisturbed[kill.step]

        def look(say: Callable[[Any], None]) -> None:
            say(after_kill(root, acknowledged=acknowledged, held=held, before=before, undisturbed=undisturbed))
            perform(kill.step, root, self.sources, lambda version: None)
            say(after_resume(root, held=held, before=before, undisturbed=undisturbed))

        found, ended = in_child(look)
        first, second = ([part for part in found if isinstance(part, Findings)] + [Findings()] * 2)[:2]
        shutil.rmtree(root)
        return Result(
            kill,
            killed=status == -signal.SIGKILL,
            acknowledged=tuple(acknowledged),
            after_kill=first,
            after_resume=second,
            error="" if ended == 0 else f"{[part for part in found if isinstance(part, str)] or ended}",
            seconds=time.perf_counter() - started,
        )

    def _whole(self, name: str) -> Path:
        return self.folder / FINISHED / name

    def _prepare(self, name: str, root: Path) -> Path:
        """A folder as the step finds it."""
        shutil.rmtree(root, ignore_errors=True)
        before = STEPS[name].after
        if before:
            shutil.copytree(self._whole(before), root)
        return root


def in_child(function: Callable[[Callable[[Any], None]], None]) -> tuple[list[Any], int]:
    """Call a function in a fork of this process.

    Returns
    -------
    What it said up to its end, and how it ended: an exit code, or minus the signal. An error is said, as text.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)

            def say(value: Any) -> None:
                data = pickle.dumps(value)
                _write(writing, len(data).to_bytes(8, "big") + data)

            try:
                function(say)
                code = 0
            except BaseException as error:
                say(f"{type(error).__name__}: {error}")
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    return list(_values(data)), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def spread(points: dict[str, list[Point]], n: int, *, seed: int) -> list[Kill]:
    """Choose kills evenly over the names of points, and over the repetitions of each.

    Parameters
    ----------
    points
        Points by step.
    n
        How many; all points where there are not as many.
    seed
        Equal seeds choose equal kills.
    """
    by_name: dict[tuple[str, str], list[Kill]] = defaultdict(list)
    for step, listed in points.items():
        for point in listed:
            by_name[point.name, point.ending].append(Kill(step, point))
    rng = np.random.default_rng([seed, n])
    names = sorted(by_name)
    order = [names[i] for i in rng.permutation(len(names))]
    quotas = dict.fromkeys(order, 0)
    left = min(n, sum(map(len, by_name.values())))
    while left:
        for name in order:
            if left and quotas[name] < len(by_name[name]):
                quotas[name] += 1
                left -= 1
    chosen = []
    for name, quota in quotas.items():
        kills = by_name[name]
        # one of each of `quota` equal parts
        bounds = np.linspace(0, len(kills), quota + 1).astype(int)
        chosen += [kills[rng.integers(low, high)] for low, high in pairwise(bounds)]
    return chosen


def of_endings(points: Sequence[Point], endings: Sequence[str] = KILLS) -> list[Point]:
    """Those points at which a process ends in one of these ways."""
    return [point for point in points if point.ending in endings]


def _with_those_before(names: Sequence[str]) -> list[str]:
    wanted = set(names)
    for name in reversed(STEPS):
        if name in wanted:
            wanted |= {STEPS[name].after, STEPS[name].reads} - {""}
    return [name for name in STEPS if name in wanted]


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _values(data: bytes) -> Iterator[Any]:
    while data:
        size = int.from_bytes(data[:8], "big")
        yield pickle.loads(data[8 : 8 + size])
        data = data[8 + size :]
