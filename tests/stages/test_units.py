"""Units: spellings, factors, and what is refused."""

from __future__ import annotations

import pytest

from lloki_atlas.errors import InputError
from lloki_atlas.stages.units import coordinate_scale


@pytest.mark.parametrize(
    ("spelling", "unit", "factor"),
    [
        ("micrometer", "micrometer", 1.0),
        ("micrometre", "micrometer", 1.0),
        ("microns", "micrometer", 1.0),
        ("micron", "micrometer", 1.0),
        ("um", "micrometer", 1.0),
        ("\u00b5m", "micrometer", 1.0),
        ("\u03bcm", "micrometer", 1.0),
        (" UM ", "micrometer", 1.0),
        ("millimeter", "millimeter", 1000.0),
        ("mm", "millimeter", 1000.0),
        ("nanometers", "nanometer", 0.001),
        ("nm", "nanometer", 0.001),
    ],
)
def test_spelling_is_known(spelling, unit, factor):
    assert coordinate_scale(spelling) == (unit, factor)


def test_pixel_takes_the_given_factor():
    assert coordinate_scale("pixels", um_per_unit=0.325) == ("pixel", 0.325)


def test_pixel_without_a_factor_is_refused():
    with pytest.raises(InputError, match="give um_per_unit"):
        coordinate_scale("pixel")


@pytest.mark.parametrize("unit", ["furlong", "", "cm"])
def test_unknown_unit_is_refused_and_the_known_ones_are_named(unit):
    with pytest.raises(InputError, match=r"say micrometer, millimeter, nanometer, or pixel"):
        coordinate_scale(unit)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_factor_that_is_not_positive_is_refused(factor):
    with pytest.raises(InputError, match="positive number"):
        coordinate_scale("pixel", um_per_unit=factor)


def test_factor_that_contradicts_the_unit_is_refused():
    with pytest.raises(InputError, match="leave um_per_unit out"):
        coordinate_scale("mm", um_per_unit=0.5)


def test_factor_that_agrees_with_the_unit_is_taken():
    assert coordinate_scale("mm", um_per_unit=1000) == ("millimeter", 1000.0)
