"""Units of coordinates: everything inside an atlas is in micrometre."""

from __future__ import annotations

import math

from lloki_atlas.errors import InputError

MICROMETER = "micrometer"

_UM_PER_UNIT = {MICROMETER: 1.0, "millimeter": 1000.0, "nanometer": 0.001}
_SPELLINGS = {
    # both signs for micro: U+00B5 and the Greek letter U+03BC
    MICROMETER: ("micrometer", "micrometre", "micron", "um", "\u00b5m", "\u03bcm"),
    "millimeter": ("millimeter", "millimetre", "mm"),
    "nanometer": ("nanometer", "nanometre", "nm"),
    "pixel": ("pixel", "px"),
}
_UNITS = {
    spelling: unit for unit, spellings in _SPELLINGS.items() for word in spellings for spelling in (word, f"{word}s")
}


def coordinate_scale(coordinate_unit: str, *, um_per_unit: float | None = None) -> tuple[str, float]:
    """Resolve the unit of a source's coordinates.

    Parameters
    ----------
    coordinate_unit
        `micrometer`, `millimeter`, `nanometer`, `pixel`, or a usual short form of them.
    um_per_unit
        Micrometres per unit; needed for `pixel`, and for no other unit.

    Returns
    -------
    The unit's full name, and micrometres per unit.

    Raises
    ------
    InputError
        If the unit is unknown, or the factor is missing, not positive, or another one than the unit's.
    """
    unit = _UNITS.get(str(coordinate_unit).strip().lower())
    if unit is None:
        raise InputError(
            f"unknown coordinate_unit {coordinate_unit!r}: say {', '.join(_UM_PER_UNIT)}, or pixel with um_per_unit"
        )
    if um_per_unit is not None and not (math.isfinite(um_per_unit) and um_per_unit > 0):
        raise InputError(f"um_per_unit is {um_per_unit}: give a positive number of micrometres per {unit}")
    if unit == "pixel":
        if um_per_unit is None:
            raise InputError("coordinate_unit is pixel: give um_per_unit, the micrometres per pixel of the microscope")
        return unit, float(um_per_unit)
    factor = _UM_PER_UNIT[unit]
    if um_per_unit is not None and not math.isclose(um_per_unit, factor):
        raise InputError(
            f"um_per_unit is {um_per_unit}, but a {unit} has {factor:g}: leave um_per_unit out, or say pixel"
        )
    return unit, factor
