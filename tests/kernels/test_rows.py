from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from lloki_atlas.kernels.rows import Rows, dense_rows

MATRIX = np.arange(40, dtype=np.float32).reshape(10, 4)


@pytest.mark.parametrize(
    "part", [slice(2, 5), slice(0, 10), slice(None), slice(7, None), slice(4, 4), slice(-3, -1), slice(8, 99)]
)
def test_a_slice_has_the_rows_of_the_matrix(part):
    rows = Rows(MATRIX.shape, lambda start, stop: MATRIX[start:stop])
    np.testing.assert_array_equal(rows[part], MATRIX[part])


def test_rows_that_end_before_they_begin_are_none():
    assert len(Rows(MATRIX.shape, lambda start, stop: MATRIX[start:stop])[6:2]) == 0


def test_only_what_is_sliced_is_read():
    asked = []
    rows = Rows(MATRIX.shape, lambda start, stop: asked.append((start, stop)))
    assert asked == []
    _ = rows[3:5], rows[5:6]
    assert asked == [(3, 5), (5, 6)]


def test_a_shape_is_of_plain_numbers():
    assert Rows((np.int64(3), np.int32(2)), lambda start, stop: None).shape == (3, 2)


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csr_array])
def test_sparse_rows_become_dense_float32(kind):
    matrix = kind((MATRIX % 3).astype(np.float64))
    rows = dense_rows(matrix)[2:9]
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, (MATRIX % 3)[2:9])


def test_rows_of_rows_become_dense_too():
    matrix = sp.csr_matrix(MATRIX % 3)
    rows = dense_rows(Rows(matrix.shape, lambda start, stop: matrix[start:stop]))
    assert rows.shape == MATRIX.shape
    np.testing.assert_array_equal(rows[:], MATRIX % 3)
