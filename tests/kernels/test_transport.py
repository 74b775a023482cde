from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity.textbook import quantile_targets

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.transport import imputation_budget, sparsity_histogram, target_nonzeros

N_GENES = 12
NONZEROS = st.lists(st.integers(0, N_GENES), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def ot():
    return pytest.importorskip("ot")


def targets_of(own, reference):
    own, reference = np.array(own), np.array(reference)
    return target_nonzeros(sparsity_histogram(own, N_GENES), sparsity_histogram(reference, N_GENES))


@settings(deadline=None, max_examples=25)
@given(nonzeros=NONZEROS, cut=st.integers(0, 40))
def test_histograms_of_parts_add_up_to_that_of_the_whole(nonzeros, cut):
    whole = sparsity_histogram(np.array(nonzeros), N_GENES)
    first, second = (np.array(part, dtype=int) for part in (nonzeros[:cut], nonzeros[cut:]))
    np.testing.assert_array_equal(whole, sparsity_histogram(first, N_GENES) + sparsity_histogram(second, N_GENES))
    assert whole.dtype == np.int64
    assert whole.sum() == len(nonzeros)


@settings(deadline=None, max_examples=25)
@given(own=NONZEROS, reference=NONZEROS)
def test_targets_equal_the_quantile_map_cell_by_cell(own, reference):
    expected = quantile_targets(np.array(own), np.array(reference), N_GENES)
    np.testing.assert_array_equal(targets_of(own, reference)[own], expected)


@settings(deadline=None, max_examples=25)
@given(own=NONZEROS, reference=NONZEROS)
def test_targets_never_decrease_and_are_numbers_that_the_reference_has(own, reference):
    targets = targets_of(own, reference)
    assert (np.diff(targets) >= 0).all()
    assert set(targets.tolist()) <= set(reference)


@settings(deadline=None, max_examples=25)
@given(own=NONZEROS, times=st.integers(1, 4))
def test_a_slice_distributed_like_the_reference_is_left_as_it_is(own, times):
    assert targets_of(own, own * times)[own].tolist() == own


@settings(deadline=None, max_examples=25)
@given(own=NONZEROS, reference=NONZEROS)
def test_a_cells_target_lies_where_the_optimal_plan_sends_its_bin(ot, own, reference):
    """The plan may split a bin of equal cells; the map sends it whole, to a place inside what the plan uses."""
    a, b = np.array(own, dtype=float), np.array(reference, dtype=float)
    plan = ot.emd_1d(a, b, metric="euclidean")
    targets = targets_of(own, reference)
    for value in set(own):
        used = np.array(reference)[(plan[np.array(own) == value] > 1e-12).any(axis=0)]
        assert used.min() <= targets[value] <= used.max()


@settings(deadline=None, max_examples=25)
@given(own=NONZEROS, reference=NONZEROS)
def test_cost_is_that_of_the_optimal_plan_within_the_spread_of_ties(ot, own, reference):
    """|cost of the map − W1| is at most the mean width of what the plan uses for each bin of equal cells."""
    a, b = np.array(own, dtype=float), np.array(reference, dtype=float)
    plan = ot.emd_1d(a, b, metric="euclidean")
    width = np.empty(len(own))
    for value in set(own):
        rows = np.array(own) == value
        used = b[(plan[rows] > 1e-12).any(axis=0)]
        width[rows] = used.max() - used.min()
    cost = np.abs(targets_of(own, reference)[own] - a).mean()
    assert abs(cost - ot.wasserstein_1d(a, b, p=1)) <= width.mean() + 1e-9


def test_without_ties_and_with_as_many_cells_the_map_is_the_optimal_matching(ot):
    rng = np.random.default_rng(0)
    own, reference = rng.permutation(200)[:80], rng.permutation(200)[:80]
    targets = target_nonzeros(sparsity_histogram(own, 200), sparsity_histogram(reference, 200))
    np.testing.assert_array_equal(np.sort(targets[own]), np.sort(reference))
    cost = np.abs(targets[own] - own).mean()
    assert cost == pytest.approx(ot.wasserstein_1d(own.astype(float), reference.astype(float), p=1))


@settings(deadline=None, max_examples=25)
@given(own=NONZEROS, reference=NONZEROS)
def test_own_and_budget_reach_the_target_and_never_fall_below_own(own, reference):
    own_array, targets = np.array(own), targets_of(own, reference)
    budget = imputation_budget(own_array, targets)
    assert budget.dtype == np.int32
    np.testing.assert_array_equal(own_array + budget, np.maximum(own_array, targets[own]))


@settings(deadline=None, max_examples=25)
@given(own=NONZEROS, reference=NONZEROS, seed=st.integers(0, 9))
def test_permuting_cells_permutes_budgets(own, reference, seed):
    order = np.random.default_rng(seed).permutation(len(own))
    own_array = np.array(own)
    budget = imputation_budget(own_array, targets_of(own, reference))
    moved = imputation_budget(own_array[order], targets_of(own_array[order], reference))
    np.testing.assert_array_equal(moved, budget[order])


def test_ranks_of_more_than_64_bits_stay_exact():
    own = np.array([2**40, 2**40, 0])
    assert target_nonzeros(own, np.array([2**40, 0, 2**40])).tolist() == [0, 2, 2]


def test_a_sparser_reference_leaves_no_budget():
    assert imputation_budget(np.array([5, 9]), targets_of([5, 9], [1, 2])).tolist() == [0, 0]


def test_a_single_cell_takes_the_median_of_the_reference():
    assert targets_of([0], [3, 7, 9])[0] == 7


@pytest.mark.parametrize("histogram", [np.zeros(3, int), np.array([1, -1, 1])])
def test_a_histogram_without_cells_or_with_negative_ones_is_refused(histogram):
    with pytest.raises(InputError, match="own"):
        target_nonzeros(histogram, np.ones(3, int))
    with pytest.raises(InputError, match="reference"):
        target_nonzeros(np.ones(3, int), histogram)


def test_histograms_of_different_genes_are_refused():
    with pytest.raises(InputError, match="shape"):
        target_nonzeros(np.ones(3, int), np.ones(4, int))


@pytest.mark.parametrize("value", [-1, N_GENES + 1])
def test_a_count_of_genes_out_of_range_is_refused(value):
    with pytest.raises(InputError, match="outside"):
        sparsity_histogram(np.array([value]), N_GENES)
    with pytest.raises(InputError, match="outside"):
        imputation_budget(np.array([value]), np.zeros(N_GENES + 1, int))


def test_fractions_of_genes_are_refused():
    with pytest.raises(InputError, match="integers"):
        sparsity_histogram(np.array([0.5]), N_GENES)
