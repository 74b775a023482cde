"""obs columns: what changes so that they can be stored, and what does not."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lloki_atlas.stages.columns import storable_column, storable_obs


def values(column):
    stored = storable_column(pd.Series(column))
    return stored.dtype, list(stored)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int8", "int64", "uint16", "bool"])
def test_numbers_keep_their_type(dtype):
    assert values(np.array([0, 1], dtype=dtype)) == (np.dtype(dtype), [0, 1])


def test_repeated_text_becomes_categorical():
    dtype, stored = values(["a", "b", "a"])
    assert isinstance(dtype, pd.CategoricalDtype)
    assert stored == ["a", "b", "a"]


def test_text_that_never_repeats_stays_text():
    assert values(["a", "b"]) == (np.dtype(object), ["a", "b"])


def test_missing_text_stays_missing():
    stored = storable_column(pd.Series(["a", None, "b"], dtype=object))
    assert pd.isna(list(stored)[1])


def test_mixed_objects_become_text():
    assert values([1, "x", 1.5, "x"])[1] == ["1", "x", "1.5", "x"]


def test_dates_become_text():
    assert values(pd.to_datetime(["2024-01-02", "2024-01-03"]))[1] == ["2024-01-02", "2024-01-03"]


@pytest.mark.parametrize("dtype", ["Int64", "UInt8", "boolean"])
def test_nullable_type_with_missing_values_is_kept(dtype):
    kept, stored = values(pd.array([1, None, 1], dtype=dtype))
    assert kept == dtype
    assert stored[1] is pd.NA


def test_missing_nullable_float_becomes_nan():
    dtype, stored = values(pd.array([1.5, None], dtype="Float64"))
    assert dtype == np.float64
    assert np.isnan(stored[1])


def test_nullable_types_without_missing_values_become_plain():
    assert values(pd.array([1, 2], dtype="Int64"))[0] == np.int64
    assert values(pd.array([True, False], dtype="boolean"))[0] == np.bool_
    assert values(pd.array([0.5, 1.5], dtype="Float32"))[0] == np.float64


def test_order_of_categories_is_kept():
    column = pd.Categorical(["low", "high"], categories=["low", "mid", "high"], ordered=True)
    stored = storable_column(pd.Series(column))
    assert stored.ordered
    assert list(stored.categories) == ["low", "mid", "high"]


def test_categories_of_mixed_objects_become_text():
    assert values(pd.Categorical([(1, 2), "x", (1, 2)]))[1] == ["(1, 2)", "x", "(1, 2)"]


def test_names_that_spatialdata_refuses_are_mended_and_told():
    names = ["cell type", "__x", "_index", "Area", "area", "a/b", "p-value.1"]
    frame, stored = storable_obs(pd.DataFrame([[0] * 7], columns=names))
    assert stored == {
        "cell type": "cell_type",
        "__x": "x",
        "_index": "column",
        "Area": "Area",
        "area": "area_2",
        "a/b": "a_b",
        "p-value.1": "p-value.1",
    }
    assert list(frame) == list(stored.values())


def test_changed_name_does_not_take_a_later_column_s_own():
    _, stored = storable_obs(pd.DataFrame([[0, 0]], columns=["cell type", "cell_type"]))
    assert stored == {"cell type": "cell_type_2", "cell_type": "cell_type"}


def test_reserved_column_is_left_out():
    frame, _ = storable_obs(pd.DataFrame({"source_row": [1], "x": [2]}), reserved=("source_row",))
    assert list(frame) == ["x"]
