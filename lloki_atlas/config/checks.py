"""What every settings class asks of its fields."""

from __future__ import annotations

import math
from typing import Any

from lloki_atlas.errors import InputError


def require(condition: bool, name: str, value: Any, wanted: str) -> None:
    """Raise an InputError that names the field, unless it is as wanted (and finite)."""
    if not condition or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(f"{name} is {value!r}: it has to be {wanted}")
