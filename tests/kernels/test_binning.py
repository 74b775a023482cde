import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokens import bin_values

from lloki_atlas.kernels.binning import _quantiles, count_present


def test_distinct_values_are_binned_by_their_quantiles():
    assert bin_values(np.array([5, 1, 3], dtype=np.float32), n_bins=5).tolist() == [4, 1, 2]


def test_equal_values_share_the_middle_bin():
    # four edges are up to 1.5: the ones may be in bins 1 to 3, the three in 5 alone
    values = np.array([1, 1, 1, 3], dtype=np.float32)
    assert np.quantile(values, np.linspace(0, 1, 5)).tolist() == [1, 1, 1, 1.5, 3]
    assert bin_values(values, n_bins=6).tolist() == [2, 2, 2, 5]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(2**-7, 2**20, width=32), min_size=1, max_size=80), st.integers(2, 60))
def test_the_edges_are_numpys_quantiles_to_the_last_bit(values, n_edges):
    array, edges = np.array(values, dtype=np.float32), np.empty(n_edges)
    _quantiles(np.sort(array), edges)
    assert edges.tobytes() == np.quantile(array, np.linspace(0, 1, n_edges)).tobytes()


@pytest.mark.parametrize("values", [[2.0], [7.0, 7.0, 7.0], [0.25] * 60])
def test_a_constant_cell_is_in_the_middle_bin(values):
    assert set(bin_values(np.array(values, dtype=np.float32), n_bins=51).tolist()) == {25}


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(2**-7, 2**20, width=32), min_size=1, max_size=80), st.randoms(use_true_random=False))
def test_bins_follow_the_values_and_not_their_order(values, random):
    array = np.array(values, dtype=np.float32)
    order = np.array(random.sample(range(len(array)), len(array)))
    digits = bin_values(array, n_bins=51)
    assert digits.min() >= 1
    assert digits.max() <= 50
    np.testing.assert_array_equal(bin_values(array[order], n_bins=51), digits[order])
    ascending = np.argsort(array, kind="stable")
    assert (np.diff(digits[ascending]) >= 0).all()
    assert len(set(zip(array.tolist(), digits.tolist(), strict=True))) == len(set(array.tolist()))


def test_counts_are_of_the_columns_asked_for_and_a_broken_row_is_named():
    rows = np.array([[1, 0, 2], [0, 0, 3], [4, 5, 6]], dtype=np.float32)
    counts = np.zeros(3, dtype=np.int64)
    assert count_present(rows, np.array([2, 0]), counts) == -1
    assert counts.tolist() == [2, 1, 2]
    rows[1, 1] = np.nan
    assert count_present(rows, np.array([2, 0]), counts) == 1
