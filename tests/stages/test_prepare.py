"""Preparing: every refusal and its mend; units, order, symbols and tiles of what passes."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from support.slices import SYMBOLS, make_adata

from lloki_atlas.config import digest
from lloki_atlas.errors import InputError
from lloki_atlas.stages.prepare import prepare_slice, tile_bounds
from lloki_atlas.stages.sources import open_source


def prepare(adata, **options):
    given = {
        "slice_id": "one",
        "technology": "MERFISH",
        "organism": "mouse",
        "coordinate_unit": "micrometer",
        "reference_symbols": {"GAD1", "CCN2"},
        "tile_cells": 8,
        **options,
    }
    return prepare_slice(open_source(adata), **given)


def with_value(value):
    def change(adata):
        adata.X = sparse.csr_matrix(adata.X)
        adata.X.data[3] = value

    return change


def with_position(value):
    def change(adata):
        adata.obsm["spatial"][[4, 7], 1] = value

    return change


def with_empty_cells(adata):
    counts = adata.X.toarray()
    counts[[2, 5]] = 0
    adata.X = sparse.csr_matrix(counts)


def repeat_a_cell(adata):
    adata.obs_names = ["cell0", "cell0", *adata.obs_names[2:]]


def repeat_genes(adata):
    adata.var_names = ["Gad1", "Gad2", "Gad1", "Car4", "Car4", "Car4"]


REFUSALS = {
    "nan": (with_value(np.nan), {}, "NaN or infinite values: replace them"),
    "infinite": (with_value(np.inf), {}, "NaN or infinite values: replace them"),
    "negative": (with_value(-1), {}, "negative in 1 places.*layer='counts'"),
    "fraction": (with_value(0.5), {}, r"not whole numbers \(0.5 for example\).*layer='counts'.*accept_normalized=True"),
    "huge": (with_value(2.0**25), {}, "give raw counts below 16777216"),
    "nan anyway": (with_value(np.nan), {"accept_normalized": True}, "NaN or infinite"),
    "negative anyway": (with_value(-0.5), {"accept_normalized": True}, "negative"),
    "nan position": (with_position(np.nan), {}, r"2 cells .*coordinates \(cell4, cell7\): remove these cells"),
    "infinite position": (with_position(np.inf), {}, "2 cells .* NaN or infinite coordinates"),
    "empty cells": (with_empty_cells, {}, r"2 of 30 cells .*\(cell2, cell5\): .*empty_cells='keep'"),
    "empty cells setting": (lambda adata: None, {"empty_cells": "drop"}, "choose 'error' or 'keep'"),
    "genes twice": (repeat_genes, {}, r"duplicate gene symbols \(Gad1, Car4\): keep one column"),
    "cells twice": (repeat_a_cell, {}, r"duplicate cell names \(cell0\): make them unique"),
    "unit": (lambda adata: None, {"coordinate_unit": "parsec"}, "say micrometer, millimeter"),
    "pixel": (lambda adata: None, {"coordinate_unit": "pixel"}, "give um_per_unit"),
    "organism": (lambda adata: None, {"organism": "axolotl"}, "choose from mouse, human"),
    "label": (lambda adata: None, {"label_key": ["cell_type", "leiden"]}, "'leiden': choose label_key from cell_type"),
    "reference": (
        lambda adata: None,
        {"reference_symbols": {"CD3E"}},
        "shares no gene with the reference: .*gene_map=",
    ),
    "slice id": (lambda adata: None, {"slice_id": " one"}, "slice_id is ' one'"),
    "no slice id": (lambda adata: None, {"slice_id": ""}, "slice_id is ''"),
    "technology": (lambda adata: None, {"technology": "a\nb"}, "technology is"),
    "tile": (lambda adata: None, {"tile_cells": 0}, "at least 1"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_source_is_refused_with_its_mend(name):
    change, options, message = REFUSALS[name]
    adata = make_adata()
    change(adata)
    with pytest.raises(InputError, match=message) as caught:
        prepare(adata, **options)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("shape", "what"), [((0, 6), "cells"), ((30, 0), "genes")])
def test_table_without_cells_or_genes_is_refused(shape, what):
    with pytest.raises(InputError, match=f"has no {what}"):
        prepare(make_adata()[: shape[0], : shape[1]].copy())


def test_source_without_coordinates_is_refused():
    source = open_source(make_adata(), spatial_key=None)
    with pytest.raises(InputError, match="open it with a spatial_key"):
        prepare_slice(
            source,
            slice_id="a",
            technology="b",
            organism="mouse",
            coordinate_unit="um",
            reference_symbols=["GAD1"],
        )


def test_identifiers_in_place_of_symbols_are_refused_with_advice():
    adata = make_adata()
    adata.var_names = [f"ENSMUSG{number:011d}" for number in range(6)]
    with pytest.raises(InputError, match="have to be gene symbols of mouse, not identifiers"):
        prepare(adata)


def test_normalized_values_are_taken_when_accepted():
    adata = make_adata()
    adata.X = adata.X * 0.5
    prepared = prepare(adata, accept_normalized=True)
    assert prepared.metadata["integer_counts"] is False
    assert prepare(make_adata()).metadata["integer_counts"] is True


def test_empty_cells_are_kept_when_told():
    adata = make_adata()
    with_empty_cells(adata)
    prepared = prepare(adata, empty_cells="keep")
    assert prepared.counts.shape[0] == 30
    assert prepared.metadata["n_empty_cells"] == 2


def test_cells_are_put_in_spatial_order_and_nothing_else_changes():
    adata = make_adata()
    prepared = prepare(adata)
    rows = prepared.obs["source_row"].to_numpy()
    assert rows.dtype == np.int64
    assert sorted(rows) == list(range(30))
    assert list(rows) != list(range(30))
    assert (prepared.counts != adata.X[rows]).nnz == 0
    assert np.array_equal(prepared.coordinates, adata.obsm["spatial"][rows].astype(np.float32))
    assert list(prepared.obs.index) == list(adata.obs_names[rows])
    assert prepared.obs["volume"].tolist() == adata.obs["volume"].to_numpy()[rows].tolist()
    assert prepared.obs["cell_type"].tolist() == adata.obs["cell_type"].to_numpy()[rows].tolist()


def test_counts_are_sorted_csr_float32():
    counts = prepare(make_adata()).counts
    assert counts.format == "csr"
    assert counts.dtype == np.float32
    assert counts.has_sorted_indices


@pytest.mark.parametrize(
    ("unit", "um_per_unit", "factor"),
    [("um", None, 1), ("mm", None, 1000), ("nm", None, 0.001), ("pixel", 0.325, 0.325)],
)
def test_coordinates_become_micrometre(unit, um_per_unit, factor):
    adata = make_adata()
    prepared = prepare(adata, coordinate_unit=unit, um_per_unit=um_per_unit)
    rows = prepared.obs["source_row"].to_numpy()
    assert prepared.coordinates.dtype == np.float32
    assert np.array_equal(prepared.coordinates, (adata.obsm["spatial"][rows] * factor).astype(np.float32))
    assert prepared.metadata["um_per_unit"] == factor


def test_order_does_not_depend_on_the_unit():
    orders = [prepare(make_adata(), coordinate_unit=unit).obs["source_row"].tolist() for unit in ("um", "mm", "nm")]
    assert orders[0] == orders[1] == orders[2]


def test_row_of_a_section_counts_in_the_whole_source():
    source = open_source(make_adata(), slice_key="section", slice_value="two")
    prepared = prepare_slice(
        source, slice_id="a", technology="b", organism="mouse", coordinate_unit="um", reference_symbols=["GAD1"]
    )
    assert sorted(prepared.obs["source_row"]) == list(range(1, 30, 2))


def test_panel_is_the_digest_of_the_canonical_symbols():
    assert prepare(make_adata()).panel == digest(sorted(SYMBOLS))


def test_panel_does_not_depend_on_the_order_of_genes_or_on_controls():
    genes = ("Blank-7", "Slc17a7", "Car4", "Ccn2", "Gad2", "Gad1")
    assert prepare(make_adata(genes=genes)).panel == prepare(make_adata()).panel


def test_user_s_table_of_genes_is_used(tmp_path):
    path = tmp_path / "map.tsv"
    path.write_text("Gad2\tCD3E\n")
    assert "CD3E" in prepare(make_adata(), reference_symbols={"CD3E"}, gene_map=path).genes.canonical


@pytest.mark.parametrize("label_key", [None, "cell_type", ["cell_type", "cluster"]])
def test_label_columns_are_recorded(label_key):
    wanted = () if label_key is None else (label_key,) if isinstance(label_key, str) else tuple(label_key)
    assert prepare(make_adata(), label_key=label_key).label_columns == wanted


def test_label_column_keeps_its_meaning_when_its_name_is_mended():
    adata = make_adata()
    adata.obs["cell type/coarse"] = pd.Categorical(adata.obs["cell_type"])
    prepared = prepare(adata, label_key="cell type/coarse")
    assert prepared.label_columns == ("cell_type_coarse",)
    assert prepared.metadata["obs_columns"]["cell type/coarse"] == "cell_type_coarse"


def test_metadata_is_json():
    metadata = prepare(make_adata()).metadata
    assert json.loads(json.dumps(metadata, allow_nan=False)) == metadata
    assert metadata["gene_report"]["counts"]["control"] == 1


def test_one_cell_is_a_slice():
    prepared = prepare(make_adata(1))
    assert prepared.metadata["tile_bounds"] == [[*map(float, prepared.coordinates[0])] * 2]


def test_bounds_of_tiles_enclose_their_cells():
    prepared = prepare(make_adata())
    bounds = prepared.metadata["tile_bounds"]
    assert len(bounds) == 4
    for tile, (xmin, ymin, xmax, ymax) in enumerate(bounds):
        cells = prepared.coordinates[8 * tile : 8 * tile + 8]
        assert cells.min(axis=0).tolist() == [xmin, ymin]
        assert cells.max(axis=0).tolist() == [xmax, ymax]


@settings(deadline=None, max_examples=25)
@given(tile_cells=st.integers(1, 40))
def test_size_of_a_tile_changes_only_the_bounds(tile_cells):
    first, other = prepare(make_adata()), prepare(make_adata(), tile_cells=tile_cells)
    assert np.array_equal(first.coordinates, other.coordinates)
    assert (first.counts != other.counts).nnz == 0
    assert len(tile_bounds(other.coordinates, tile_cells)) == -(-30 // tile_cells)


@settings(deadline=None, max_examples=15)
@given(order=st.permutations(range(30)))
def test_order_of_the_source_s_cells_changes_nothing_but_source_row(order):
    adata = make_adata()
    first, other = prepare(adata), prepare(adata[list(order)].copy())
    assert np.array_equal(first.coordinates, other.coordinates)
    assert (first.counts != other.counts).nnz == 0
    assert list(first.obs.index) == list(other.obs.index)
