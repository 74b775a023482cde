"""`obs` columns in a form that anndata and SpatialData write, with names that they accept."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd

# SpatialData takes letters, digits, underscore, hyphen and dot, and refuses names that differ in case alone
_REFUSED = re.compile(r"[^\w.\-]")


def storable_obs(obs: pd.DataFrame, *, reserved: tuple[str, ...] = ()) -> tuple[pd.DataFrame, dict[str, str]]:
    """Rewrite columns where they could not be stored as they are.

    Text becomes categorical where values repeat, dates become text, and a column of mixed objects becomes text.

    Parameters
    ----------
    obs
        Columns of the cells.
    reserved
        Names that the columns may not take; columns of exactly that name are left out.

    Returns
    -------
    The table, and the stored name of every column that it holds.
    """
    taken = {name.lower() for name in reserved}
    originals = {str(name).lower() for name in obs.columns}
    names: dict[str, str] = {}
    columns: dict[str, Any] = {}
    for position, original in enumerate(obs.columns):
        if original in reserved or str(original) in names:
            continue
        name = _free_name(str(original), taken, originals)
        taken.add(name.lower())
        names[str(original)] = name
        columns[name] = storable_column(obs.iloc[:, position])
    return pd.DataFrame(columns, index=obs.index), names


def storable_column(column: pd.Series) -> Any:
    """Return the values of one column, in a type that anndata writes and `SliceStore.obs` reads."""
    dtype = column.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        return _storable_categories(column)
    if isinstance(dtype, np.dtype) and dtype.kind in "biuf":
        return column.to_numpy(dtype=np.float32 if dtype == np.float16 else dtype)
    if isinstance(column.array, pd.arrays.IntegerArray | pd.arrays.BooleanArray):
        missing = column.isna().any()
        return column.array if missing else column.to_numpy(dtype=getattr(dtype, "numpy_dtype", bool))
    if pd.api.types.is_float_dtype(dtype):
        return column.to_numpy(dtype=np.float64, na_value=np.nan)
    return _storable_text(column)


def _storable_categories(column: pd.Series) -> pd.Categorical:
    values = column.array
    categories = values.categories
    if categories.dtype.kind in "iuf" or all(isinstance(value, str) for value in categories):
        return pd.Categorical.from_codes(
            values.codes, categories=pd.Index(categories.to_numpy()), ordered=bool(values.ordered)
        )
    return _storable_text(column.astype(object))


def _storable_text(column: pd.Series) -> Any:
    missing = column.isna().to_numpy()
    text = column.astype(str).to_numpy(dtype=object, copy=True)
    if missing.any():
        text[missing] = None
    elif len(set(text)) == len(text):
        return text
    return pd.Categorical(text)


def _free_name(original: str, taken: set[str], originals: set[str]) -> str:
    """Nearest name that is accepted and free; a changed one does not take another column's own name."""
    base = _REFUSED.sub("_", original)
    base = base.lstrip("_") if base.startswith("__") else base
    base = base if base not in ("", ".", "..", "_index") else "column"
    name, number = base, 2
    while name.lower() in taken or (name != original and name.lower() in originals):
        name, number = f"{base}_{number}", number + 1
    return name
