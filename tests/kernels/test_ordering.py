from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.ordering import hilbert_order

# whole numbers and powers of two are exact in float32, so that moving and scaling round nothing
POINTS = st.lists(st.tuples(st.integers(-500, 500), st.integers(-500, 500)), min_size=1, max_size=60)


@settings(deadline=None, max_examples=25)
@given(points=POINTS)
def test_order_is_a_permutation(points):
    order = hilbert_order(np.array(points, dtype=np.float32))
    assert order.dtype == np.int64
    assert sorted(order) == list(range(len(points)))


@settings(deadline=None, max_examples=25)
@given(points=POINTS, dx=st.integers(-999, 999), dy=st.integers(-999, 999), power=st.integers(-4, 4))
def test_order_does_not_change_with_origin_and_unit(points, dx, dy, power):
    xy = np.array(points, dtype=np.float32)
    moved = (xy + np.array([dx, dy], dtype=np.float32)) * np.float32(2.0**power)
    np.testing.assert_array_equal(hilbert_order(moved), hilbert_order(xy))


@settings(deadline=None, max_examples=25)
@given(points=POINTS, seed=st.integers(0, 99))
def test_permuting_cells_visits_the_same_places_in_the_same_order(points, seed):
    xy = np.array(points, dtype=np.float32)
    shuffled = xy[np.random.default_rng(seed).permutation(len(xy))]
    np.testing.assert_array_equal(shuffled[hilbert_order(shuffled)], xy[hilbert_order(xy)])


@pytest.mark.parametrize("side", [2, 8, 16])
def test_cells_of_a_full_grid_are_visited_by_steps_of_one(side):
    xy = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2).astype(np.float32)
    walked = xy[hilbert_order(xy)]
    np.testing.assert_array_equal(np.abs(np.diff(walked, axis=0)).sum(axis=1), 1)


def test_the_curve_starts_at_the_origin_and_ends_at_the_other_end_of_the_x_axis():
    xy = np.array([[1, 0], [1, 1], [0, 1], [0, 0]], dtype=np.float32)
    assert hilbert_order(xy).tolist() == [3, 2, 1, 0]


def test_cells_at_one_place_keep_the_order_of_their_rows():
    assert hilbert_order(np.ones((5, 2), dtype=np.float32)).tolist() == [0, 1, 2, 3, 4]


def test_cells_on_a_line_are_ordered_along_it():
    x = np.array([3, 1, 2, 0], dtype=np.float32)
    assert hilbert_order(np.column_stack([x, np.zeros(4)])).tolist() == [3, 1, 2, 0]


@pytest.mark.parametrize("n", [0, 1])
def test_a_slice_of_no_or_one_cell_has_an_order(n):
    assert hilbert_order(np.zeros((n, 2), dtype=np.float32)).tolist() == list(range(n))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_coordinate_that_is_not_finite_is_named_by_its_row(bad):
    xy = np.zeros((4, 2))
    xy[2, 1] = bad
    with pytest.raises(InputError, match="row 2"):
        hilbert_order(xy)


def test_three_columns_are_refused():
    with pytest.raises(InputError, match="shape"):
        hilbert_order(np.zeros((4, 3)))


def test_cells_at_one_place_are_ordered_by_name_whatever_their_rows():
    draws = np.random.default_rng(2)
    xy = draws.integers(0, 4, size=(60, 2)).astype(np.float32)
    names = [f"cell{number:02d}" for number in draws.permutation(60)]
    expected = [names[row] for row in hilbert_order(xy, names=names)]
    for seed in range(5):
        rows = np.random.default_rng(seed).permutation(60)
        moved = [names[row] for row in rows]
        assert [moved[row] for row in hilbert_order(xy[rows], names=moved)] == expected
