"""Ranges of a search: all cells, every pair of ranges once, the same work for each."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lloki_atlas.kernels.products import BLOCK
from lloki_atlas.stages.ranges import partners, search_ranges


@settings(max_examples=200)
@given(n_cells=st.integers(1, 10**6), search_cells=st.integers(BLOCK, 10**6))
def test_ranges_cover_all_cells_once_and_in_order(n_cells, search_cells):
    ranges = search_ranges(n_cells, search_cells)
    assert (ranges[0][0], ranges[-1][1]) == (0, n_cells)
    assert all(one[1] == other[0] for one, other in itertools.pairwise(ranges))
    assert all(start < stop for start, stop in ranges)


@settings(max_examples=200)
@given(n_cells=st.integers(1, 10**6), search_cells=st.integers(1, 10**6))
def test_ranges_are_whole_blocks_and_no_larger_than_asked_for(n_cells, search_cells):
    ranges = search_ranges(n_cells, search_cells)
    assert all(start % BLOCK == 0 for start, _ in ranges)
    assert max(stop - start for start, stop in ranges) <= -(-search_cells // BLOCK) * BLOCK


@settings(max_examples=200)
@given(n_cells=st.integers(1, 10**6), search_cells=st.integers(BLOCK, 10**6))
def test_all_ranges_but_the_last_are_of_one_size(n_cells, search_cells):
    sizes = [stop - start for start, stop in search_ranges(n_cells, search_cells)]
    assert len(set(sizes[:-1])) <= 1
    assert sizes[-1] <= sizes[0]


def test_a_slice_that_is_just_too_large_has_two_halves():
    assert search_ranges(1000, 999) == [[0, 512], [512, 1000]]
    assert search_ranges(1000, 1000) == [[0, 1000]]


@pytest.mark.parametrize("search_cells", [1, 100, BLOCK])
def test_a_range_is_at_least_a_block(search_cells):
    assert search_ranges(600, search_cells) == [[0, 256], [256, 512], [512, 600]]


@given(n_ranges=st.integers(1, 20))
def test_every_pair_of_ranges_meets_exactly_once(n_ranges):
    met = [frozenset((own, other)) for own in range(n_ranges) for other in partners(own, n_ranges)]
    assert len(met) == len(set(met))
    assert set(met) == {frozenset(pair) for pair in itertools.combinations(range(n_ranges), 2)}


@given(n_ranges=st.integers(1, 20))
def test_the_work_is_shared_evenly(n_ranges):
    loads = [len(partners(own, n_ranges)) for own in range(n_ranges)]
    assert max(loads) - min(loads) <= 1


@given(n_ranges=st.integers(1, 20))
def test_no_range_is_its_own_partner(n_ranges):
    assert all(own not in partners(own, n_ranges) for own in range(n_ranges))
