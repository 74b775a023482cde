"""Cell types of slices as small integers: read in parts, two bytes a cell are kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lloki_atlas.errors import InputError
from lloki_atlas.store.slices import SliceStore

NO_LABEL = ("", "nan", "None", "Unassigned", "unlabelled")
MAX_LABELS = np.iinfo(np.int16).max
# text is many times larger than its number
PART_CELLS = 65_536

Codes = NDArray[np.int16]


def label_codes(stores: Sequence[SliceStore], label_key: str) -> tuple[list[Codes], int]:
    """Number the labels of several slices in alphabetical order.

    Parameters
    ----------
    stores
        One a slice; a slice without the column has no labels.
    label_key
        Column of cell types.

    Returns
    -------
    codes : list of (n_cells,) int16
        -1 where a cell has no label.
    n_labels : int
        Different labels in all slices.

    Raises
    ------
    InputError
        If there are more labels than cell types can be.
    """
    numbers: dict[str, int] = {}
    found = [_numbered(store, label_key, numbers) for store in stores]
    names = sorted(set(numbers) - set(NO_LABEL))
    place = {name: code for code, name in enumerate(names)}
    codes = np.array([place.get(name, -1) for name in numbers], dtype=np.int16)
    return [codes[part] if len(codes) else part for part in found], len(names)


def _numbered(store: SliceStore, label_key: str, numbers: dict[str, int]) -> Codes:
    """Number the labels of a slice as they come, going on from those known so far."""
    n_cells = store.n_cells
    codes = np.full(n_cells, numbers.setdefault("", len(numbers)), dtype=np.int16)
    if label_key not in store.metadata["label_columns"]:
        return codes
    for start in range(0, n_cells, PART_CELLS):
        stop = min(start + PART_CELLS, n_cells)
        text = store.obs([label_key], start, stop)[label_key].astype(str)
        part, names = pd.factorize(text)
        if len(numbers) + len(names) > MAX_LABELS:
            raise InputError(
                f"column '{label_key}' has more than {MAX_LABELS} different labels in {store.path}: "
                "choose a column of cell types"
            )
        known = np.array([numbers.setdefault(str(name), len(numbers)) for name in names], dtype=np.int16)
        codes[start:stop] = known[part]
    return codes
