"""Counts as the stages read them: controls out, shared genes in canonical order, memory projected from the slice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from lloki_atlas.config import PropagationConfig
from lloki_atlas.errors import InputError
from lloki_atlas.stages.panels import (
    PanelCounts,
    panel_counts,
    reference_symbols,
    select_panel,
    shared_symbols,
    slice_random_key,
    streamed_memory,
)
from lloki_atlas.store.catalog import open_catalog
from lloki_atlas.store.slices import SliceStore

DENSE = np.array([[1, 0, 3, 9, 5], [0, 2, 0, 9, 0], [0, 0, 0, 9, 0]], np.float32)
SYMBOLS = ("SST", "AQP4", "", "", "GAD1")
MAPPING = ("exact", "exact", "unmapped", "control", "exact")
REFERENCE = ("VIP", "SST", "GAD1")


@pytest.fixture
def panel():
    return select_panel(csr_matrix(DENSE), SYMBOLS, MAPPING, REFERENCE)


def test_control_probes_are_left_out(panel):
    np.testing.assert_array_equal(panel.counts.toarray(), DENSE[:, [0, 1, 2, 4]])


def test_a_gene_without_a_symbol_stays_a_gene_of_the_panel(panel):
    assert panel.counts.shape[1] == 4


def test_shared_genes_are_in_alphabetical_order_of_their_symbols(panel):
    assert panel.symbols == ("GAD1", "SST")
    np.testing.assert_array_equal(panel.shared_counts.toarray(), DENSE[:, [4, 0]])


def test_shared_counts_store_no_zeros_and_have_sorted_indices():
    stored = csr_matrix((np.array([0, 1, 2, 3], np.float32), np.array([2, 0, 1, 0]), np.array([0, 2, 4])), shape=(2, 3))
    shared = PanelCounts(stored, np.array([2, 0]), ("A", "B")).shared_counts
    assert shared.has_sorted_indices
    assert shared.nnz == 2


def test_a_panel_without_a_shared_gene_is_refused():
    with pytest.raises(InputError, match="no gene of the panel is in the reference: check the organism"):
        select_panel(csr_matrix(DENSE), SYMBOLS, MAPPING, ("VIP",))


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(5)))
def test_the_order_of_columns_in_the_source_does_not_change_shared_counts(order):
    order = list(order)
    panel = select_panel(
        csr_matrix(DENSE[:, order]), [SYMBOLS[i] for i in order], [MAPPING[i] for i in order], REFERENCE
    )
    np.testing.assert_array_equal(panel.shared_counts.toarray(), DENSE[:, [4, 0]])


@pytest.mark.parametrize(
    ("symbols", "reference", "shared"),
    [
        (("B", "A", "C"), ("A", "B"), ("A", "B")),
        (("A", ""), ("", "A"), ("A",)),
        (("A",), (), ()),
        ((), ("A",), ()),
    ],
)
def test_shared_symbols_are_those_of_both_without_the_empty_one(symbols, reference, shared):
    assert shared_symbols(symbols, reference) == shared


@pytest.fixture
def stored(ingested):
    """A stored slice whose source has five control probes, and the symbols of its reference."""
    catalog = open_catalog(ingested)
    store = SliceStore(catalog.path("slices", catalog.slice("simmap_1").objects["ingest"]))
    return store, reference_symbols(str(catalog.path("references", catalog.state.reference)))


def test_counts_of_a_stored_slice_are_those_of_its_source(stored):
    store, reference = stored
    panel = panel_counts(store, reference)
    column = {symbol: gene for gene, symbol in enumerate(store.symbols)}
    expected = store.counts().toarray()[:, [column[symbol] for symbol in panel.symbols]]
    np.testing.assert_array_equal(panel.shared_counts.toarray(), expected)


def test_symbols_of_a_stored_reference_are_those_of_the_profile(stored, profile):
    assert stored[1] == profile.symbols


def test_random_streams_differ_by_slice_and_by_seed_alone():
    keys = {
        slice_random_key(name, PropagationConfig(random_state=seed, alpha=alpha))
        for name in ("one", "two")
        for seed in (0, 1)
        for alpha in (0.5, 1.0)
    }
    assert len(keys) == 4


def test_projected_memory_holds_the_counts_of_the_slice(stored):
    store, _ = stored
    assert streamed_memory(store) >= store.n_counts * 8
