"""What a source has to be before it becomes a slice: one function a fact, one sentence a refusal."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from scipy.sparse import csr_matrix

from lloki_atlas.errors import InputError

# float32 holds every whole number up to here
MAX_COUNT = 2.0**24
# a kilometre in nanometre
MAX_COORDINATE = 1e12


def check_not_empty(counts: csr_matrix, *, where: str) -> None:
    """Refuse a table without cells or without genes."""
    for size, what in zip(counts.shape, ("cells", "genes"), strict=True):
        if not size:
            raise InputError(f"{where} has no {what}: give a table of cells by genes")


def check_counts(counts: csr_matrix, *, where: str, accept_normalized: bool = False) -> None:
    """Refuse values that cannot be counts: missing, infinite, negative; and, unless accepted, not whole."""
    values = counts.data
    if not np.isfinite(values).all():
        raise InputError(f"the counts of {where} hold NaN or infinite values: replace them, or choose another layer")
    if (values < 0).any():
        raise InputError(
            f"the counts of {where} are negative in {int((values < 0).sum())} places, as scaled values are: "
            "pass the layer that holds raw counts, such as layer='counts'"
        )
    if accept_normalized:
        return
    fractional = values != np.rint(values)
    if fractional.any():
        raise InputError(
            f"the counts of {where} are not whole numbers ({_number(values[fractional][0])} for example), so they were "
            "normalised: pass layer='counts' if raw counts are in a layer, or accept_normalized=True "
            "(--accept-normalized)"
        )
    if len(values) and values.max() > MAX_COUNT:
        raise InputError(f"{where} has a count of {_number(values.max())}: give raw counts below {MAX_COUNT:.0f}")


def check_coordinates(coordinates: np.ndarray, *, cells: Sequence[str], where: str) -> None:
    """Refuse positions that are missing, infinite, absurdly far out, or all the same."""
    lost = np.flatnonzero(~np.isfinite(coordinates).all(axis=1))
    if len(lost):
        raise InputError(
            f"{len(lost)} cells of {where} have NaN or infinite coordinates ({_first(cells, lost)}): "
            "remove these cells from the source"
        )
    far = np.flatnonzero((np.abs(coordinates) > MAX_COORDINATE).any(axis=1))
    if len(far):
        raise InputError(
            f"{len(far)} cells of {where} lie beyond {MAX_COORDINATE:g} ({_first(cells, far)}): "
            "give positions on a slide, in one of the known units"
        )
    if len(coordinates) > 1 and (coordinates == coordinates[0]).all():
        raise InputError(f"all cells of {where} lie at one point: give the cells' positions, two columns, x and y")


def check_unique(names: Sequence[str], *, what: str, where: str, mend: str) -> None:
    """Refuse a name that occurs twice."""
    values, first, count = np.unique(np.asarray(names, dtype=object).astype(str), return_index=True, return_counts=True)
    twice = np.flatnonzero(count > 1)
    if len(twice):
        order = twice[np.argsort(first[twice], kind="stable")]
        raise InputError(f"{where} has duplicate {what} ({_first(values, order)}): {mend}")


def check_empty_cells(counts: csr_matrix, *, cells: Sequence[str], where: str, empty_cells: str) -> int:
    """Count the cells without any count; refuse them unless `empty_cells` is "keep"."""
    if empty_cells not in ("error", "keep"):
        raise InputError(f"empty_cells is {empty_cells!r}: choose 'error' or 'keep'")
    empty = np.flatnonzero(np.diff(counts.indptr) == 0)
    if len(empty) and empty_cells == "error":
        raise InputError(
            f"{len(empty)} of {counts.shape[0]} cells of {where} have no count at all ({_first(cells, empty)}): "
            "remove them, or pass empty_cells='keep' (--keep-empty-cells) to store them without an embedding"
        )
    return len(empty)


def check_columns(wanted: Sequence[str], *, columns: Collection[str], where: str) -> None:
    """Refuse a label column that is not in `obs`."""
    for name in wanted:
        if name not in columns:
            known = ", ".join(str(column) for column in columns) or "none, it has no column"
            raise InputError(f"{where} has no obs column '{name}': choose label_key from {known}")


def check_shared(symbols: Collection[str], *, reference_symbols: Collection[str], where: str, organism: str) -> int:
    """Count the genes shared with the reference; refuse a panel without any."""
    shared = len(set(symbols) & set(reference_symbols))
    if not shared:
        raise InputError(
            f"{where} shares no gene with the reference: var_names have to be gene symbols of {organism}, "
            "not identifiers; check the organism, or pass gene_map=, a table of source and canonical symbols"
        )
    return shared


def check_identity(slice_id: str, *, technology: str) -> None:
    """Refuse a slice id or a technology that is blank."""
    for name, value in (("slice_id", slice_id), ("technology", technology)):
        if not isinstance(value, str) or not value.strip() or value != value.strip() or not value.isprintable():
            raise InputError(f"{name} is {value!r}: give a short text without blanks at its ends")


def _first(names: Sequence[str] | np.ndarray, rows: np.ndarray, n: int = 3) -> str:
    """Name the first few of `rows`."""
    shown = ", ".join(_printable(str(names[row])) for row in rows[:n])
    return shown if len(rows) <= n else f"{shown}, …"


def _printable(name: str, longest: int = 60) -> str:
    """A name from a source, fit for one line of a terminal."""
    text = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in name[: longest + 1])
    return text if len(text) <= longest else f"{text[:longest]}…"


def _number(value: float) -> str:
    return f"{float(value):.6g}"
