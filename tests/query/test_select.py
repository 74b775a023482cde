"""Selections: which cells, in which order, what is read when, and that every form tells the same."""

from __future__ import annotations

import dataclasses
import shutil
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import xarray
from support.queries import CONFIG, EMPTY_ROW, GAPPY, IDS, N_CELLS, embeddings, source_of
from support.slices import make_adata

from lloki_atlas.config import to_dict
from lloki_atlas.errors import InputError, NotFoundError
from lloki_atlas.query import select_cells
from lloki_atlas.query.select import inside_region
from lloki_atlas.stages.ingest import ingest
from lloki_atlas.store.catalog import commit, open_catalog
from lloki_atlas.store.records import Change
from lloki_atlas.store.slices import SliceStore

NAMES = ("X_fp", "X_lloki")


@pytest.fixture(scope="module")
def catalog(root):
    return open_catalog(root)


@pytest.fixture(scope="module")
def cells(root):
    """Every cell of the atlas, read without a selection."""
    return embeddings(root)[1]


def picked(selection):
    return selection.to_dataframe()["cell"].tolist()


# which cells


def test_everything_is_selected_in_order_of_slice_and_row(catalog, cells):
    selection = select_cells(catalog)
    assert selection.n_cells == len(selection) == 4 * N_CELLS
    assert selection.slices == IDS
    assert picked(selection) == cells["cell"].tolist()


def test_slices_are_sorted_and_taken_once(catalog):
    assert select_cells(catalog, slices=["simmap_1", GAPPY, "simmap_1"]).slices == (GAPPY, "simmap_1")


