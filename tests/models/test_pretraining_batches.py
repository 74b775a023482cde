"""Views of training cells: panels, depth, gains, means over neighbours, padding."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from lloki_atlas.models.pretraining_batches import (
    Augmentation,
    Panel,
    TrainingCells,
    batches,
    draw_panel,
    draw_view,
)
from lloki_atlas.models.tokens import TokenRows

N_CELLS, N_GENES = 50, 60
PLAIN = {"panel_share": 0.0, "diffused_share": 0.0, "few_share": 0.0, "stranger_share": 0.0}


def make_cells(*panels: Panel) -> TrainingCells:
    random = np.random.default_rng(0)
    return TrainingCells(
        counts=csr_matrix(random.poisson(3.0, (N_CELLS, N_GENES)).astype(np.float32)),
        latent=np.zeros((N_CELLS, 2), np.float32),
        gene_latent=np.zeros((N_GENES, 2), np.float32),
        neighbors=(np.arange(N_CELLS)[:, None] + np.arange(1, 31)) % N_CELLS,
        cell_weights=np.full(N_CELLS, 1 / N_CELLS),
        gene_weights=np.full(N_GENES, 1 / N_GENES),
        panels=panels,
    )


def view(cells, *, seed=0, max_genes=100, **settings) -> TokenRows:
    return draw_view(
        cells,
        np.arange(N_CELLS),
        tokens=np.arange(N_GENES),
        n_bins=51,
        max_genes=max_genes,
        settings=Augmentation(**{**PLAIN, **settings}),
        generator=np.random.default_rng(seed),
    )


def test_random_panels_have_the_wanted_sizes_and_no_gene_twice():
    cells, sizes = make_cells(), set()
    for seed in range(200):
        settings = Augmentation(panel_genes=(5, 1000))
        columns = draw_panel(cells, settings, np.random.default_rng(seed)).columns
        assert np.all(np.diff(columns) > 0)
        sizes.add(len(columns))
    assert min(sizes) == 5
    assert max(sizes) > 50
    assert max(sizes) <= N_GENES


def test_a_share_of_the_panels_is_a_known_one_with_some_doubt_about_it():
    known = Panel(np.array([3, 8, 20]), np.array([1.0, -1.0, 0.0]), 40.0)
    cells, settings = make_cells(known), Augmentation(panel_share=0.6, known_sd=0.1)
    drawn = [draw_panel(cells, settings, np.random.default_rng(seed)) for seed in range(300)]
    same = [panel for panel in drawn if np.array_equal(panel.columns, known.columns)]
    assert 0.5 < len(same) / len(drawn) < 0.7
    gains = np.stack([panel.log_gain for panel in same])
    np.testing.assert_allclose(gains.mean(axis=0), known.log_gain, atol=0.05)
    assert (gains.std(axis=0) > 0.02).all()
    np.testing.assert_allclose(np.mean(np.log([panel.depth for panel in same])), np.log(40.0), atol=0.05)


def test_a_view_shows_genes_of_its_panel_alone():
    known = Panel(np.array([3, 8, 20]), np.zeros(3), 9.0)
    assert set(view(make_cells(known), panel_share=1.0).genes) == {3, 8, 20}


def test_depth_thins_a_cell():
    cells = make_cells()
    lengths = {depth: len(view(cells, panel_genes=(60, 60), depth=(depth, depth)).genes) for depth in (5.0, 60.0)}
    assert lengths[5.0] < 6 * N_CELLS
    assert lengths[60.0] > 4 * lengths[5.0]


def test_a_mean_over_neighbours_has_more_genes_than_a_cell():
    settings = {"panel_genes": (60, 60), "depth": (20.0, 20.0)}
    alone = view(make_cells(), **settings)
    mixed = view(make_cells(), diffused_share=1.0, diffused_cells=(20, 20), **settings)
    assert len(mixed.genes) > 2 * len(alone.genes)


def test_gains_decide_which_genes_are_seen():
    gain = np.where(np.arange(20) < 10, 3.0, -3.0)
    seen = view(make_cells(Panel(np.arange(20), gain, 40.0)), panel_share=1.0, known_sd=0.0)
    assert np.mean(seen.genes < 10) > 0.9


def test_equal_generators_draw_equal_views_and_long_cells_are_cut():
    a, b, c = (view(make_cells(), seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(a.genes, b.genes)
    assert np.array_equal(a.digits, b.digits)
    assert not np.array_equal(a.indptr, c.indptr)
    assert np.diff(view(make_cells(), seed=1, max_genes=7, depth=(400.0, 400.0)).indptr).max() == 7


@pytest.mark.parametrize("n_parts", [1, 3, 50])
def test_batches_hold_every_kept_cell_once_with_its_tokens(n_parts):
    tokens = view(make_cells(), depth=(5.0, 5.0), panel_genes=(16, 16))
    kept = np.flatnonzero(np.diff(tokens.indptr) > 0)[::2]
    made = batches(tokens, kept, pad=60, cls=61, n_parts=n_parts)
    assert sorted(np.concatenate([part.rows for part in made])) == list(kept)
    for part in made:
        assert (part.genes[:, 0] == 61).all()
        assert (part.digits[:, 0] == 0).all()
        assert (part.genes != 60).any(axis=0).all()  # no longer than its longest cell
        for row, genes, digits in zip(part.rows, part.genes, part.digits, strict=True):
            start, stop = tokens.indptr[row], tokens.indptr[row + 1]
            assert np.array_equal(genes[1:][genes[1:] != 60], tokens.genes[start:stop])
            assert np.array_equal(digits[digits > 0], tokens.digits[start:stop])
