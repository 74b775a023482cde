"""Rows whose cosines are compared: components of all counts or the shared counts, before and after propagation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from parity import textbook
from scipy.sparse import csr_matrix

from lloki_atlas.config import PropagationConfig
from lloki_atlas.kernels import scaling
from lloki_atlas.kernels.rows import Rows
from lloki_atlas.stages.panels import PanelCounts, select_panel
from lloki_atlas.stages.spaces import neighbor_rows

N, N_GENES = 50, 12
SYMBOLS = tuple(f"G{gene:02d}" for gene in range(N_GENES))
SHARED = tuple(sorted(SYMBOLS[gene] for gene in (7, 0, 3, 10)))
COLUMNS = [0, 3, 7, 10]
SCALED = PropagationConfig(n_components=4)
COUNTS = PropagationConfig(graph_space="counts")


def make_case(seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.6, 2, (3, N_GENES))[rng.integers(0, 3, N)]).astype(np.float32)
    counts[4] = 0
    propagated = counts[:, COLUMNS] + (rng.random((N, 4)) * (counts[:, COLUMNS] == 0)).astype(np.float32)
    return counts, propagated.astype(np.float32)


DENSE, PROPAGATED = make_case()


@pytest.fixture(params=["in memory", "read when sliced"])
def panel(request):
    made = select_panel(csr_matrix(DENSE), SYMBOLS, ["exact"] * N_GENES, SHARED)
    if request.param == "in memory":
        return made
    counts = Rows(made.counts.shape, lambda start, stop: made.counts[start:stop])
    return PanelCounts(counts, made.shared, made.symbols)


def test_the_scaled_space_is_that_of_every_gene_of_the_panel(panel):
    rows = neighbor_rows(panel, SCALED)
    np.testing.assert_allclose(rows, textbook.scaled_components(DENSE, 4), atol=1e-5)


def test_the_published_space_is_that_of_the_shared_counts(panel):
    rows = neighbor_rows(panel, COUNTS)
    assert rows.shape == (N, 4)
    np.testing.assert_array_equal(rows[0:N], DENSE[:, COLUMNS])
    np.testing.assert_array_equal(rows[9:21], DENSE[9:21, COLUMNS])


def test_after_propagation_shared_genes_are_the_propagated_ones_and_others_stay(panel):
    rows = neighbor_rows(panel, SCALED, propagated=PROPAGATED)
    merged = DENSE.copy()
    merged[:, COLUMNS] = PROPAGATED
    smallest = DENSE.sum(axis=1)[DENSE.any(axis=1)].min()
    np.testing.assert_allclose(rows, textbook.scaled_components(merged, 4, smallest_total=smallest), atol=1e-5)


def test_an_empty_cell_that_next_to_nothing_reached_hardly_moves_the_others(panel):
    traces = DENSE[:, COLUMNS].copy()
    traces[4] = [1e-4, 0, 0, 2e-4]
    with_traces = neighbor_rows(panel, SCALED, propagated=traces)
    without = neighbor_rows(panel, SCALED, propagated=DENSE[:, COLUMNS])
    np.testing.assert_allclose(with_traces, without, atol=0.05)


def test_after_propagation_the_published_space_is_that_of_the_propagated_values(panel):
    assert neighbor_rows(panel, COUNTS, propagated=PROPAGATED) is PROPAGATED


@pytest.mark.parametrize("propagated", [None, PROPAGATED], ids=["before", "after"])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_no_byte_depends_on_threads_or_on_where_counts_are(panel, propagated, n_threads, monkeypatch):
    monkeypatch.setattr(scaling, "PIECE", 11)
    in_memory = select_panel(csr_matrix(DENSE), SYMBOLS, ["exact"] * N_GENES, SHARED)
    one = neighbor_rows(in_memory, SCALED, propagated=propagated)
    assert neighbor_rows(panel, SCALED, propagated=propagated, n_threads=n_threads).tobytes() == one.tobytes()


def test_propagated_values_that_are_the_counts_change_no_byte(panel):
    before, after = (neighbor_rows(panel, SCALED, propagated=part) for part in (None, DENSE[:, COLUMNS]))
    assert before.tobytes() == after.tobytes()


def test_there_are_as_many_components_as_asked_for(panel):
    assert neighbor_rows(panel, dataclasses.replace(SCALED, n_components=7)).shape == (N, 7)