@pytest.mark.parametrize(
    ("where", "keep"),
    [
        ("technology != 'SimISH'", lambda t: t["slice_id"] != GAPPY),
        ("slice_id in ('simmap_1', 'simish_1')", lambda t: t["slice_id"].isin(["simmap_1", GAPPY])),
        ("organism == 'mouse' and x > 50", lambda t: t["x"] > 50),
        ("x > 50 and y <= 60", lambda t: (t["x"] > 50) & (t["y"] <= 60)),
        ("cell_type_coarse == 'Inhibitory'", lambda t: t["cell_type_coarse"] == "Inhibitory"),
        ("cell_type_coarse != 'Inhibitory'", lambda t: t["cell_type_coarse"] != "Inhibitory"),
        ("depth < 0.4", lambda t: t["depth"].astype(float) < 0.4),
        ("not depth < 0.4", lambda t: ~(t["depth"].astype(float) < 0.4)),
        ("age in (1, 2, 3)", lambda t: t["age"].isin([1, 2, 3])),
        ("kept", lambda t: t["kept"].eq(True)),
        ("note == 'note 4' or cell_type == 'Micro'", lambda t: (t["note"] == "note 4") | (t["cell_type"] == "Micro")),
        ("depth > 0.5 or age > 50", lambda t: (t["depth"].astype(float) > 0.5) | (t["age"].astype("Float64") > 50)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_filter_selects(catalog, cells, where, keep):
    expected = cells["cell"][keep(cells).fillna(False).astype(bool)].tolist()
    assert picked(select_cells(catalog, where=where)) == expected
    assert 0 < len(expected) < len(cells)


def test_a_column_that_some_slices_lack_is_missing_there(catalog):
    assert set(select_cells(catalog, where="cell_type != 'Micro'").to_dataframe()["slice_id"]) == set(IDS)
    assert set(select_cells(catalog, where="cell_type == 'Micro'").to_dataframe()["slice_id"]) == {"simfish_1"}


def test_a_column_that_all_chosen_slices_lack_is_not_found(catalog):
    with pytest.raises(NotFoundError, match="'depth': choose from cell, cell_type_coarse"):
        select_cells(catalog, slices=["simmap_1"], where="depth > 0")


def test_an_obs_column_that_is_no_label_is_not_found(catalog):
    with pytest.raises(NotFoundError, match="layer"):
        select_cells(catalog, where="layer == 'L4'")


@pytest.mark.parametrize("where", ["", "  "])
def test_an_empty_filter_is_not_no_filter(catalog, where):
    with pytest.raises(InputError, match="empty"):
        select_cells(catalog, where=where)


def test_an_unknown_slice_is_not_found(catalog):
    with pytest.raises(NotFoundError, match="simish_1"):
        select_cells(catalog, slices=["simish_9"])


def test_a_box_holds_its_border_in_every_slice(catalog, cells):
    corner = cells.iloc[10]
    box = (0.0, 0.0, float(corner["x"]), float(corner["y"]))
    inside = (cells["x"] <= box[2]) & (cells["y"] <= box[3]) & (cells["x"] >= 0) & (cells["y"] >= 0)
    chosen = picked(select_cells(catalog, region=box))
    assert chosen == cells["cell"][inside].tolist()
    assert corner["cell"] in chosen


def test_a_region_spans_slices_in_their_own_coordinates(catalog):
    chosen = select_cells(catalog, region=(0, 0, 1e6, 60)).to_dataframe()
    assert set(chosen["slice_id"]) == set(IDS)
    assert chosen["y"].max() <= 60


@pytest.mark.parametrize("closed", [False, True])
def test_a_polygon_selects_what_lies_inside(catalog, cells, closed):
    triangle = np.array([(0.0, 0.0), (120.0, 0.0), (0.0, 90.0)])
    polygon = np.vstack([triangle, triangle[:1]]) if closed else triangle
    x, y = cells["x"].astype(float), cells["y"].astype(float)
    inside = (x > 0) & (y > 0) & (x / 120 + y / 90 < 1)
    assert picked(select_cells(catalog, region=polygon)) == cells["cell"][inside].tolist()
    assert 0 < inside.sum() < len(cells)


def test_a_square_polygon_is_a_box_but_for_its_border(catalog):
    square = [(20.5, 20.5), (80.5, 20.5), (80.5, 80.5), (20.5, 80.5)]
    assert picked(select_cells(catalog, region=square)) == picked(
        select_cells(catalog, region=(20.5, 20.5, 80.5, 80.5))
    )


def test_a_polygon_may_have_a_bay():
    corner = [(0, 0), (10, 0), (10, 4), (4, 4), (4, 10), (0, 10)]
    points = np.array([(1, 1), (9, 1), (1, 9), (9, 9), (5, 5)], dtype=np.float32)
    assert inside_region(points, corner).tolist() == [True, True, True, False, False]


@pytest.mark.parametrize(
    "region",
    [
        (0, 0, 1),
        (5, 0, 1, 1),
        (0, 5, 1, 1),
        (0, 0, np.nan, 1),
        (0, 0, np.inf, 1),
        [(0, 0), (1, 1)],
        [(0, 0, 0), (1, 1, 1), (2, 0, 0)],
        [(0, 0), (1, np.nan), (2, 0)],
        [(0, 0), (1,)],
        [],
        "a box",
        7,
    ],
    ids=str,
)
def test_a_region_is_a_box_or_a_polygon(catalog, region):
    with pytest.raises(InputError, match="a region is"):
        select_cells(catalog, region=region)


def test_filter_region_and_slices_hold_together(catalog, cells):
    chosen = select_cells(catalog, slices=[GAPPY, "simmap_1"], where="technology == 'SimISH'", region=(0, 0, 90, 90))
    inside = (cells["slice_id"] == GAPPY) & (cells["x"] <= 90) & (cells["y"] <= 90)
    assert picked(chosen) == cells["cell"][inside].tolist()


# what is read


@pytest.fixture
def reads(monkeypatch):
    """What is read of slices from here on: names of columns, or `coordinates`, `counts`."""
    seen = []
    for name in ("coordinates", "counts"):
        monkeypatch.setattr(SliceStore, name, recording(getattr(SliceStore, name), lambda *_, name=name: [name], seen))
    monkeypatch.setattr(SliceStore, "obs", recording(SliceStore.obs, lambda columns=None, *_: list(columns), seen))
    return seen


def recording(method, names, seen):
    def call(self, *arguments):
        seen.extend(names(*arguments))
        return method(self, *arguments)

    return call


def test_selecting_reads_nothing(catalog, reads):
    selection = select_cells(catalog, where="depth < 0.4", region=(0, 0, 50, 50))
    assert reads == []
    assert 0 < selection.n_cells < 4 * N_CELLS
    assert set(reads) == {"depth", "coordinates"}


def test_counting_whole_slices_reads_nothing(catalog, reads):
    assert len(select_cells(catalog, slices=IDS[:2])) == 2 * N_CELLS
    assert reads == []


def test_a_filter_over_what_the_catalog_knows_reads_nothing(catalog, reads):
    assert select_cells(catalog, where="technology == 'SimISH'").n_cells == N_CELLS
    assert reads == []


def test_rows_are_found_once(catalog, reads):
    selection = select_cells(catalog, slices=[GAPPY], where="age > 3")
    assert len(selection) == len(selection)
    assert reads == ["age"]


def test_a_selection_says_what_it_is(catalog):
    text = repr(select_cells(catalog, slices=[GAPPY]))
    assert text == f"CellSelection of {N_CELLS} cells in 1 slices of version 6"


# forms


@pytest.fixture(scope="module")
def selection(catalog):
    return select_cells(catalog, slices=[GAPPY, "simfish_1"], where="x > 30")


def test_the_table_is_what_the_store_holds(catalog, cells):
    frame = select_cells(catalog).to_dataframe()
    assert list(frame.columns[:6]) == ["cell", "slice_id", "technology", "organism", "x", "y"]
    assert set(frame.columns) == {*cells.columns, "organism"}
    for column in cells:
        held = frame[column].astype(object)
        assert held.isna().tolist() == cells[column].isna().tolist()
        assert held.dropna().tolist() == cells[column].dropna().tolist()


def test_the_table_keeps_types_that_know_missing_values(catalog):
    frame = select_cells(catalog).to_dataframe()
    assert (str(frame["age"].dtype), str(frame["kept"].dtype)) == ("Int64", "boolean")
    assert frame["x"].dtype == np.float32
    assert frame["organism"].unique().tolist() == ["mouse"]


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_are_the_stored_rows(root, catalog, name):
    vectors, cells = embeddings(root, name)
    selection = select_cells(catalog, where="x > 30")
    expected = vectors[(cells["x"] > 30).to_numpy(dtype=bool)]
    assert np.array_equal(selection.embedding(name), expected, equal_nan=True)


def test_an_empty_cell_has_no_embedding(root, catalog):
    name = source_of(root, GAPPY).obs_names[EMPTY_ROW]
    selection = select_cells(catalog, slices=[GAPPY], where=f"cell == '{name}'")
    assert np.isnan(selection.embedding("X_fp")).all()
    assert selection.n_cells == 1


@pytest.mark.parametrize("name", NAMES)
def test_tiles_are_the_embedding_in_pieces(selection, name):
    parts = list(selection.iter_tiles(name))
    assert np.array_equal(np.concatenate([part[2] for part in parts]), selection.embedding(name), equal_nan=True)
    for slice_id in selection.slices:
        rows = np.concatenate([rows for held, rows, _ in parts if held == slice_id])
        assert np.array_equal(rows, selection.rows[slice_id])


def test_a_piece_is_of_one_tile(selection):
    size = CONFIG.tile.tile_cells
    for _, rows, block in selection.iter_tiles():
        assert len(rows) == len(block) > 0
        assert rows[0] // size == rows[-1] // size


@pytest.mark.parametrize("read", [lambda s: s.embedding("X_pca"), lambda s: list(s.iter_tiles("X_pca"))])
def test_an_unknown_embedding_is_refused(selection, read):
    with pytest.raises(InputError, match="'X_pca': choose from X_fp, X_lloki"):
        read(selection)


def test_anndata_has_the_table_and_the_vectors(selection):
    adata, frame = selection.to_anndata(), selection.to_dataframe()
    assert adata.X is None
    assert list(adata.obs_names) == [f"{s}:{c}" for s, c in zip(frame["slice_id"], frame["cell"], strict=True)]
    assert {"slice_id", "technology", "cell", "cell_type_coarse", "cell_type", "age"} <= set(adata.obs)
    assert set(adata.obsm) == {"X_fp", "X_lloki", "spatial"}
    assert np.array_equal(adata.obsm["spatial"], frame[["x", "y"]])
    for name in NAMES:
        assert np.array_equal(adata.obsm[name], selection.embedding(name), equal_nan=True)


def test_anndata_says_where_it_is_from(selection, root):
    assert selection.to_anndata().uns["lloki_atlas"] == {"catalog": str(root), "version": 6}


def test_xarray_has_the_table_and_the_vectors(selection):
    data, frame = selection.to_xarray(), selection.to_dataframe()
    assert data.sizes == {"cell": len(frame), "X_fp_dimension": 512, "X_lloki_dimension": 128, "axis": 2}
    assert data["name"].values.tolist() == frame["cell"].tolist()
    assert data["slice_id"].values.tolist() == frame["slice_id"].tolist()
    assert np.array_equal(data["spatial"], frame[["x", "y"]])
    assert data["spatial"].attrs["units"] == "micrometer"
    for name in NAMES:
        assert np.array_equal(data[name], selection.embedding(name), equal_nan=True)


def test_xarray_shows_missing_text_as_empty_and_missing_numbers_as_nan(selection):
    data, frame = selection.to_xarray(), selection.to_dataframe()
    assert data["note"].values.tolist() == frame["note"].fillna("").tolist()
    assert np.array_equal(np.isnan(data["age"]), frame["age"].isna())


@pytest.mark.parametrize("slice_id", IDS)
def test_counts_are_the_sources_over_mapped_genes(root, catalog, slice_id):
    adata = select_cells(catalog, slices=[slice_id]).to_anndata(counts=True)
    source = source_of(root, slice_id)
    store = SliceStore(catalog.path("slices", catalog.slice(slice_id).objects["ingest"]))
    mapped = {gene: symbol for gene, symbol in zip(store.genes, store.symbols, strict=True) if symbol}
    assert set(adata.var_names) == set(mapped.values())
    expected = source[adata.obs["cell"].to_list(), list(mapped)].X.toarray()
    assert np.array_equal(adata[:, list(mapped.values())].X.toarray(), expected)
    assert adata.X.dtype == np.float32


def test_counts_of_several_slices_lie_over_all_their_genes(catalog):
    both = select_cells(catalog, slices=IDS[:2], where="x > 40").to_anndata(counts=True)
    assert list(both.var_names) == sorted(both.var_names)
    for slice_id in IDS[:2]:
        alone = select_cells(catalog, slices=[slice_id], where="x > 40").to_anndata(counts=True)
        part = both[(both.obs["slice_id"] == slice_id).to_numpy()]
        assert np.array_equal(part[:, alone.var_names].X.toarray(), alone.X.toarray())
        assert part.X.nnz == alone.X.nnz


def test_anndata_goes_through_a_file(selection, tmp_path):
    adata = selection.to_anndata(counts=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adata.write_h5ad(tmp_path / "cells.h5ad")
    again = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert again.obs["age"].isna().tolist() == selection.to_dataframe()["age"].isna().tolist()
    assert np.array_equal(again.obsm["X_lloki"], adata.obsm["X_lloki"], equal_nan=True)


def test_xarray_goes_through_a_file(selection, tmp_path):
    data = selection.to_xarray()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.to_zarr(tmp_path / "cells.zarr", consolidated=False)
        again = xarray.open_zarr(tmp_path / "cells.zarr", consolidated=False).load()
    xarray.testing.assert_equal(again, data)


# corners

NOTHING = {"no slice": {"slices": []}, "no cell": {"where": "x < -1e9"}}


@pytest.mark.parametrize("name", NOTHING)
class TestASelectionWith:
    @pytest.fixture
    def nothing(self, catalog, name):
        return select_cells(catalog, **NOTHING[name])

    def test_the_table_is_empty_with_columns(self, nothing):
        frame = nothing.to_dataframe()
        assert len(frame) == len(nothing) == 0
        assert {"cell", "slice_id", "technology", "x", "y"} <= set(frame)

    def test_embeddings_have_no_row(self, nothing):
        assert nothing.embedding("X_fp").shape == (0, 512)
        assert nothing.embedding("X_lloki").shape == (0, 128)

    def test_there_is_no_tile(self, nothing):
        assert list(nothing.iter_tiles()) == []

    @pytest.mark.parametrize("counts", [False, True])
    def test_anndata_is_empty(self, nothing, counts):
        assert nothing.to_anndata(counts=counts).n_obs == 0

    def test_xarray_is_empty(self, nothing):
        assert nothing.to_xarray().sizes["cell"] == 0


def test_slices_without_a_selected_cell_leave_their_columns(catalog):
    frame = select_cells(catalog, where="technology == 'SimMAP'").to_dataframe()
    assert frame["depth"].isna().all()
    assert {"age", "kept", "note", "cell_type"} <= set(frame)


def test_cells_whose_labels_are_all_missing_make_no_noise(catalog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = select_cells(catalog, where="age != age and kept != kept and note != note").to_dataframe()
    assert frame[["age", "kept", "note"]].isna().all(axis=None)
    assert set(frame["slice_id"]) == set(IDS)


# versions


def test_an_older_version_has_only_its_slices(root):
    assert [select_cells(open_catalog(root, version=version)).slices for version in range(1, 6)] == [
        IDS[:n] for n in range(5)
    ]


def test_an_older_version_has_only_its_embeddings(root):
    before = select_cells(open_catalog(root, version=5))
    assert before.n_cells == 4 * N_CELLS
    assert np.isnan(before.embedding()).all()


def test_an_older_version_does_not_find_a_later_slice(root):
    with pytest.raises(NotFoundError, match="version 3"):
        select_cells(open_catalog(root, version=3), slices=["simmap_1"])


@pytest.fixture
def copy(root, tmp_path):
    return open_catalog(shutil.copytree(root, tmp_path / "atlas"), mode="r+")


def put(catalog: object, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = options.pop("adata", make_adata())
        return ingest(catalog, adata, organism="mouse", technology="MERFISH", coordinate_unit="um", **options)


def test_a_selection_stays_at_its_version(copy):
    before = select_cells(copy)
    after = put(copy, slice_id="another")
    assert before.n_cells == 4 * N_CELLS
    assert select_cells(after).n_cells == 4 * N_CELLS + 30
    assert select_cells(after).slices[0] == "another"


def test_a_slice_that_was_not_run_has_no_embedding(copy):
    selection = select_cells(put(copy, slice_id="another"))
    lost = np.isnan(selection.embedding()[:, 0])
    assert set(selection.to_dataframe()["slice_id"][lost]) == {"another", GAPPY}
    assert lost.sum() == 31


def test_what_the_catalog_says_goes_before_a_label_of_the_same_name(copy):
    adata = make_adata()
    adata.obs["technology"] = "other"
    adata.obs["x"] = -1.0
    catalog = put(copy, slice_id="another", adata=adata, label_key=["technology", "x"])
    frame = select_cells(catalog, slices=["another"], where="technology == 'MERFISH' and x >= 0").to_dataframe()
    assert len(frame) == adata.n_obs
    assert set(frame["technology"]) == {"MERFISH"}
    assert (frame["x"] >= 0).all()
    assert frame.columns.is_unique


@pytest.mark.parametrize("name", NAMES)
def test_stale_embeddings_count_as_missing(copy, name):
    propagation = dataclasses.replace(CONFIG.propagation, alpha=0.5)
    config = to_dict(dataclasses.replace(CONFIG, propagation=propagation))
    after = commit(copy, Change(config=config), message="other settings")
    assert np.isnan(select_cells(after).embedding(name)).all()
    assert np.isfinite(select_cells(copy).embedding(name)).any()


def test_another_model_makes_only_its_embedding_stale(copy):
    other = Change(models={"autoencoder": copy.state.models["embedder"]})
    selection = select_cells(commit(copy, other, message="another model"), slices=["simmap_1"])
    assert np.isnan(selection.embedding("X_lloki")).all()
    assert np.isfinite(selection.embedding("X_fp")).all()


def test_a_copied_atlas_tells_the_same(copy, root):
    pd.testing.assert_frame_equal(select_cells(copy).to_dataframe(), select_cells(open_catalog(root)).to_dataframe())
