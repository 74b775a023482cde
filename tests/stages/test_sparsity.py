"""Targets of the sparsity, and the report that says what became of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lloki_atlas.config import PropagationConfig
from lloki_atlas.errors import InputError
from lloki_atlas.kernels.transport import sparsity_histogram, target_nonzeros
from lloki_atlas.stages.sparsity import QUANTILES, sparsity_report, sparsity_targets

N_GENES = 200


def draws(n, rate, seed):
    return np.random.default_rng(seed).binomial(N_GENES, np.random.default_rng(seed).beta(3, rate, n)).astype(np.int32)


def targets(nonzeros, reference, *, theirs_all=None, n_all=0, **settings):
    return sparsity_targets(
        nonzeros,
        own_histogram=sparsity_histogram(nonzeros, N_GENES),
        reference_histogram=sparsity_histogram(reference, N_GENES),
        reference_histogram_all=None if theirs_all is None else sparsity_histogram(theirs_all, n_all),
        settings=PropagationConfig(**settings),
    )


def report(nonzeros, target, reference, **parts):
    values = {"achieved": target, "n_genes": N_GENES, **parts}
    return sparsity_report(
        nonzeros, target, reference_histogram=sparsity_histogram(reference, values["n_genes"]), **values
    )


@pytest.fixture(scope="module")
def cells():
    """2,000 random cells and a denser reference."""
    return draws(2000, 9, 0), draws(1500, 3, 1)


def test_targets_are_those_of_the_mid_ranks(cells):
    own, reference = cells
    found = targets(own, reference)
    expected = target_nonzeros(sparsity_histogram(own, N_GENES), sparsity_histogram(reference, N_GENES))[own]
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("cdf", ["midrank", "upper", "linspace"])
def test_targets_by_rank_send_each_cell_to_its_place_in_the_reference(cells, cdf):
    own, reference = cells
    found = targets(own, reference, sparsity_cdf=cdf)
    assert report(own, found, reference)["target_correlation"] >= 0.97
    assert (np.diff(found[np.lexsort((found, own))]) >= 0).all()  # equal cells need not have equal targets


def test_the_published_assignment_sends_cells_anywhere(cells):
    own, reference = cells
    found = targets(own, reference, sparsity_cdf="linspace", sparsity_match="argsort")
    assert abs(report(own, found, reference)["target_correlation"]) < 0.1


def test_both_assignments_have_nearly_the_same_targets_in_another_order(cells):
    by_rank, published = (
        np.sort(targets(*cells, sparsity_cdf="linspace", sparsity_match=match)) for match in ("rank", "argsort")
    )
    assert np.abs(by_rank - published).mean() < 2


def test_sparsity_may_be_that_of_all_genes_of_the_reference(cells):
    own, reference = cells
    doubled = targets(own, reference, theirs_all=2 * reference, n_all=2 * N_GENES, sparsity_genes="all")
    np.testing.assert_array_equal(doubled, targets(own, reference))
    sparser = targets(own, reference, theirs_all=reference, n_all=2 * N_GENES, sparsity_genes="all")
    assert sparser.mean() < 0.6 * doubled.mean()


def test_sparsity_of_all_genes_without_their_histogram_is_refused(cells):
    with pytest.raises(InputError, match="without their histogram: give it"):
        targets(*cells, sparsity_genes="all")


@pytest.mark.parametrize("mode", ["default", "paper", "reference"])
def test_targets_lie_between_no_gene_and_all(cells, mode):
    own, reference = cells
    found = targets(own, reference, theirs_all=reference, n_all=N_GENES, mode=mode)
    assert (found.dtype, found.shape) == (np.int32, own.shape)
    assert (found >= 0).all()
    assert (found <= N_GENES).all()


def test_a_report_of_two_cells_is_the_one_made_by_hand():
    found = report(np.array([1, 2]), np.array([2, 3]), np.array([2, 3]), achieved=np.array([2, 2]), n_genes=4)
    assert found["n_genes"] == 4
    assert {name: found[name]["mean"] for name in ("own", "target", "achieved", "reference")} == {
        "own": 0.625,
        "target": 0.375,
        "achieved": 0.5,
        "reference": 0.375,
    }
    assert (found["own"]["q05"], found["own"]["q50"], found["own"]["q95"]) == pytest.approx((0.5125, 0.625, 0.7375))
    assert found["cells_with_budget"] == 1.0
    assert found["target_correlation"] == pytest.approx(1.0)


def test_targets_the_wrong_way_round_correlate_negatively():
    found = report(np.array([1, 2]), np.array([3, 2]), np.array([2, 3]), n_genes=4)
    assert found["target_correlation"] == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("own", "target"), [([2, 2, 2], [3, 3, 3]), ([1, 2, 3], [4, 4, 4]), ([2], [3])], ids=["own", "target", "one cell"]
)
def test_cells_that_are_all_alike_have_no_correlation(own, target):
    found = report(np.array(own), np.array(target), np.array([1, 2, 3, 4]), n_genes=4)
    assert found["target_correlation"] is None


def test_only_cells_that_are_to_have_more_genes_have_a_budget():
    found = report(np.array([3, 2, 1, 0]), np.array([2, 2, 2, 1]), np.array([2]), n_genes=4)
    assert found["cells_with_budget"] == 0.5


def test_a_report_is_plain_numbers_that_json_takes(cells):
    own, reference = cells
    found = report(own, targets(own, reference), reference)
    assert json.loads(json.dumps(found)) == found
    assert list(found["own"]) == ["mean", *(f"q{int(100 * q):02d}" for q in QUANTILES)]


def test_quantiles_of_a_report_ascend(cells):
    own, reference = cells
    found = report(own, targets(own, reference), reference)
    for name in ("own", "target", "achieved", "reference"):
        values = list(found[name].values())[1:]
        assert values == sorted(values)
