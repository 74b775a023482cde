"""Arrays in Zarr groups: what is written comes back, by whole chunks only, and xarray reads it."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from support.folders import folder_digest

from lloki_atlas.errors import FormatError, InputError, NotFoundError
from lloki_atlas.store.arrays import (
    ArraySpec,
    create_arrays,
    open_rows,
    read_arrays,
    read_attributes,
    read_rows,
    write_arrays,
    write_rows,
)
from lloki_atlas.store.objects import file_digests

VALUES = {
    "float16": np.linspace(-1, 1, 22, dtype=np.float16).reshape(11, 2),
    "float32": np.linspace(0, 9, 11, dtype=np.float32),
    "int32": np.arange(11, dtype=np.int32),
    "int64": np.arange(33, dtype=np.int64).reshape(11, 3),
    "bool": np.arange(11) % 3 == 0,
    "fixed text": np.array([f"é{row}" for row in range(11)]),
    "object text": np.array(["", "T cell", "ganz langer Name " * 9] + ["x"] * 8, dtype=object),
    "no rows": np.zeros((0, 5), dtype=np.float32),
}


@pytest.mark.parametrize("kind", VALUES)
def test_an_array_comes_back_as_it_was(tmp_path, kind):
    write_arrays(tmp_path / "g.zarr", {"a": VALUES[kind]})
    found = read_arrays(tmp_path / "g.zarr")["a"]
    assert found.dtype == (object if "text" in kind else VALUES[kind].dtype)
    np.testing.assert_array_equal(found, VALUES[kind])


@pytest.mark.parametrize("kind", VALUES)
def test_xarray_opens_an_array_with_its_dimensions(tmp_path, kind):
    dims = ("cell", "factor")[: VALUES[kind].ndim]
    write_arrays(tmp_path / "g.zarr", {"a": VALUES[kind]}, dims={"a": dims}, attributes={"unit": "micrometre"})
    with xarray.open_zarr(tmp_path / "g.zarr", consolidated=False) as found:
        assert found["a"].dims == dims
        assert found.attrs == {"unit": "micrometre"}
        np.testing.assert_array_equal(found["a"].values, VALUES[kind])


def _embedding(path, n_cells=11, chunk_rows=4, dtype=np.float16):
    create_arrays(path, {"X": ArraySpec((n_cells, 3), dtype, chunk_rows, ("cell", "k"), {"unit": "1"})})
    return np.arange(n_cells * 3, dtype=dtype).reshape(n_cells, 3)


def test_rows_written_chunk_by_chunk_with_a_ragged_end_come_back(tmp_path):
    values = _embedding(tmp_path)
    for start in (8, 0, 4):
        write_rows(tmp_path, "X", start, values[start : start + 4])
    np.testing.assert_array_equal(read_arrays(tmp_path)["X"], values)


def test_several_chunks_may_be_written_at_once(tmp_path):
    values = _embedding(tmp_path)
    write_rows(tmp_path, "X", 4, values[4:])
    np.testing.assert_array_equal(read_rows(tmp_path, "X", 4, 11), values[4:])


@pytest.mark.parametrize(("start", "stop"), [(1, 4), (0, 3), (4, 7), (8, 10), (2, 11), (0, 0)])
def test_only_whole_chunks_are_written(tmp_path, start, stop):
    values = _embedding(tmp_path)
    before = folder_digest(tmp_path)
    if start == stop:
        write_rows(tmp_path, "X", start, values[start:stop])
    else:
        with pytest.raises(InputError, match="whole chunks"):
            write_rows(tmp_path, "X", start, values[start:stop])
    assert folder_digest(tmp_path) == before


@pytest.mark.parametrize("start", [-4, 12])
def test_rows_outside_are_refused(tmp_path, start):
    values = _embedding(tmp_path)
    with pytest.raises(InputError, match="outside"):
        write_rows(tmp_path, "X", start, values[:4])


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 3, 1)])
def test_rows_of_another_shape_are_refused(tmp_path, shape):
    _embedding(tmp_path)
    with pytest.raises(InputError, match="do not fit"):
        write_rows(tmp_path, "X", 0, np.zeros(shape, np.float16))


def test_values_of_another_kind_are_refused(tmp_path):
    create_arrays(tmp_path, {"n": ArraySpec((4,), np.int32, 4, ("cell",))})
    with pytest.raises(InputError, match="float64"):
        write_rows(tmp_path, "n", 0, np.full(4, 0.5))


def test_writing_the_same_rows_again_changes_no_byte(tmp_path):
    values = _embedding(tmp_path)
    write_rows(tmp_path, "X", 8, values[8:])
    before = folder_digest(tmp_path)
    write_rows(tmp_path, "X", 8, values[8:])
    assert folder_digest(tmp_path) == before


def test_creating_again_keeps_what_was_written(tmp_path):
    values = _embedding(tmp_path)
    write_rows(tmp_path, "X", 0, values)
    before = folder_digest(tmp_path)
    _embedding(tmp_path)
    assert folder_digest(tmp_path) == before


@pytest.mark.parametrize("other", [{"n_cells": 12}, {"chunk_rows": 5}, {"dtype": np.float32}])
def test_creating_in_another_form_is_refused(tmp_path, other):
    _embedding(tmp_path)
    with pytest.raises(FormatError, match="remove the folder"):
        _embedding(tmp_path, **other)


def test_rows_not_written_are_missing_not_zero(tmp_path):
    values = _embedding(tmp_path)
    write_rows(tmp_path, "X", 0, values[:4])
    assert np.isnan(read_rows(tmp_path, "X", 4, 11)).all()


def test_a_chunk_of_nothing_but_the_fill_value_is_a_file_too(tmp_path):
    _embedding(tmp_path)
    write_rows(tmp_path, "X", 0, np.full((11, 3), np.nan, np.float16))
    assert sorted(entry.name for entry in (tmp_path / "X" / "c").iterdir()) == ["0", "1", "2"]


def test_vectors_are_stored_plain_and_other_arrays_compressed(tmp_path):
    write_arrays(tmp_path, {"X": np.zeros((9, 2), np.float32), "n": np.zeros(9, np.int64)})
    group = zarr.open_group(tmp_path, mode="r")
    assert group["X"].compressors == ()
    assert len(group["n"].compressors) == 1


def test_attributes_come_back(tmp_path):
    write_arrays(tmp_path, {}, attributes={"a": [1, 2], "b": "µm"})
    assert read_attributes(tmp_path) == {"a": [1, 2], "b": "µm"}


def test_only_named_arrays_are_read(tmp_path):
    write_arrays(tmp_path, {"a": np.ones(2), "b": np.ones(2)})
    assert list(read_arrays(tmp_path, ["b"])) == ["b"]


def test_an_unknown_array_is_not_found_and_the_known_are_named(tmp_path):
    write_arrays(tmp_path, {"a": np.ones(2)})
    with pytest.raises(NotFoundError, match="its arrays are a"):
        read_rows(tmp_path, "b", 0, 1)


def test_a_missing_group_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match="no arrays at"):
        read_arrays(tmp_path / "none")


def test_reading_writes_nothing(tmp_path):
    write_arrays(tmp_path, {"a": np.ones(2)})
    before = folder_digest(tmp_path)
    read_arrays(tmp_path), read_rows(tmp_path, "a", 0, 1), read_attributes(tmp_path)
    assert folder_digest(tmp_path) == before


@pytest.mark.parametrize("damaged", ["c/0", "c/0/0"])
def test_a_cut_chunk_is_a_format_error_that_names_the_array(tmp_path, damaged):
    write_arrays(tmp_path, {"a": np.arange(9) if damaged == "c/0" else np.ones((9, 2), np.float32)})
    os.truncate(tmp_path / "a" / damaged, 7)
    with pytest.raises(FormatError, match="array 'a'"):
        read_arrays(tmp_path)


def test_garbled_metadata_is_a_format_error(tmp_path):
    write_arrays(tmp_path, {"a": np.ones(2)})
    (tmp_path / "zarr.json").write_text("{")
    with pytest.raises(FormatError, match="not a readable Zarr"):
        read_arrays(tmp_path)


@pytest.mark.parametrize(
    "values", [np.array(1.0), np.array([1, None], dtype=object), np.array([1j]), np.array(["2020"], "M8[D]")]
)
def test_what_cannot_be_stored_is_refused(tmp_path, values):
    with pytest.raises(InputError):
        write_arrays(tmp_path, {"a": values})


@pytest.mark.parametrize(("name", "broken"), [("X", "os.fsync"), ("n", "zarr.storage._local._put")])
def test_a_full_disk_goes_through_unchanged_and_leaves_nothing(tmp_path, monkeypatch, name, broken):
    create_arrays(
        tmp_path,
        {"X": ArraySpec((4, 3), np.float16, 4, ("cell", "k")), "n": ArraySpec((4,), np.int64, 4, ("cell",))},
    )
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(broken, full)
    with pytest.raises(OSError, match="No space") as caught:
        write_rows(tmp_path, name, 0, np.zeros((4, 3), np.float16) if name == "X" else np.zeros(4, np.int64))
    assert caught.value.errno == errno.ENOSPC
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before


def test_writing_says_what_the_files_hold(tmp_path):
    values = _embedding(tmp_path)
    written = write_rows(tmp_path, "X", 0, values)
    assert len(written) > 1
    assert {name: entry for name, entry in file_digests(tmp_path).items() if not name.endswith("zarr.json")} == written


def test_writing_text_says_what_the_files_hold(tmp_path):
    create_arrays(tmp_path, {"name": ArraySpec((5,), str, 2, ("cell",))})
    written = write_rows(tmp_path, "name", 0, np.array(list("abcde")))
    assert {name: entry for name, entry in file_digests(tmp_path).items() if not name.endswith("zarr.json")} == written


@pytest.mark.parametrize("n_rows", [1, 3, 4, 7, 8])
def test_files_of_vectors_have_the_bytes_that_zarr_would_write(tmp_path, n_rows):
    values = np.arange(n_rows * 3, dtype=np.float16).reshape(n_rows, 3)
    spec = ArraySpec((n_rows, 3), np.float16, 4, ("cell", "k"))
    for folder in ("ours", "zarr"):
        create_arrays(tmp_path / folder, {"X": spec})
    write_rows(tmp_path / "ours", "X", 0, values)
    zarr.open_array(tmp_path / "zarr" / "X")[:] = values
    assert file_digests(tmp_path / "ours") == file_digests(tmp_path / "zarr")


def test_opened_rows_do_not_bring_back_a_folder_that_is_gone(tmp_path):
    create_arrays(tmp_path / "g", {"X": ArraySpec((4, 3), np.float16, 2, ("cell", "k"))})
    rows = open_rows(tmp_path / "g", "X", mode="r+")
    rows.write(0, np.zeros((2, 3), np.float16))
    (tmp_path / "g").rename(tmp_path / "published")
    with pytest.raises(FileNotFoundError):
        rows.write(2, np.zeros((2, 3), np.float16))
    assert not (tmp_path / "g").exists()


@settings(deadline=None, max_examples=25)
@given(data=st.data(), n_rows=st.integers(0, 23), chunk_rows=st.integers(1, 9))
def test_any_row_range_of_any_chunking_comes_back(tmp_path_factory, data, n_rows, chunk_rows):
    path = tmp_path_factory.mktemp("rows") / "g.zarr"
    values = np.arange(n_rows * 2, dtype=np.float32).reshape(n_rows, 2)
    create_arrays(path, {"X": ArraySpec((n_rows, 2), np.float32, chunk_rows, ("cell", "k"))})
    for first in data.draw(st.permutations(range(0, n_rows, chunk_rows))):
        write_rows(path, "X", first, values[first : first + chunk_rows])
    start = data.draw(st.integers(0, n_rows))
    stop = data.draw(st.integers(start, n_rows))
    np.testing.assert_array_equal(read_rows(path, "X", start, stop), values[start:stop])
