"""Filters: what the language holds, what it refuses, and that they mean what Python and pandas mean by them."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lloki_atlas.errors import InputError
from lloki_atlas.query.where import parse_filter

TABLE = pd.DataFrame(
    {
        "n": [1, 2, 3, 4],
        "depth": [0.5, np.nan, -1.0, 2.0],
        "kind": pd.Categorical(["b", "a", None, "c"]),
        "note": np.array(["x", None, "y", "z"], dtype=object),
        "age": pd.array([10, None, 30, 20], dtype="Int64"),
        "kept": pd.array([True, None, False, True], dtype="boolean"),
        "inside": [True, False, False, True],
    }
)


def rows(text, table=TABLE):
    """Numbers of the rows that a filter keeps, counted from 1."""
    return [int(row) + 1 for row in np.flatnonzero(parse_filter(text).mask(table, len(table)))]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("n == 2", [2]),
        ("n != 2", [1, 3, 4]),
        ("n < 2", [1]),
        ("n <= 2", [1, 2]),
        ("n > 2", [3, 4]),
        ("n >= 2", [2, 3, 4]),
        ("2 < n", [3, 4]),
        ("1 < n <= 3", [2, 3]),
        ("4 > n != 2", [1, 3]),
        ("n in (1, 4)", [1, 4]),
        ("n in [1, 4]", [1, 4]),
        ("n in {1, 4}", [1, 4]),
        ("n not in (1, 4)", [2, 3]),
        ("n in ()", []),
        ("n not in ()", [1, 2, 3, 4]),
        ("depth == -1.0", [3]),
        ("depth in (-1, 2)", [3, 4]),
        ("depth < n", [1, 3, 4]),
        ("kind == 'a'", [2]),
        ('kind == "a"', [2]),
        ("kind < 'c'", [1, 2]),
        ("kind in ('a', 'b')", [1, 2]),
        ("note > 'x'", [3, 4]),
        ("age > 15", [3, 4]),
        ("age in (10, 20)", [1, 4]),
        ("kept", [1, 4]),
        ("kept == True", [1, 4]),
        ("kept == False", [3]),
        ("not inside", [2, 3]),
        ("inside and kept", [1, 4]),
        ("n == 1 or n == 3", [1, 3]),
        ("1 == 1", [1, 2, 3, 4]),
        ("'a' in ('b', 'c')", []),
        ("  n == 2\t", [2]),
        ("(n == 2\n or n == 3)", [2, 3]),
    ],
)
def test_a_filter_keeps(text, kept):
    assert rows(text) == kept


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("n == 1 or n == 2 and n == 3", "n == 1 or (n == 2 and n == 3)"),
        ("not n == 1 and n == 2", "(not n == 1) and n == 2"),
        ("not n == 1 or n == 1", "(not n == 1) or n == 1"),
        ("not not n == 1", "n == 1"),
        ("n in (1, 2) and not n in (2, 3)", "n == 1"),
        ("n not in (1, 2)", "not n in (1, 2)"),
    ],
)
def test_precedence_is_that_of_python(text, same):
    assert rows(text) == rows(same)


@pytest.mark.parametrize(
    ("column", "value"), [("depth", 2.0), ("kind", "'b'"), ("note", "'x'"), ("age", 10), ("kept", True)]
)
class TestAMissingValue:
    def missing(self, column):
        return [int(row) + 1 for row in np.flatnonzero(TABLE[column].isna())]

    @pytest.mark.parametrize("operator", ["==", "<", "<=", ">", ">="])
    def test_satisfies_no_comparison(self, column, value, operator):
        assert not set(self.missing(column)) & set(rows(f"{column} {operator} {value}"))

    @pytest.mark.parametrize("operator", ["==", "<", "<=", ">", ">="])
    def test_satisfies_no_comparison_from_the_other_side(self, column, value, operator):
        assert not set(self.missing(column)) & set(rows(f"{value} {operator} {column}"))

    def test_satisfies_not_equal(self, column, value):
        assert set(self.missing(column)) <= set(rows(f"{column} != {value}"))

    def test_is_in_no_list(self, column, value):
        assert not set(self.missing(column)) & set(rows(f"{column} in ({value},)"))

    def test_satisfies_not_in(self, column, value):
        assert set(self.missing(column)) <= set(rows(f"{column} not in ({value},)"))

    def test_differs_from_itself(self, column, value):
        assert rows(f"{column} != {column}") == self.missing(column)


def test_a_column_of_nothing_but_missing_values_can_be_compared_with_anything():
    table = pd.DataFrame({"gone": [np.nan, np.nan]})
    assert rows("gone < 'a'", table) == []
    assert rows("gone != 3", table) == [1, 2]
    assert rows("gone", table) == []


@pytest.mark.parametrize(
    "text",
    ["n in ('1', '2')", "depth in ('0.5',)", "age in ('10',)", "note in (1,)", "n == '1'", "kind == 1"],
)
def test_text_equals_no_number(text):
    assert rows(text) == []


def test_a_list_may_mix_text_and_numbers():
    assert rows("n in (1, 'x')") == [1]
    assert rows("note in (1, 'x')") == [1]


def test_numbers_in_a_list_are_rounded_as_in_a_comparison():
    table = pd.DataFrame({"depth": np.array([0.1, 0.2], dtype=np.float32)})
    assert rows("depth in (0.1,)", table) == rows("depth == 0.1", table) == [1]


@pytest.mark.parametrize("text", ["n < 'a'", "note < 3", "kind >= 1", "age > 'x'", "1 < 'a'", "depth == " + "9" * 400])
def test_values_of_different_types_are_not_ordered(text):
    with pytest.raises(InputError, match="different types"):
        rows(text)


@pytest.mark.parametrize("text", ["n", "note", "not kind", "inside and depth"])
def test_a_column_that_stands_alone_is_true_or_false(text):
    with pytest.raises(InputError, match="compare it with a value"):
        rows(text)


REFUSED = {
    "a call": "len(note) == 1",
    "a method": "note.startswith('x')",
    "an attribute": "note.str",
    "a dunder": "note.__class__ == 1",
    "a subscript": "note[0] == 'x'",
    "a lambda": "lambda: n",
    "a comprehension": "[n for n in (1, 2)]",
    "a generator": "n in (k for k in (1, 2))",
    "a conditional": "n if inside else depth",
    "an assignment": "(n := 1) == 1",
    "arithmetic": "n + 1 == 2",
    "a bit operator": "(n == 1) | (n == 2)",
    "an inversion": "~inside",
    "a power": "n == 10 ** 9",
    "a format string": "note == f'{n}'",
    "bytes": "note == b'x'",
    "None": "note == None",
    "an ellipsis": "n == ...",
    "a complex number": "n == 1j",
    "identity": "n is 1",
    "identity of None": "note is not None",
    "a value alone": "True",
    "a list alone": "(n, depth)",
    "a minus before text": "note == -'x'",
    "a minus before truth": "n == -True",
    "a minus before a column": "-n == 1",
    "a list of columns": "n in (age, depth)",
    "a list in a list": "n in ((1, 2), 3)",
    "an unpacked list": "n in (*(1, 2),)",
    "in text": "note in 'xyz'",
    "in a column": "'x' in note",
    "in one value": "n in (1)",
    "await": "await n",
    "a statement": "import os",
    "two statements": "n == 1; n == 2",
    "an open end": "n ==",
    "an open bracket": "(n == 1",
    "an open quote": "note == 'x",
    "a null byte": "note == 'x\0'",
    "half a character": "note == '\ud800'",
    "empty text": "",
    "blanks": " \n\t",
    "a comment": "# n == 1",
    "deep brackets": "(" * 400 + "inside" + ")" * 400,
    "deep denials": "not " * 3000 + "inside",
    "rather deep denials": "not " * 200 + "inside",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_filter_does_not_hold(name):
    with pytest.raises(InputError, match=r"^(cannot read|in |)\s*the filter") as caught:
        parse_filter(REFUSED[name])
    message = str(caught.value)
    assert len(message) < 600
    assert "\n" not in message


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch {0}')",
        "open('{0}', 'w') == 1",
        "n == 1 or open('{0}', 'w')",
        "n in (open('{0}', 'w'),)",
        "note == (lambda: open('{0}', 'w'))()",
        "().__class__.__bases__[0].__subclasses__()",
        'note == f\'{{open("{0}", "w")}}\'',
        "[x for x in [open('{0}', 'w')]]",
        "@exec('open(1)')",
        "n == 1 and exec('import os')",
    ],
)
def test_nothing_in_a_filter_is_executed(tmp_path, text):
    target = tmp_path / "touched"
    with pytest.raises(InputError):
        parse_filter(text.format(target)).mask(TABLE, len(TABLE))
    assert not Path(target).exists()


def test_a_name_of_a_function_is_only_a_column():
    assert parse_filter("open == 1").columns == ("open",)


def test_a_filter_lists_its_columns_once_in_order():
    assert parse_filter("b == 1 and (a < b or not c in (1,))").columns == ("b", "a", "c")


def test_odd_text_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rows(r"note == '\d'") == []
        assert rows("n == 1or n == 2") == [1, 2]


def test_a_long_filter_is_not_repeated_whole():
    with pytest.raises(InputError) as caught:
        parse_filter(" or ".join(f"note == 'name {n}'" for n in range(500)) + " or f()")
    assert len(str(caught.value)) < 600


def test_a_thousand_values_fit_in_a_list():
    names = ", ".join(f"'name {n}'" for n in range(5000))
    assert rows(f"note in ('x', {names})") == [1]


def test_the_mask_is_the_callers_own():
    mask = parse_filter("1 == 1").mask(TABLE, len(TABLE))
    mask[0] = False
    assert mask.tolist() == [False, True, True, True]


# the same text means the same to pandas (with missing values) and to Python (row by row, without)

NUMBERS = st.sampled_from([-2, -1, 0, 1, 2, 0.5, 1.5])
LETTERS = st.sampled_from(["", "a", "b", "B", "é", "it's"])


def literals(values):
    return st.lists(values, min_size=1, max_size=3).map(repr)


PANDAS_LEAVES = st.one_of(
    st.builds("{} {} {}".format, st.sampled_from("uv"), st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), NUMBERS),
    st.builds("u {} v".format, st.sampled_from(["==", "!=", "<", "<=", ">", ">="])),
    st.builds("{} {} {}".format, st.sampled_from("uv"), st.sampled_from(["in", "not in"]), literals(NUMBERS)),
    st.builds("t {} {!r}".format, st.sampled_from(["==", "!="]), LETTERS),
    st.builds("t {} {}".format, st.sampled_from(["in", "not in"]), literals(LETTERS)),
)
PYTHON_LEAVES = st.one_of(
    PANDAS_LEAVES,
    st.just("b"),
    st.builds("t {} {!r}".format, st.sampled_from(["<", "<=", ">", ">="]), LETTERS),
    st.builds("{} {} u < {}".format, NUMBERS, st.sampled_from(["<", "<=", "!="]), NUMBERS),
    st.builds("{} in {}".format, NUMBERS, literals(NUMBERS)),
)


TOKENS = ["n", "note", "==", "<", "in", "not", "and", "or", "(", ")", ",", "'x'", "-1", "0.5", "True", "lambda", "."]


def expressions(leaves):
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds("({} and {})".format, inner, inner),
            st.builds("({} or {})".format, inner, inner),
            st.builds("(not {})".format, inner),
        ),
        max_leaves=6,
    )


def tables(missing):
    number = st.one_of(NUMBERS, st.just(np.nan)) if missing else NUMBERS
    letter = st.one_of(LETTERS, st.none()) if missing else LETTERS
    row = st.tuples(number, number, letter, st.booleans())
    return st.lists(row, min_size=1, max_size=8).map(as_table)


def as_table(values):
    u, v, t, b = zip(*values, strict=True)
    return pd.DataFrame(
        {"u": np.array(u, dtype=float), "v": np.array(v, dtype=float), "t": np.array(t, dtype=object), "b": b}
    )


@given(text=expressions(PANDAS_LEAVES), table=tables(missing=True))
@settings(max_examples=20, deadline=None)
def test_a_filter_means_what_pandas_means(text, table):
    expected = np.broadcast_to(table.eval(text, engine="python"), len(table))
    assert np.array_equal(parse_filter(text).mask(table, len(table)), expected)


@given(text=expressions(PYTHON_LEAVES), table=tables(missing=False))
@settings(max_examples=20, deadline=None)
def test_a_filter_means_what_python_means_of_each_row(text, table):
    expected = [bool(eval(text, {}, row)) for row in table.to_dict(orient="records")]
    assert parse_filter(text).mask(table, len(table)).tolist() == expected


@given(text=expressions(PYTHON_LEAVES), table=tables(missing=True), order=st.randoms())
@settings(max_examples=20, deadline=None)
def test_each_row_is_judged_by_itself(text, table, order):
    rows = list(range(len(table)))
    order.shuffle(rows)
    shuffled = table.iloc[rows].reset_index(drop=True)
    whole = parse_filter(text).mask(table, len(table))
    assert np.array_equal(parse_filter(text).mask(shuffled, len(table)), whole[rows])


@given(text=st.lists(st.one_of(st.sampled_from(TOKENS), st.text(max_size=3)), max_size=8).map(" ".join))
@settings(max_examples=20, deadline=None)
def test_any_text_is_a_filter_or_an_input_error(text):
    with contextlib.suppress(InputError):
        assert all(column.isidentifier() for column in parse_filter(text).columns)
