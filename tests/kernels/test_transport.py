from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.interpolate
from hypothesis import given, settings
from hypothesis import strategies as st
from parity.textbook import quantile_targets

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.transport import assigned_targets, imputation_budget, sparsity_histogram, target_nonzeros

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


def assigned(own, reference, *, n_genes=N_GENES, n_reference_genes=N_GENES, cdf="midrank", match="rank"):
    return assigned_targets(
        np.array(own),
        np.array(reference),
        n_genes=n_genes,
        n_reference_genes=n_reference_genes,
        cdf=cdf,
        match=match,
    )


@settings(deadline=None, max_examples=25)
@given(own=NONZEROS, reference=NONZEROS)
def test_midranks_matched_by_rank_are_the_table_applied_to_each_cell(own, reference):
    targets = assigned(own, reference)
    assert targets.dtype == np.int32
    np.testing.assert_array_equal(targets, targets_of(own, reference)[own])


@settings(deadline=None, max_examples=25)
@given(own=NONZEROS, reference=st.lists(st.integers(0, 30), min_size=1, max_size=40), half=st.booleans())
def test_a_reference_of_other_genes_is_mapped_by_sparsity(own, reference, half):
    """⌈(1 − s*) G⌉ with s* the smallest sparsity whose share of the reference reaches F(s), in fractions."""
    own_sparsity = [1 - Fraction(v, N_GENES) for v in own]
    reference_sparsity = sorted(1 - Fraction(v, 30) for v in reference)
    for cell, s in enumerate(own_sparsity):
        equal = sum(t == s for t in own_sparsity)
        u = (sum(t < s for t in own_sparsity) + (Fraction(equal, 2) if half else equal)) / Fraction(len(own))
        reached = (v for r, v in enumerate(reference_sparsity, 1) if Fraction(r, len(reference)) >= u)
        expected = math.ceil((1 - next(reached)) * N_GENES)
        cdf = "midrank" if half else "upper"
        assert assigned(own, reference, n_reference_genes=30, cdf=cdf)[cell] == expected


@settings(deadline=None, max_examples=25)
@given(own=NONZEROS, reference=NONZEROS)
def test_evenly_spaced_places_equal_a_scipy_interpolation(own, reference):
    sparsity = 1 - np.array(own) / N_GENES
    places = np.linspace(0, 1, len(reference))
    curve = scipy.interpolate.interp1d(places, np.sort(1 - np.array(reference) / N_GENES))
    mapped = curve(np.linspace(0, 1, len(own))) if len(reference) > 1 else np.full(len(own), curve.y[0])
    for match, order in (("rank", np.argsort(np.argsort(sparsity, kind="stable"))), ("argsort", np.argsort(sparsity))):
        expected = np.ceil((1 - mapped[order]) * N_GENES)
        np.testing.assert_array_equal(assigned(own, reference, cdf="linspace", match=match), expected)


@pytest.mark.parametrize("cdf", ["midrank", "upper", "linspace"])
def test_rank_keeps_the_order_of_cells_and_argsort_only_the_set_of_targets(cdf):
    rng = np.random.default_rng(0)
    own, reference = rng.integers(0, 201, 300), rng.integers(100, 201, 400)
    sizes = {"n_genes": 200, "n_reference_genes": 200, "cdf": cdf}
    ranked, slipped = assigned(own, reference, **sizes), assigned(own, reference, match="argsort", **sizes)
    assert (np.diff(ranked[np.lexsort((ranked, own))]) >= 0).all()
    np.testing.assert_array_equal(np.sort(ranked), np.sort(slipped))
    assert abs(np.corrcoef(own, slipped)[0, 1]) < 0.2


def test_a_single_cell_takes_the_median_the_sparsest_or_the_densest_of_the_reference():
    for cdf, expected in (("midrank", 7), ("upper", 3), ("linspace", 9)):
        for match in ("rank", "argsort"):
            assert assigned([0], [3, 7, 9], cdf=cdf, match=match).tolist() == [expected]


def test_a_reference_of_one_cell_is_everyones_target():
    for cdf in ("midrank", "upper", "linspace"):
        assert assigned([0, 5, 5, 12], [7], cdf=cdf).tolist() == [7] * 4


def test_a_sparsity_that_does_not_round_trip_through_floats_is_not_raised_by_one():
    # 1 − (1 − r / 49) exceeds r / 49 for some r, so that a ceiling in floats would be r + 1
    own = np.arange(50)
    for cdf in ("midrank", "upper"):
        targets = assigned(own, own, n_genes=49, n_reference_genes=49, cdf=cdf)
        np.testing.assert_array_equal(targets, own)


@pytest.mark.parametrize("cdf", ["upper", "midrank", "linspace"])
def test_as_many_cells_as_the_reference_are_matched_at_the_cost_of_the_optimal_plan(ot, cdf):
    rng = np.random.default_rng(1)
    own, reference = rng.permutation(201)[:80], rng.permutation(201)[:80]
    targets = assigned(own, reference, n_genes=200, n_reference_genes=200, cdf=cdf)
    a, b = 1 - own / 200, 1 - reference / 200
    cost = np.abs((1 - targets / 200) - a).mean()
    # a ceiling in floats may add one gene to a target
    assert cost == pytest.approx(ot.wasserstein_1d(a, b, p=1), abs=1 / 200 if cdf == "linspace" else 1e-12)
    squared = ot.emd2_1d(a, b, metric="sqeuclidean")
    assert (((1 - targets / 200) - a) ** 2).mean() == pytest.approx(
        squared, abs=2 / 200 if cdf == "linspace" else 1e-12
    )


@pytest.mark.parametrize(
    ("own", "reference", "setting"),
    [
        ([], [1], {}),
        ([1], [], {}),
        ([13], [1], {}),
        ([1], [13], {}),
        ([1], [-1], {}),
        ([0.5], [1], {}),
        ([0], [0], {"n_genes": 0}),
        ([0], [0], {"n_reference_genes": 0}),
        ([1], [1], {"cdf": "lower"}),
        ([1], [1], {"match": "nearest"}),
    ],
)
def test_rules_and_counts_that_do_not_fit_are_refused(own, reference, setting):
    with pytest.raises(InputError):
        assigned(
            np.array(own, dtype=None if own else int), np.array(reference, dtype=None if reference else int), **setting
        )
