"""Tiles of products: right at every size and number of dimensions, the same bits from either side."""

from __future__ import annotations

import numpy as np
import pytest

from lloki_atlas.kernels.products import BLOCK, COLUMNS, ROWS, dot_eight, pack, product_block


def random_rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    rows = np.zeros((n + ROWS, d), dtype=np.float32)
    rows[:n] = np.random.default_rng(seed).normal(size=(n, d))
    return rows


def products(left: np.ndarray, right: np.ndarray, *, squares: bool = False) -> np.ndarray:
    n, m = len(left) - ROWS, len(right) - ROWS
    panel = np.full(left.shape[1] * BLOCK, np.nan, dtype=np.float32)
    block = np.full((n + ROWS, BLOCK), np.nan, dtype=np.float32)
    pack(right, 0, m, panel)
    product_block(left, 0, n, panel, block, squares)
    return block[:n, :m]


@pytest.mark.parametrize("d", [0, 1, 3, 16, 255, 256, 257, 600])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (ROWS, COLUMNS), (ROWS + 1, COLUMNS + 1), (131, 256)])
def test_products_are_those_of_float64(n, m, d):
    left, right = random_rows(n, d, 1), random_rows(m, d, 2)
    expected = left[:n].astype(np.float64) @ right[:m].astype(np.float64).T
    scale = np.abs(left[:n]).astype(np.float64) @ np.abs(right[:m]).astype(np.float64).T
    assert (np.abs(products(left, right) - expected) <= 1e-6 * np.maximum(scale, 1e-30)).all()


@pytest.mark.parametrize("d", [1, 7, 300])
def test_squares_are_those_of_float64(d):
    left, right = random_rows(40, d, 1), random_rows(70, d, 2)
    expected = ((left[:40, None].astype(np.float64) - right[None, :70]) ** 2).sum(axis=2)
    np.testing.assert_allclose(products(left, right, squares=True), expected, rtol=1e-5)


@pytest.mark.parametrize("squares", [False, True])
def test_a_pair_has_the_same_bits_from_either_side(squares):
    left, right = random_rows(50, 333, 1), random_rows(50, 333, 2)
    there, back = products(left, right, squares=squares), products(right, left, squares=squares)
    np.testing.assert_array_equal(there, back.T)


def test_a_row_has_the_same_bits_wherever_it_stands():
    rows = random_rows(200, 300)
    whole = products(rows, rows)
    order = np.random.default_rng(1).permutation(200)
    moved = rows.copy()
    moved[:200] = rows[order]
    np.testing.assert_array_equal(products(moved, moved), whole[order][:, order])


def test_rows_that_are_not_there_are_zero():
    panel = np.full(3 * BLOCK, np.nan, dtype=np.float32)
    pack(random_rows(5, 3), 0, 5, panel)
    lanes = panel.reshape(BLOCK // COLUMNS, 3, COLUMNS)
    assert (lanes[1:] == 0).all()
    assert (lanes[0, :, 5:] == 0).all()


@pytest.mark.parametrize("d", [0, 1, 15, 16, 255, 256, 257, 600])
def test_eight_products_at_once_have_the_bits_of_a_block(d):
    rows = random_rows(40, d)
    whole = products(rows, rows)
    others = np.array([39, 0, 7, 7, 21, 3, 38, 12])
    for i in (0, 7, 39):
        eight = np.full(8, np.nan, dtype=np.float32)
        dot_eight(rows, i, others, eight)
        assert eight.tobytes() == whole[i, others].tobytes()
