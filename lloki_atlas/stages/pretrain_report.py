"""What is told of a training: a bar on standard error while it runs, and the losses as a drawing (SVG)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

SIZE = (640, 360)
MARGIN = (60, 20, 40, 150)  # left, top, bottom, right
COLORS = {
    "total": "#222222",
    "bins": "#1f77b4",
    "direction": "#d62728",
    "neighbors": "#2ca02c",
    "latent": "#9467bd",
}


class Progress:
    """Context manager: `show(losses)` after each epoch. Silent when `enabled` is False."""

    def __init__(self, n_epochs: int, n_cells: int, *, enabled: bool) -> None:
        self._n_epochs = n_epochs
        self._n_cells = n_cells
        self._enabled = enabled

    def __enter__(self) -> Progress:
        if self._enabled:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars

            self._bars = Bars(
                TextColumn("pretrain  "),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("epochs {task.fields[rate]}"),
                TextColumn("{task.fields[loss]}", style="cyan"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )
            self._bar = self._bars.add_task("pretrain", total=self._n_epochs, rate="", loss="")
            self._bars.start()
        return self

    def show(self, losses: Mapping[str, float]) -> None:
        """Show the losses of an epoch; `seconds` counts from the first one, interrupted runs included."""
        if self._enabled:
            rate = losses["epoch"] * self._n_cells / max(losses["seconds"], 1e-9)
            self._bars.update(
                self._bar,
                completed=int(losses["epoch"]),
                rate=f"{rate:,.0f} cells/s",
                loss=f"loss {losses['total']:.3f}",
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            self._bars.stop()


def loss_curve(history: Sequence[Mapping[str, float]]) -> str:
    """Draw the losses by epoch.

    Parameters
    ----------
    history
        `epoch` and the losses, one entry an epoch; at least one.

    Returns
    -------
    str
        An SVG document.
    """
    width, height = SIZE
    left, top, bottom, right = MARGIN
    last = max(2, int(history[-1]["epoch"]))
    most = max(1e-9, max(losses[name] for losses in history for name in COLORS))

    def place(epoch: float, value: float) -> str:
        x = left + (width - left - right) * (epoch - 1) / (last - 1)
        y = height - bottom - (height - top - bottom) * value / most
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<polyline points="{left},{top} {place(1, 0)} {place(last, 0)}" fill="none" stroke="#888"/>',
        f'<text x="{left - 6}" y="{top + 10}" text-anchor="end">{most:.2f}</text>',
        f'<text x="{left - 6}" y="{height - bottom}" text-anchor="end">0</text>',
        f'<text x="{left}" y="{height - 12}">epoch 1</text>',
        f'<text x="{width - right}" y="{height - 12}" text-anchor="end">{last}</text>',
    ]
    for line, (name, color) in enumerate(COLORS.items()):
        points = " ".join(place(losses["epoch"], losses[name]) for losses in history)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        text = f"{name} {history[-1][name]:.3f}"
        parts.append(f'<text x="{width - right + 12}" y="{top + 12 + 18 * line}" fill="{color}">{text}</text>')
    return "\n".join([*parts, "</svg>", ""])
