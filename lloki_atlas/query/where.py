"""Filters over cells: `technology == "MERFISH" and cell_type_coarse in ("Excitatory", "Inhibitory")`.

The language is Python's comparisons, `and`, `or`, `not`, `in`, names of columns and literals; it is parsed, checked
node by node and evaluated on columns, never executed.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lloki_atlas.errors import InputError

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_MAX_DEPTH = 100
_SHOWN = 200  # characters of a filter that a message repeats


@dataclass(frozen=True)
class Filter:
    """A parsed filter: the columns it reads, and `mask` over a table that has them."""

    text: str
    columns: tuple[str, ...]
    tree: ast.expr

    def mask(self, table: Mapping[str, pd.Series] | pd.DataFrame, n_cells: int) -> np.ndarray:
        """Evaluate on columns of equal length.

        Parameters
        ----------
        table
            Column name → values; a cell whose value is missing satisfies `!=` and `not in` only.
        n_cells
            Length of the columns.

        Returns
        -------
        (n_cells,) bool.

        Raises
        ------
        InputError
            If a comparison makes no sense for the type of its column.
        """
        try:
            result = _evaluate(self.tree, table)
        except (TypeError, OverflowError) as error:
            raise InputError(f"the filter `{_shown(self.text)}` compares values of different types: {error}") from error
        return np.broadcast_to(np.asarray(result, dtype=bool), (n_cells,)).copy()


def parse_filter(text: str) -> Filter:
    """Parse a filter.

    Raises
    ------
    InputError
        If it is not in the language, with the offending part.
    """
    if not text.strip():
        raise InputError("the filter is empty: write a comparison such as technology == 'MERFISH', or leave it out")
    try:
        with warnings.catch_warnings():
            # Python's advice on how its own code is written
            warnings.simplefilter("ignore")
            tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        where = f" at character {error.offset}" if error.offset else ""
        raise InputError(f"cannot read the filter `{_shown(text)}`: {error.msg}{where}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"cannot read the filter `{_shown(text)}`: make it shorter, of plain text") from error
    _check(tree, text)
    columns = dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    return Filter(text, tuple(columns), tree)


def _check(node: ast.expr, text: str, depth: int = 0) -> None:
    if depth > _MAX_DEPTH:
        raise InputError(f"the filter `{_shown(text)}` is nested more than {_MAX_DEPTH} levels deep: make it flatter")
    if isinstance(node, ast.BoolOp):
        for part in node.values:
            _check(part, text, depth + 1)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check(node.operand, text, depth + 1)
    elif isinstance(node, ast.Compare):
        for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            _check_value(left, text)
            if isinstance(op, ast.In | ast.NotIn):
                _check_list(right, text)
            elif type(op) in _COMPARISONS:
                _check_value(right, text)
            else:
                raise _refused(node, text)
    elif not isinstance(node, ast.Name):
        raise _refused(node, text)


def _check_value(node: ast.expr, text: str) -> None:
    if not isinstance(node, ast.Name) and not _is_literal(node):
        raise _refused(node, text)


def _check_list(node: ast.expr, text: str) -> None:
    if not isinstance(node, ast.List | ast.Tuple | ast.Set) or not all(_is_literal(part) for part in node.elts):
        raise InputError(f"in the filter `{_shown(text)}`, `in` wants a list of values such as ('a', 'b')")


def _is_literal(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return isinstance(node.operand, ast.Constant) and type(node.operand.value) in (int, float)
    return isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | bool)


def _refused(node: ast.expr, text: str) -> InputError:
    return InputError(
        f"the filter `{_shown(text)}` holds `{_shown(ast.unparse(node))}`: "
        "use columns, values, comparisons, in, and, or, not"
    )


def _shown(text: str) -> str:
    """The text in one line, shortened."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}…"


def _evaluate(node: ast.expr, table: Mapping[str, pd.Series] | pd.DataFrame) -> Any:
    if isinstance(node, ast.BoolOp):
        combine = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
        parts = [np.asarray(_evaluate(part, table), dtype=bool) for part in node.values]
        return combine.reduce(np.broadcast_arrays(*parts))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return np.logical_not(np.asarray(_evaluate(node.operand, table), dtype=bool))
    if isinstance(node, ast.Compare):
        result: Any = True
        for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            result = np.logical_and(result, _compare(_value(left, table), op, _value(right, table)))
        return result
    return _condition(_value(node, table))


def _compare(left: Any, op: ast.cmpop, right: Any) -> Any:
    """Compare where nothing is missing; elsewhere only `!=` and `not in` hold."""
    compare = _COMPARISONS.get(type(op)) or (_is_in if isinstance(op, ast.In) else _is_not_in)
    columns = [part for part in (left, right) if isinstance(part, pd.Series)]
    if not columns:
        return compare(left, right)
    present = np.logical_and.reduce([column.notna().to_numpy() for column in columns])
    result = np.full(len(present), isinstance(op, ast.NotEq | ast.NotIn))
    if present.any():
        kept = [part[present] if isinstance(part, pd.Series) else part for part in (left, right)]
        result[present] = np.asarray(compare(*kept), dtype=bool)
    return result


def _is_in(left: Any, values: list[Any]) -> Any:
    if not isinstance(left, pd.Series):
        return left in values
    if left.dtype == object:
        return left.isin(values)
    # as == would have it: numbers are rounded to the column's type, and text equals no number
    return np.logical_or.reduce([np.zeros(len(left), dtype=bool), *(np.asarray(left == v, bool) for v in values)])


def _is_not_in(left: Any, values: list[Any]) -> Any:
    return np.logical_not(_is_in(left, values))


def _condition(column: pd.Series) -> np.ndarray:
    """A column that stands alone has to be one of True and False; missing is False."""
    present = column.notna().to_numpy()
    if not all(isinstance(value, bool | np.bool_) for value in column[present].unique()):
        raise InputError(f"column '{column.name}' stands alone in the filter and is no truth: compare it with a value")
    result = np.zeros(len(present), dtype=bool)
    result[present] = column[present].to_numpy(dtype=bool)
    return result


def _value(node: ast.expr, table: Mapping[str, pd.Series] | pd.DataFrame) -> Any:
    if isinstance(node, ast.Name):
        column = table[node.id].rename(node.id)
        return column.astype(object) if isinstance(column.dtype, pd.CategoricalDtype) else column
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [ast.literal_eval(part) for part in node.elts]
    return ast.literal_eval(node)
