"""Filters over cells: `technology == "MERFISH" and cell_type_coarse in ("Excitatory", "Inhibitory")`.

The language is Python's comparisons, `and`, `or`, `not`, `in`, names of columns and literals; it is parsed, checked
node by node and evaluated on columns, never executed.
"""

from __future__ import annotations

import ast
import operator
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
        except TypeError as error:
            raise InputError(f"the filter `{self.text}` compares values of different types: {error}") from error
        return np.broadcast_to(np.asarray(result, dtype=bool), (n_cells,)).copy()


def parse_filter(text: str) -> Filter:
    """Parse a filter.

    Raises
    ------
    InputError
        If it is not in the language, with the offending part.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise InputError(f"cannot read the filter `{text}`: {error.msg} at character {error.offset}") from error
    _check(tree, text)
    columns = dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    return Filter(text, tuple(columns), tree)


def _check(node: ast.expr, text: str) -> None:
    if isinstance(node, ast.BoolOp):
        for part in node.values:
            _check(part, text)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check(node.operand, text)
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
        raise InputError(f"in the filter `{text}`, `in` wants a list of values such as ('a', 'b')")


def _is_literal(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | bool)


def _refused(node: ast.expr, text: str) -> InputError:
    return InputError(
        f"the filter `{text}` holds `{ast.unparse(node)}`: use columns, values, comparisons, in, and, or, not"
    )


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
            result = np.logical_and(result, _compare(_value(left, table), op, right, table))
        return result
    return np.asarray(_value(node, table), dtype=bool)


def _compare(left: Any, op: ast.cmpop, right: ast.expr, table: Mapping[str, pd.Series] | pd.DataFrame) -> Any:
    if isinstance(op, ast.In | ast.NotIn):
        inside = np.isin(np.asarray(left), ast.literal_eval(right) if not isinstance(right, ast.Set) else _set(right))
        return inside if isinstance(op, ast.In) else np.logical_not(inside)
    return np.asarray(_COMPARISONS[type(op)](left, _value(right, table)), dtype=bool)


def _set(node: ast.Set) -> list[Any]:
    return sorted(ast.literal_eval(node))


def _value(node: ast.expr, table: Mapping[str, pd.Series] | pd.DataFrame) -> Any:
    if isinstance(node, ast.Name):
        column = table[node.id]
        return column.astype(object) if isinstance(column.dtype, pd.CategoricalDtype) else column
    return ast.literal_eval(node)
