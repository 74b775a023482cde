"""Projected memory of LLOKI-FP: grows with what it holds; whether the numbers are right is measured elsewhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lloki_atlas.config import PropagationConfig
from lloki_atlas.stages import memory

CONFIG = PropagationConfig()
SIZE = {"n_cells": 1_000_000, "n_genes": 300, "n_counts": 60_000_000}


def needed(config=CONFIG, **parts):
    return memory.slice_memory(**{**SIZE, **parts}, settings=config)


@pytest.mark.parametrize("in_memory", [True, False])
def test_it_grows_with_the_number_of_neighbours(in_memory):
    few, many = (needed(PropagationConfig(n_neighbors=k), in_memory=in_memory) for k in (10, 40))
    assert many - few > 1_000_000 * 30 * 8


@given(
    n_cells=st.integers(1, 10**7),
    n_genes=st.integers(1, 2000),
    density=st.floats(0, 1),
    in_memory=st.booleans(),
    space=st.sampled_from(["scaled", "counts"]),
)
def test_more_cells_never_need_less(n_cells, n_genes, density, in_memory, space):
    config = PropagationConfig(graph_space=space)
    less, more = (
        memory.slice_memory(n, n_genes, int(n * n_genes * density), config, in_memory=in_memory)
        for n in (n_cells, 4 * n_cells)
    )
    assert 0 < less <= more


def test_a_streamed_slice_needs_less():
    assert needed(in_memory=False) < needed() / 2


def test_a_streamed_slice_needs_only_the_counts_of_what_it_reads_at_a_time():
    more = needed(in_memory=False, n_counts=250_000_000) - needed(in_memory=False, n_counts=60_000_000)
    assert 0 <= more < 190_000_000
    assert needed(n_counts=250_000_000) - needed(n_counts=60_000_000) > 190_000_000 * 8


def test_half_precision_needs_less():
    assert needed() - needed(PropagationConfig(storage="float16")) > 1_000_000 * 300 * 2 * 0.9


def test_an_approximate_search_needs_more_memory():
    approximate = PropagationConfig(search="approximate", graph_space="counts")
    assert needed(approximate) > needed(PropagationConfig(graph_space="counts")) + 1_000_000 * 300 * 4


def test_a_published_support_needs_dense_values():
    assert needed(PropagationConfig(support="largest")) > needed() + 1_000_000 * 300 * 8


def test_threads_need_more_only_for_the_space():
    one, many = (memory.space_memory(10_000, 1000, CONFIG, n_threads=n) for n in (1, 8))
    assert many - one >= 7 * 1000**2 * 8
    assert memory.space_memory(10_000, 1000, PropagationConfig(graph_space="counts"), n_threads=8) == 0


def test_a_search_of_some_rows_does_not_need_the_slice():
    config = PropagationConfig()
    part = memory.search_memory(32_768 * 32, 32_768, config.n_components, config)
    assert part < memory.slice_memory(2_000_000, 300, 120_000_000, config) / 3


def test_streaming_beyond_memory_is_for_slices_that_ordinary_machines_cannot_hold():
    """The default of `slice_memory_mb` keeps slices of common size in memory."""
    assert memory.slice_memory(100_000, 500, 10_000_000, CONFIG) < 2048 * 2**20
    assert needed() > 2048 * 2**20
