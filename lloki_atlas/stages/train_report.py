"""What is told of the training of the autoencoder: a line an epoch, a small file while it runs, the losses drawn."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from lloki_atlas.config import canonical_json
from lloki_atlas.store.durable import write_durable
from lloki_atlas.store.places import Place

TERMS = ("total", "reconstruction", "triplet", "conservation")
PANEL = (320, 200)
MARGIN = (56, 26, 26, 14)  # left, top, bottom, right
TRAINED, HELD_OUT = "#1f77b4", "#d62728"

_log = logging.getLogger("lloki_atlas")


class EpochReport:
    """Called after each epoch: logs a line, and replaces a JSON file that others may look at.

    Parameters
    ----------
    path
        The file: `epoch`, `n_epochs`, `seconds` since the start or the resumption, `losses`. None writes none.
    """

    def __init__(self, path: Place | None) -> None:
        self._path = path
        self._started = time.monotonic()

    def __call__(self, epoch: int, n_epochs: int, losses: Mapping[str, float]) -> None:
        """Tell of an epoch."""
        seconds = round(time.monotonic() - self._started, 1)
        _log.info("train %s, %.1f s", epoch_line(epoch, n_epochs, losses), seconds)
        if self._path is not None:
            content = {"epoch": epoch, "n_epochs": n_epochs, "seconds": seconds, "losses": dict(losses)}
            write_durable(self._path, canonical_json(content) + b"\n")


def epoch_line(epoch: int, n_epochs: int, losses: Mapping[str, float]) -> str:
    """One line of text on an epoch: number, losses of the terms, and that of the held-out cells."""
    parts = [f"{name} {losses[name]:.4g}" for name in TERMS]
    if "held_out_total" in losses:
        parts.append(f"held out {losses['held_out_total']:.4g}")
    return f"epoch {epoch}/{n_epochs}: " + ", ".join(parts)


def loss_curves(history: Sequence[Mapping[str, float]]) -> str:
    """Draw total and terms by epoch, each on a scale of its own; those of the held-out cells are dashed.

    The terms are drawn as they are before weighting.

    Parameters
    ----------
    history
        One entry an epoch, at least one.

    Returns
    -------
    str
        An SVG document.
    """
    width, height = PANEL
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width} {2 * height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{2 * width}" height="{2 * height}" fill="white"/>',
    ]
    for number, name in enumerate(TERMS):
        parts.append(f'<g transform="translate({number % 2 * width} {number // 2 * height})">')
        parts += [*_panel(name, history), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _panel(name: str, history: Sequence[Mapping[str, float]]) -> list[str]:
    width, height = PANEL
    left, top, bottom, right = MARGIN
    last = max(2, int(history[-1]["epoch"]))
    curves = [(name, TRAINED, ""), ("held_out_" + name, HELD_OUT, ' stroke-dasharray="4 3"')]
    curves = [curve for curve in curves if curve[0] in history[-1]]
    most = max(1e-12, max(losses[key] for losses in history for key, _, _ in curves))

    def place(epoch: float, value: float) -> str:
        x = left + (width - left - right) * (epoch - 1) / (last - 1)
        y = height - bottom - (height - top - bottom) * value / most
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<polyline points="{left},{top} {place(1, 0)} {place(last, 0)}" fill="none" stroke="#888"/>',
        f'<text x="{left - 5}" y="{top + 9}" text-anchor="end">{most:.3g}</text>',
        f'<text x="{left - 5}" y="{height - bottom}" text-anchor="end">0</text>',
        f'<text x="{left}" y="{height - 8}">epoch 1</text>',
        f'<text x="{width - right}" y="{height - 8}" text-anchor="end">{last}</text>',
    ]
    titles = ((left, "start", name), (width - right, "end", "held out"))
    for (key, color, dashes), (x, anchor, title) in zip(curves, titles, strict=False):
        points = " ".join(place(losses["epoch"], losses[key]) for losses in history)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"{dashes}/>')
        text = f"{title} {history[-1][key]:.3g}"
        parts.append(f'<text x="{x}" y="{top - 10}" text-anchor="{anchor}" fill="{color}">{text}</text>')
    return parts
