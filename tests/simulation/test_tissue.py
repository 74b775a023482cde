from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from lloki_atlas.simulation.tissue import (
    CELL_TYPES,
    COARSE_OF_TYPE,
    Cells,
    cells_of_cut,
    composition_by_depth,
    make_cut,
    make_tissue,
)


def laid_out(n_cells: int, *, seed: int = 0) -> Cells:
    tissue = make_tissue(n_cells, rng=np.random.default_rng(seed))
    cut = make_cut(n_cells, area_um2=125.0, index=seed, rng=np.random.default_rng(seed + 1))
    return cells_of_cut(tissue, cut, rows=np.arange(n_cells), rng=np.random.default_rng(seed + 2))


@settings(deadline=None, max_examples=25)
@given(n_cells=st.integers(1, 3000), seed=st.integers(0, 50))
def test_cells_of_any_cut_are_inside_the_sheet(n_cells: int, seed: int) -> None:
    cells = laid_out(n_cells, seed=seed)

    assert cells.n_cells == n_cells
    assert ((cells.depth >= 0) & (cells.depth <= 1)).all()
    assert ((cells.cell_type >= 0) & (cells.cell_type < len(CELL_TYPES))).all()
    assert np.isfinite(cells.coordinates).all()
    assert len(np.unique(cells.coordinates, axis=0)) == n_cells


@settings(deadline=None, max_examples=10)
@given(n_bins=st.integers(1, 300))
def test_proportions_at_every_depth_sum_to_one(n_bins: int) -> None:
    composition = composition_by_depth(n_bins)

    assert (composition >= 0).all()
    assert np.allclose(composition.sum(axis=1), 1.0)


def test_every_fine_type_has_one_coarse_type() -> None:
    assert len(COARSE_OF_TYPE) == len(CELL_TYPES) == 15


@pytest.mark.parametrize(("n_cells", "n_folds"), [(2_000, 1), (60_000, 1), (200_000, 3), (500_000, 4)])
def test_large_tissue_is_folded_rather_than_stretched(n_cells: int, n_folds: int) -> None:
    assert make_tissue(n_cells, rng=np.random.default_rng(0)).n_folds == n_folds


def test_thickness_is_that_of_cortex_once_there_are_enough_cells() -> None:
    thickness = {n: make_tissue(n, rng=np.random.default_rng(0)).thickness_um for n in (100, 5_000, 500_000)}

    assert thickness[100] < thickness[5_000] == thickness[500_000] == 1400.0


def test_folds_meet_pia_to_pia_and_white_matter_to_white_matter() -> None:
    tissue = make_tissue(200_000, rng=np.random.default_rng(0))
    cut = make_cut(200_000, area_um2=125.0, index=0, rng=np.random.default_rng(1))
    one_column = np.arange(round(tissue.thickness_um * tissue.n_folds / np.sqrt(125.0)))

    depth = cells_of_cut(tissue, cut, rows=one_column, rng=np.random.default_rng(2)).depth

    steps = np.abs(np.diff(depth))
    assert steps.max() < 0.05
    assert depth.min() < 0.02
    assert depth.max() > 0.98


def test_the_first_layer_is_sparse() -> None:
    cells = laid_out(20_000)

    shares = np.bincount(cells.layer, minlength=7) / cells.n_cells
    widths = np.array([0.10, 0.09, 0.15, 0.13, 0.20, 0.21, 0.12])
    assert (shares / widths)[0] < 0.7 * (shares / widths)[1:].min()


def test_endothelial_cells_line_up_along_vessels() -> None:
    cells = laid_out(20_000)

    def crowding(name: str) -> float:
        """Share of the 8 nearest cells that are of the cell's own kind, relative to the share overall."""
        kind = cells.cell_type == CELL_TYPES.index(name)
        _, near = cKDTree(cells.coordinates).query(cells.coordinates[kind], k=9)
        return float(kind[near[:, 1:]].mean() / kind.mean())

    assert crowding("Endo") > 1.4 > 1.2 > crowding("Micro")
