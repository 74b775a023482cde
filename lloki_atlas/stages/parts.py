"""The parts of a source, under the same names whatever its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd


@dataclass
class Parts:
    """What an open source has, not yet read but for `obs`; `read` turns an item of `obsm` into an array.

    `files` are those of a vendor's folder that are read (name and path), and `unit` is what it gives positions in:
    the unit and the usual micrometres per unit.
    """

    obs: pd.DataFrame
    var_names: pd.Index
    X: Any
    layers: Mapping[str, Any]
    obsm: Mapping[str, Any]
    description: str
    origin: dict[str, Any]
    read: Callable[[Any], Any] = lambda item: item
    elements: Any = None
    regions: dict[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    unit: tuple[str, float] | None = None
