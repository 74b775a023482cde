"""What is told of a training: the line of an epoch, and the drawing of its losses."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from lloki_atlas.stages.train_report import TERMS, epoch_line, loss_curves


def history(n_epochs, *, held_out):
    names = [*TERMS, *(f"held_out_{name}" for name in TERMS if held_out)]
    return [{"epoch": i + 1, **dict.fromkeys(names, 1.0 / (i + 1))} for i in range(n_epochs)]


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("n_epochs", [1, 5])
def test_the_curves_are_a_drawing_of_total_and_terms(n_epochs, held_out):
    drawn = ET.fromstring(loss_curves(history(n_epochs, held_out=held_out)))
    lines = [part for part in drawn.iter() if part.tag.endswith("polyline") and part.get("stroke-width")]
    assert len(lines) == len(TERMS) * (1 + held_out)
    assert sum(line.get("stroke-dasharray") is not None for line in lines) == len(TERMS) * held_out
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        assert len(points) == n_epochs
        assert all(0 <= x <= 320 and 0 <= y <= 200 for x, y in points)
        assert [y for _, y in points] == sorted(y for _, y in points)
    texts = " ".join(part.text for part in drawn.iter() if part.tag.endswith("text"))
    assert all(name in texts for name in TERMS)


def test_losses_of_zero_are_drawn_too():
    ET.fromstring(loss_curves([{"epoch": 1, **dict.fromkeys(TERMS, 0.0)}]))


def test_the_line_of_an_epoch_names_every_term():
    (losses,) = history(1, held_out=True)
    line = epoch_line(1, 7, losses | {"held_out_total": 0.25})
    assert line.startswith("epoch 1/7: total 1, ")
    assert all(name in line for name in TERMS)
    assert line.endswith("held out 0.25")
