"""SliceStore: any row range of a store that spatialdata wrote, without reading the rest."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.folders import folder_digest
from support.stores import tiny_slice, write_slice

from lloki_atlas.errors import FormatError, InputError, NotFoundError
from lloki_atlas.store.publishing import publish
from lloki_atlas.store.slices import SliceStore, Tile

DATA = tiny_slice()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_slice(tmp_path_factory.mktemp("slice") / "k.zarr", DATA, technology="merfish")


@pytest.fixture(scope="module")
def store(path):
    return SliceStore(path)


@pytest.fixture
def own_path(tmp_path):
    return write_slice(tmp_path / "k.zarr", DATA)


def test_sizes(store):
    assert (store.n_cells, store.n_genes, store.tile_cells) == (11, 4, 4)


def test_all_counts(store):
    counts = store.counts()
    assert counts.dtype == np.float32
    np.testing.assert_array_equal(counts.toarray(), DATA.X.toarray())


@settings(deadline=None, max_examples=25)
@given(rows=st.tuples(st.integers(0, 11), st.integers(0, 11)).map(sorted))
def test_a_row_range_is_that_part_of_everything(store, rows):
    start, stop = rows
    np.testing.assert_array_equal(store.counts(start, stop).toarray(), DATA.X.toarray()[start:stop])
    np.testing.assert_array_equal(store.coordinates(start, stop), DATA.obsm["spatial"][start:stop])
    pd.testing.assert_frame_equal(store.obs(start=start, stop=stop), DATA.obs.iloc[start:stop])


def test_coordinates_are_float32_rows(store):
    assert store.coordinates().dtype == np.float32
    assert store.coordinates().flags.c_contiguous


@pytest.mark.parametrize("name", list(DATA.obs.columns))
def test_a_column_of_each_kind_comes_back(store, name):
    pd.testing.assert_series_equal(store.obs([name])[name], DATA.obs[name])


def test_a_category_keeps_its_categories_and_its_gaps(store):
    column = store.obs(["cell_type"])["cell_type"]
    assert list(column.cat.categories) == ["B", "T"]
    assert column.isna().tolist() == DATA.obs["cell_type"].isna().tolist()


def test_columns_come_in_the_order_asked_for(store):
    assert list(store.obs(["volume", "field"]).columns) == ["volume", "field"]


def test_no_columns_still_name_the_cells(store):
    assert list(store.obs([], 2, 4).index) == ["cell-2", "cell-3"]


def test_an_unknown_column_is_not_found_and_the_known_are_named(store):
    with pytest.raises(NotFoundError, match="cell_type, note"):
        store.obs(["nothing"])


def test_source_and_canonical_symbols(store):
    assert store.genes == ("Gene0", "Gene1", "Gene2", "Gene3")
    assert store.symbols == ("GENE0", "", "GENE2", "GENE3")


def test_it_says_how_each_gene_was_mapped(store):
    assert store.mapping == ("symbol", "control", "symbol", "symbol")


def test_a_path_may_be_text(path):
    assert SliceStore(str(path)) == SliceStore(path)


def test_tiles_cover_the_rows_in_order_and_hold_their_cells(store):
    tiles = store.tiles()
    assert [(tile.index, tile.start, tile.stop) for tile in tiles] == [(0, 0, 4), (1, 4, 8), (2, 8, 11)]
    for tile in tiles:
        xy = store.coordinates(tile.start, tile.stop)
        np.testing.assert_allclose(tile.bounds, [*xy.min(axis=0), *xy.max(axis=0)], rtol=1e-6)


def test_metadata_come_back(store):
    assert store.metadata["technology"] == "merfish"


@pytest.mark.parametrize("rows", [(-1, 3), (3, 2), (0, 12)])
@pytest.mark.parametrize("method", ["counts", "coordinates", "obs"])
def test_rows_outside_are_refused(store, method, rows):
    with pytest.raises(InputError, match="11 cells"):
        getattr(store, method)(start=rows[0], stop=rows[1])


def test_a_used_store_pickles_to_its_path(store):
    store.counts()
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store
    assert vars(copy) == {"path": store.path}


def test_reading_writes_nothing(path):
    before = folder_digest(path)
    store = SliceStore(path)
    store.counts(), store.obs(), store.coordinates(), store.tiles(), store.symbols
    assert folder_digest(path) == before


def test_reading_some_rows_touches_only_their_chunks(own_path):
    before = SliceStore(own_path).counts(0, 3).toarray()
    for name in ("obs/volume", "obs/note", "obsm/spatial"):
        for chunk in (own_path / "tables" / "table" / name / "c").rglob("*"):
            if chunk.is_file():
                os.truncate(chunk, 1)
    np.testing.assert_array_equal(SliceStore(own_path).counts(0, 3).toarray(), before)


def test_no_store_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match="ingest the slice"):
        _ = SliceStore(tmp_path / "none.zarr").n_cells


@pytest.mark.parametrize(
    ("missing", "read"),
    [("X", SliceStore.counts), ("obs", SliceStore.obs), ("uns/lloki_atlas", SliceStore.tiles)],
)
def test_a_table_without_a_part_is_a_format_error_that_names_it(own_path, missing, read):
    (own_path / "tables" / "table" / missing / "zarr.json").unlink()
    with pytest.raises(FormatError, match=missing):
        read(SliceStore(own_path))


def test_a_cut_chunk_is_a_format_error(own_path):
    os.truncate(own_path / "tables" / "table" / "X" / "data" / "c" / "0", 9)
    with pytest.raises(FormatError, match="damaged"):
        SliceStore(own_path).counts()


def test_dense_counts_are_a_format_error(tmp_path):
    dense = DATA.copy()
    dense.X = dense.X.toarray()
    with pytest.raises(FormatError, match="CSR"):
        _ = SliceStore(write_slice(tmp_path / "k.zarr", dense)).n_cells


def test_tile_bounds_of_another_tile_size_are_a_format_error(tmp_path):
    path = write_slice(tmp_path / "k.zarr", DATA, tile_bounds=[[0, 0, 1, 1]])
    with pytest.raises(FormatError, match="1 tile bounds for 3 tiles"):
        SliceStore(path).tiles()


def test_a_slice_of_one_cell_is_one_tile(tmp_path):
    store = SliceStore(write_slice(tmp_path / "k.zarr", tiny_slice(1, 2)))
    assert [(tile.start, tile.stop) for tile in store.tiles()] == [(0, 1)]
    assert store.counts().shape == (1, 2)


def test_cells_without_counts_are_empty_rows(tmp_path):
    data = tiny_slice(3)
    data.X = data.X * 0
    data.X.eliminate_zeros()
    assert SliceStore(write_slice(tmp_path / "k.zarr", data)).counts(1, 3).nnz == 0


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 3)])
def test_a_tile_holds_a_cell(start, stop):
    with pytest.raises(FormatError):
        Tile(0, start, stop, (0.0, 0.0, 1.0, 1.0))


def test_a_chunk_that_is_gone_from_a_published_slice_is_no_zeros(tmp_path):
    staging = write_slice(tmp_path / "s", DATA)
    final = tmp_path / "slices" / "k.zarr"
    publish(staging, final, lineage={})
    assert SliceStore(final).counts().nnz == DATA.X.nnz
    chunk = next((final / "tables" / "table" / "X" / "data" / "c").iterdir())
    chunk.unlink()
    with pytest.raises(FormatError, match="restore it from a copy"):
        SliceStore(final).counts()
