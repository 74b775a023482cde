from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from lloki_atlas.simulation.genes import FOREIGN_GENES, GENES, MARKERS, PROGRAMMES, REFERENCE_GENES, make_profiles
from lloki_atlas.simulation.platforms import (
    CORE_GENES,
    DISSOCIATED,
    PLATFORMS,
    SIMFISH,
    SIMFISH_PLUS,
    SIMISH,
    SIMMAP,
    Platform,
    draw_counts,
    make_assay,
    panel_genes,
    panel_symbols,
)
from lloki_atlas.simulation.tissue import CELL_TYPES, Cells, dissociated_cells

BY_NAME = pytest.mark.parametrize("platform", PLATFORMS, ids=lambda platform: platform.name)


def test_symbols_are_distinct() -> None:
    assert len(set(GENES)) == len(GENES)


def test_the_reference_has_600_genes() -> None:
    assert len(REFERENCE_GENES) == 600
    assert panel_genes(DISSOCIATED) == tuple(sorted(REFERENCE_GENES))


@pytest.mark.parametrize(
    ("platform", "n_genes", "n_controls"),
    [(SIMFISH, 33, 0), (SIMMAP, 160, 0), (SIMFISH_PLUS, 250, 5), (SIMISH, 100, 3)],
    ids=lambda value: getattr(value, "name", value),
)
def test_panels_have_their_size(platform: Platform, n_genes: int, n_controls: int) -> None:
    symbols = panel_symbols(platform)

    assert len(panel_genes(platform)) == n_genes
    assert len(symbols) == len(set(symbols)) == n_genes + n_controls
    assert symbols[n_genes:] == tuple(f"Blank-{i + 1}" for i in range(n_controls))


def test_the_four_panels_share_exactly_the_core() -> None:
    shared = set.intersection(*(set(panel_genes(platform)) for platform in PLATFORMS))

    assert len(CORE_GENES) == 10
    assert shared == set(CORE_GENES)


def test_symbols_as_written_share_the_core_too() -> None:
    assert set.intersection(*(set(panel_symbols(platform)) for platform in PLATFORMS)) == set(CORE_GENES)


@pytest.mark.parametrize(
    ("first", "second", "n_shared"),
    [
        (SIMFISH, SIMMAP, 12),
        (SIMFISH, SIMFISH_PLUS, 15),
        (SIMFISH, SIMISH, 12),
        (SIMMAP, SIMFISH_PLUS, 50),
        (SIMMAP, SIMISH, 38),
        (SIMFISH_PLUS, SIMISH, 40),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_panels_overlap_as_designed(first: Platform, second: Platform, n_shared: int) -> None:
    assert len(set(panel_genes(first)) & set(panel_genes(second))) == n_shared


def test_every_pair_of_panels_shares_at_least_ten_genes() -> None:
    for first, second in combinations(PLATFORMS, 2):
        assert len(set(panel_genes(first)) & set(panel_genes(second))) >= 10


def test_old_aliases_are_written_by_one_platform_only() -> None:
    assert {"Ctgf", "Nov"} <= set(panel_symbols(SIMMAP))
    assert not {"Ccn2", "Ccn3"} & set(panel_symbols(SIMMAP))
    assert "Ccn2" in panel_symbols(SIMFISH_PLUS)
    assert {"Ccn2", "Ccn3"} <= set(REFERENCE_GENES)


def test_only_foreign_genes_are_missing_from_the_reference() -> None:
    missing = {symbol for platform in PLATFORMS for symbol in panel_genes(platform)} - set(REFERENCE_GENES)

    assert missing == set(FOREIGN_GENES)


@BY_NAME
@pytest.mark.parametrize("family", [types for types, _ in PROGRAMMES if len(types) == 1], ids=lambda types: types[0])
def test_larger_panels_hold_markers_of_every_type(platform: Platform, family: tuple[str, ...]) -> None:
    markers = {symbol for types, text in PROGRAMMES if set(family) <= set(types) for symbol in text.split()}

    assert len(markers & set(panel_genes(platform))) >= (1 if platform is SIMFISH else 2)


@BY_NAME
def test_panels_are_not_markers_alone(platform: Platform) -> None:
    share = np.mean([symbol in MARKERS for symbol in panel_genes(platform)])

    assert share == 1.0 if platform is SIMFISH else 0.3 < share < 0.7


@pytest.fixture
def cells() -> Cells:
    return dissociated_cells(500, rng=np.random.default_rng(0))


def assay_of(platform: Platform, cells: Cells, *, slice_seed: int = 2):
    return make_assay(
        platform,
        make_profiles(rng=np.random.default_rng(0)),
        probe=cells,
        platform_rng=np.random.default_rng(1),
        slice_rng=np.random.default_rng(slice_seed),
    )


@BY_NAME
def test_no_cell_is_drawn_empty_even_without_sensitivity(platform: Platform, cells: Cells) -> None:
    blind = Platform("blind", 0.9999, 0.5, 0.5, 0.1, 0.5, 100.0, n_controls=platform.n_controls)
    assay = assay_of(blind, cells)

    counts = draw_counts(assay, cells, rng=np.random.default_rng(3))

    assert counts[:, assay.usable].sum(axis=1).min() >= 1


def test_controls_and_foreign_genes_are_not_usable(cells: Cells) -> None:
    assay = assay_of(SIMFISH_PLUS, cells)
    unusable = {symbol for symbol, usable in zip(assay.symbols, assay.usable, strict=True) if not usable}

    assert unusable == {*FOREIGN_GENES, *(f"Blank-{i + 1}" for i in range(5))}


def test_controls_count_background_only(cells: Cells) -> None:
    assay = assay_of(SIMISH, cells)

    assert not assay.rate[:, 100:].any()
    assert not assay.neighbourhood[:, 100:].any()
    assert (assay.background > 0).all()


def test_slices_of_one_platform_differ_less_than_platforms(cells: Cells) -> None:
    core = slice(0, len(CORE_GENES))
    relative = [
        np.log(assay.rate[:, core].mean(axis=0)) - np.log(assay.rate[:, core].mean())
        for assay in (assay_of(SIMFISH, cells), assay_of(SIMFISH, cells, slice_seed=5), assay_of(SIMISH, cells))
    ]

    assert np.abs(relative[0] - relative[1]).mean() < np.abs(relative[0] - relative[2]).mean()


def test_profiles_have_one_row_a_type() -> None:
    profiles = make_profiles(rng=np.random.default_rng(0))

    assert profiles.rate.shape == (len(CELL_TYPES), len(GENES))
    assert (profiles.rate > 0).all()
    assert (profiles.dispersion > 0).all()
