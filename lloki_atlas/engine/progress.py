"""Progress of a run on standard error: one bar a stage, with cells per second."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from lloki_atlas.engine.plan import Task


class Progress:
    """Context manager; `advance(task)` after each finished task. Silent when `enabled` is False."""

    def __init__(self, tasks: Iterable[Task], *, enabled: bool) -> None:
        self._totals: dict[str, int] = {}
        self._first: dict[str, Task] = {}
        self._done: set[str] = set()
        for task in tasks:
            self._first.setdefault(task.stage, task)
            self._totals[task.stage] = self._totals.get(task.stage, 0) + task.n_cells
        self._enabled = enabled and bool(self._totals)

    def __enter__(self) -> Progress:
        if self._enabled:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars
            from rich.progress import Task as Bar
            from rich.text import Text

            class CellRate(ProgressColumn):
                """Cells per second since the stage's first task could start."""

                def render(self, task: Bar) -> Text:
                    elapsed = task.finished_time or task.elapsed
                    rate = task.completed / elapsed if elapsed and task.completed else 0.0
                    return Text(f"{rate:,.0f} cells/s", style="cyan")

            self._bars = Bars(
                TextColumn("{task.description:<10}"),
                BarColumn(),
                MofNCompleteColumn(),
                CellRate(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )
            self._ids = {
                stage: self._bars.add_task(stage, total=total, start=False) for stage, total in self._totals.items()
            }
            self._bars.start()
            self._start_ready()
        return self

    def advance(self, task: Task) -> None:
        """Count a finished task's cells."""
        if self._enabled:
            self._done.add(task.name)
            self._start_ready()
            self._bars.advance(self._ids[task.stage], task.n_cells)

    def _start_ready(self) -> None:
        """Start the clock of every stage whose first task waits for nothing any more."""
        for stage in [stage for stage, task in self._first.items() if self._done.issuperset(task.requires)]:
            del self._first[stage]
            self._bars.start_task(self._ids[stage])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            self._bars.stop()
