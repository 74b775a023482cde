"""Short ranges of rows, read without the rest of their chunks."""

from __future__ import annotations

import os

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import LocalStore

from lloki_atlas.errors import FormatError, InputError, NotFoundError
from lloki_atlas.store.arrays import ArraySpec, create_arrays, read_row_blocks, read_rows, write_arrays, write_rows


def written(path, n_rows, chunk_rows, *, dtype=np.float16, n_columns=3):
    """Rows of different numbers, in chunks; None for `n_columns` makes an array of one axis, which is compressed."""
    shape = (n_rows,) if n_columns is None else (n_rows, n_columns)
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    create_arrays(path, {"X": ArraySpec(shape, dtype, chunk_rows, ("cell", "k")[: len(shape)])})
    for start in range(0, n_rows, chunk_rows):
        write_rows(path, "X", start, values[start : start + chunk_rows])
    return values


@settings(deadline=None, max_examples=40)
@given(
    data=st.data(),
    n_rows=st.integers(0, 40),
    chunk_rows=st.integers(1, 45),
    kind=st.sampled_from([("float16", 3), ("float32", 1), ("int16", None), ("int64", 2), ("bool", 2)]),
)
def test_any_ranges_of_any_chunking_come_back_in_their_order(tmp_path_factory, data, n_rows, chunk_rows, kind):
    path = tmp_path_factory.mktemp("rows") / "g.zarr"
    values = written(path, n_rows, chunk_rows, dtype=kind[0], n_columns=kind[1])
    starts = data.draw(st.lists(st.integers(0, n_rows), max_size=6))
    blocks = [(start, data.draw(st.integers(start, n_rows))) for start in starts]
    found = read_row_blocks(path, "X", blocks)
    expected = [values[:0], *(values[start:stop] for start, stop in blocks)]
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, np.concatenate(expected))


def test_of_plain_chunks_only_the_bytes_of_the_rows_are_read(tmp_path, monkeypatch):
    values = written(tmp_path / "g.zarr", 1000, 600)
    read = []

    def counted(self, key, prototype, byte_range=None, *, original=LocalStore.get):
        if "/c/" in key:
            read.append(byte_range.end - byte_range.start)
        return original(self, key, prototype, byte_range)

    monkeypatch.setattr(LocalStore, "get", counted)
    found = read_row_blocks(tmp_path / "g.zarr", "X", [(590, 610), (30, 40)])
    np.testing.assert_array_equal(found, np.concatenate([values[590:610], values[30:40]]))
    assert sorted(read) == [60, 60, 60]


def test_rows_that_were_never_written_are_nan_as_in_a_plain_read(tmp_path):
    create_arrays(tmp_path, {"X": ArraySpec((10, 2), np.float16, 4, ("cell", "k"))})
    write_rows(tmp_path, "X", 0, np.ones((4, 2), np.float16))
    np.testing.assert_array_equal(read_row_blocks(tmp_path, "X", [(2, 6)]), read_rows(tmp_path, "X", 2, 6))


@pytest.mark.parametrize("endian", ["little", "big"])
def test_bytes_in_either_order_are_read(tmp_path, endian):
    values = np.arange(20, dtype=np.float32).reshape(10, 2)
    group = zarr.create_group(tmp_path / "g.zarr", zarr_format=3)
    form = {"chunks": (4, 2), "compressors": None, "serializer": zarr.codecs.BytesCodec(endian=endian)}
    group.create_array("X", shape=(10, 2), dtype="float32", **form)[:] = values
    np.testing.assert_array_equal(read_row_blocks(tmp_path / "g.zarr", "X", [(3, 9)]), values[3:9])


def test_columns_in_several_chunks_are_read(tmp_path):
    values = np.arange(60, dtype=np.float32).reshape(10, 6)
    group = zarr.create_group(tmp_path / "g.zarr", zarr_format=3)
    group.create_array("X", shape=(10, 6), dtype="float32", chunks=(4, 2), compressors=None)[:] = values
    np.testing.assert_array_equal(
        read_row_blocks(tmp_path / "g.zarr", "X", [(3, 9), (0, 2)]), values[[*range(3, 9), 0, 1]]
    )


@pytest.mark.parametrize("block", [(-1, 2), (3, 12), (5, 4)])
def test_rows_outside_are_refused(tmp_path, block):
    written(tmp_path / "g.zarr", 11, 4)
    with pytest.raises(InputError, match="has 11 rows"):
        read_row_blocks(tmp_path / "g.zarr", "X", [(0, 2), block])


@pytest.mark.parametrize("n_columns", [3, None])
def test_a_cut_chunk_is_a_format_error(tmp_path, n_columns):
    written(tmp_path / "g.zarr", 11, 4, n_columns=n_columns)
    os.truncate(tmp_path / "g.zarr" / "X" / "c" / ("0" if n_columns is None else "0/0"), 7)
    with pytest.raises(FormatError, match=r"array 'X' of .* is damaged"):
        read_row_blocks(tmp_path / "g.zarr", "X", [(1, 3)])


def test_an_unknown_array_is_not_found(tmp_path):
    write_arrays(tmp_path, {"a": np.ones(2)})
    with pytest.raises(NotFoundError, match="its arrays are a"):
        read_row_blocks(tmp_path, "b", [(0, 1)])
