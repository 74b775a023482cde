"""Every form of a matrix becomes the same CSR float32, and a dense one is never seen whole."""

from __future__ import annotations

import tracemalloc

import h5py
import numpy as np
import pytest
from anndata.io import write_elem
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from lloki_atlas.stages import matrices
from lloki_atlas.stages.matrices import read_counts

FORMS = {
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "coo": sparse.coo_matrix,
    "csr_array": sparse.csr_array,
    "dense": np.asarray,
    "fortran": np.asfortranarray,
    "integers": lambda values: values.astype(np.int64),
    "float64": lambda values: sparse.csr_matrix(values.astype(np.float64)),
}


def counts(n_cells=23, n_genes=7):
    return np.random.default_rng(0).poisson(0.5, (n_cells, n_genes)).astype(np.float32)


@pytest.mark.parametrize("rows", [None, [0, 3, 22], []], ids=["all", "some", "none"])
@pytest.mark.parametrize("form", FORMS)
def test_form_is_read_as_csr_float32(form, rows):
    values = counts()
    rows = None if rows is None else np.array(rows, dtype=np.int64)
    read = read_counts(FORMS[form](values), rows)
    assert read.format == "csr"
    assert read.dtype == np.float32
    assert np.array_equal(read.toarray(), values if rows is None else values[rows])


@pytest.mark.parametrize("rows", [None, [1, 2, 20]], ids=["all", "some"])
@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_form_on_disk_is_read_as_csr_float32(form, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(matrices, "SPARSE_BLOCK_ROWS", 5)
    monkeypatch.setattr(matrices, "BLOCK_BYTES", 100)
    values = counts()
    rows = None if rows is None else np.array(rows, dtype=np.int64)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        write_elem(file, "X", FORMS[form](values))
        read = read_counts(file["X"], rows)
    assert np.array_equal(read.toarray(), values if rows is None else values[rows])


def test_stored_zeros_and_repeated_entries_are_merged():
    given = sparse.csr_matrix((np.array([1.0, 2.0, 0.0]), np.array([1, 1, 0]), np.array([0, 3])), shape=(1, 2))
    read = read_counts(given)
    assert read.nnz == 1
    assert read.toarray().tolist() == [[0.0, 3.0]]


def test_source_is_not_changed():
    given = sparse.csr_matrix((np.array([1.0, 0.0], np.float32), np.array([1, 0]), np.array([0, 2])), shape=(1, 2))
    read = read_counts(given)
    read.data[:] = 7
    assert given.data.tolist() == [1.0, 0.0]
    assert given.indices.tolist() == [1, 0]


def test_missing_values_survive_for_the_check_to_find():
    values = counts()
    values[4, 2] = np.nan
    assert np.isnan(read_counts(values).data).sum() == 1


@pytest.mark.parametrize("chunks", [None, True, (16, 400)], ids=["contiguous", "auto", "rows"])
def test_dense_dataset_is_never_held_whole(chunks, tmp_path, monkeypatch):
    monkeypatch.setattr(matrices, "BLOCK_BYTES", 1 << 18)
    values = (np.random.default_rng(0).random((4000, 400)) < 0.01).astype(np.float32)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("X", data=values, chunks=chunks)
        tracemalloc.start()
        read = read_counts(dataset)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert np.array_equal(read.toarray(), values)
    assert peak < values.nbytes / 4


def test_dense_array_in_memory_is_never_copied_whole(monkeypatch):
    monkeypatch.setattr(matrices, "BLOCK_BYTES", 1 << 18)
    values = (np.random.default_rng(0).random((4000, 400)) < 0.01).astype(np.float32)
    tracemalloc.start()
    read_counts(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < values.nbytes / 4


@settings(deadline=None, max_examples=25)
@given(block_bytes=st.integers(1, 2000), n_cells=st.integers(0, 30), data=st.data())
def test_size_of_a_block_changes_nothing(block_bytes, n_cells, data):
    values = counts(n_cells)
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, max(0, n_cells - 1)), max_size=n_cells))), dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrices, "BLOCK_BYTES", block_bytes)
        assert np.array_equal(read_counts(values, rows).toarray(), values[rows])
