"""How cells are dealt out: keyed draws, blocks held out, rounds in proportion."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lloki_atlas.models.training_chunks import keyed, labels_refine, plan_rounds, split_blocks


def test_draws_follow_from_seed_purpose_and_numbers():
    keys = [(0, "a", 1), (0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a", 1, 7)]
    drawn = [keyed(*key).random(4).tobytes() for key in keys]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 5


@pytest.mark.parametrize("random_state", [-1, 2**70])
def test_any_whole_number_is_a_seed(random_state):
    keyed(random_state, "a").random()


@settings(deadline=None)
@given(st.integers(1, 500), st.floats(0.001, 0.999), st.integers(0, 3))
def test_every_block_is_either_trained_on_or_held_out(n_blocks, share, random_state):
    sizes = np.full(n_blocks, 256)
    training, held_out = split_blocks(sizes, share=share, random_state=random_state, name="a")
    assert sorted([*training, *held_out]) == list(range(n_blocks))
    assert len(training) >= 1
    assert len(held_out) >= (n_blocks > 1)
    assert abs(len(held_out) - share * n_blocks) <= 1 or len(held_out) in (1, n_blocks - 1)


def test_nothing_is_held_out_of_a_single_block_or_when_not_asked_for():
    assert split_blocks(np.array([256]), share=0.5, random_state=0, name="a")[1].tolist() == []
    assert split_blocks(np.full(9, 256), share=0, random_state=0, name="a")[1].tolist() == []


@pytest.mark.parametrize("random_state", range(6))
def test_of_a_long_block_and_a_short_one_the_long_one_is_trained_on(random_state):
    training, held_out = split_blocks(np.array([256, 1]), share=0.1, random_state=random_state, name="a")
    assert (training.tolist(), held_out.tolist()) == ([0], [1])


SIZES = st.lists(st.lists(st.integers(1, 256), min_size=1, max_size=60).map(np.array), min_size=1, max_size=5)


@settings(deadline=None)
@given(SIZES, st.integers(100, 5000))
def test_rounds_take_every_block_and_enough_of_every_platform(sizes, pool_cells):
    rounds = plan_rounds(sizes, pool_cells=pool_cells)
    for code, cells in enumerate(sizes):
        taken = [part[code] for part in rounds]
        assert np.array_equal(np.unique(np.concatenate(taken)), np.arange(len(cells)))
        for blocks in taken:
            assert len(set(blocks.tolist())) == len(blocks)
            assert cells[blocks].sum() >= min(50, cells.sum())
    for part in rounds:
        n_cells = sum(cells[blocks].sum() for cells, blocks in zip(sizes, part, strict=True))
        assert n_cells <= pool_cells + len(sizes) * 2 * 256


@settings(deadline=None)
@given(SIZES)
def test_what_fits_into_the_pool_is_one_round_in_order(sizes):
    (only,) = plan_rounds(sizes, pool_cells=10**6)
    assert [blocks.tolist() for blocks in only] == [list(range(len(cells))) for cells in sizes]


def test_a_large_platform_lends_nothing():
    rounds = plan_rounds([np.full(100, 256), np.full(3, 20)], pool_cells=5000)
    large = np.concatenate([part[0] for part in rounds])
    assert np.array_equal(large, np.arange(100))
    assert {len(part[1]) for part in rounds} == {3}


def test_rounds_hold_platforms_in_proportion():
    sizes = [np.full(100, 256), np.full(40, 256)]
    for part in plan_rounds(sizes, pool_cells=9000):
        first, second = (len(blocks) for blocks in part)
        assert abs(first - 2.5 * second) <= 3.5


@pytest.mark.parametrize(("n_classes", "match"), [(0, "no cell has a label"), (1, "all labels are the same")])
def test_labels_that_refine_nothing_are_told(n_classes, match):
    with pytest.warns(UserWarning, match=match):
        assert not labels_refine(n_classes)


def test_labels_that_refine_are_not_spoken_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert labels_refine(2)
