"""Ingest: what is on disk afterwards, who can open it, and that a refusal leaves no trace."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import spatialdata
from scipy import sparse
from spatialdata.transformations import get_transformation
from support.folders import folder_digest
from support.slices import GENES, SYMBOLS, make_adata, make_catalog, make_spatial_data, with_matrix, write_h5ad

from lloki_atlas.errors import ConflictError, InputError
from lloki_atlas.stages import ingest as module
from lloki_atlas.stages.ingest import ingest
from lloki_atlas.stages.sources import section_values
from lloki_atlas.store.arrays import write_arrays
from lloki_atlas.store.catalog import commit, open_catalog, verify
from lloki_atlas.store.objects import receipt_path
from lloki_atlas.store.publishing import publish
from lloki_atlas.store.records import Change
from lloki_atlas.store.slices import SliceStore

WANTED = {
    "slice_id": "one",
    "technology": "MERFISH",
    "organism": "mouse",
    "coordinate_unit": "micrometer",
    "reference_symbols": lambda: SYMBOLS,
}


def put(catalog, source, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ingest(catalog, source, **{**WANTED, **options})


def stored(catalog, slice_id="one"):
    return SliceStore(catalog.path("slices", catalog.slice(slice_id).objects["ingest"]))


@pytest.fixture
def catalog(tmp_path):
    return make_catalog(tmp_path / "atlas")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A catalog with one slice, made of an h5ad file."""
    folder = tmp_path_factory.mktemp("written")
    source = write_h5ad(folder / "tiny.h5ad", make_adata())
    return put(make_catalog(folder / "atlas"), source, label_key="cell_type")


def test_counts_come_back_by_source_row(written):
    store, adata = stored(written), make_adata()
    rows = store.obs(["source_row"])["source_row"].to_numpy()
    assert (store.counts() != adata.X[rows]).nnz == 0
    assert store.counts().dtype == np.float32


def test_coordinates_and_obs_come_back_by_source_row(written):
    store, adata = stored(written), make_adata()
    obs = store.obs()
    rows = obs["source_row"].to_numpy()
    assert np.array_equal(store.coordinates(), adata.obsm["spatial"][rows].astype(np.float32))
    assert list(obs.index) == list(adata.obs_names[rows])
    for column in adata.obs:
        assert obs[column].tolist() == adata.obs[column].to_numpy()[rows].tolist()


def test_genes_are_all_kept_with_their_mapping(written):
    store = stored(written)
    assert store.genes == GENES
    assert store.symbols == (*SYMBOLS, "")
    assert store.mapping == ("exact", "exact", "alias", "ortholog", "exact", "control")


def test_metadata_says_where_the_slice_comes_from(written):
    metadata = stored(written).metadata
    assert metadata["slice_id"] == "one"
    assert metadata["source"]["path"].endswith("tiny.h5ad")
    assert len(metadata["source_digest"]) == 64
    assert metadata["label_columns"] == ["cell_type"]
    assert metadata["gene_report"]["dropped"] == [["Blank-1", "control"]]


def test_tiles_cover_the_cells(written):
    tiles = stored(written).tiles()
    assert [(tile.start, tile.stop) for tile in tiles] == [(0, 8), (8, 16), (16, 24), (24, 30)]
    xy = stored(written).coordinates(8, 16)
    assert tiles[1].bounds == (*map(float, xy.min(axis=0)), *map(float, xy.max(axis=0)))


def test_record_describes_the_slice(written):
    record = written.slice("one")
    assert (record.n_cells, record.n_genes) == (30, 6)
    assert record.label_columns == ("cell_type",)
    assert list(record.objects) == ["ingest"]


def test_catalog_is_whole_and_staging_is_empty(written):
    assert verify(open_catalog(written.root)) == []
    assert list((written.root / "staging").iterdir()) == []


def test_spatialdata_opens_the_slice(written):
    opened = spatialdata.read_zarr(stored(written).path)
    assert list(opened.tables) == ["table"]
    assert opened["table"].shape == (30, 6)
    assert opened["table"].obsm["spatial"].dtype == np.float32


def test_anndata_opens_the_table(written):
    table = anndata.read_zarr(stored(written).path / "tables" / "table")
    assert sparse.issparse(table.X)
    assert list(table.var["symbol"]) == [*SYMBOLS, ""]


def test_csr_csc_and_dense_make_the_same_bytes(tmp_path):
    digests = set()
    for form in ("csr", "csc", "dense"):
        catalog = put(make_catalog(tmp_path / form), with_matrix(make_adata(), form))
        digests.add(folder_digest(stored(catalog).path))
    assert len(digests) == 1


def test_awkward_obs_columns_are_stored(catalog):
    adata = make_adata(4)
    adata.obs["cell type"] = ["a", None, "b", "a"]
    adata.obs["mixed"] = pd.Series([1, "x", None, (2, 3)], index=adata.obs_names, dtype=object)
    adata.obs["seen"] = pd.to_datetime(["2024-01-02"] * 4)
    adata.obs["age"] = pd.array([1, None, 3, 4], dtype="Int64")
    adata.obs["Age"] = 1.5
    obs = stored(put(catalog, adata, label_key="cell type")).obs().sort_values("source_row")
    assert obs["cell_type_2"].iloc[0] == "a"
    assert obs["mixed"].iloc[3] == "(2, 3)"
    assert obs["seen"].iloc[0] == "2024-01-02"
    assert obs["age"].iloc[0] == 1
    assert obs["Age_2"].iloc[0] == 1.5


def test_empty_cells_are_stored_when_told(catalog):
    adata = make_adata()
    counts = adata.X.toarray()
    counts[:3] = 0
    adata.X = sparse.csr_matrix(counts)
    store = stored(put(catalog, adata, empty_cells="keep"))
    assert (np.diff(store.counts().indptr) == 0).sum() == 3


def test_one_cell_without_neighbours_is_stored(catalog):
    assert stored(put(catalog, make_adata(1))).n_cells == 1


def test_pixels_become_micrometre(catalog):
    store = stored(put(catalog, make_adata(), coordinate_unit="pixel", um_per_unit=0.5))
    rows = store.obs(["source_row"])["source_row"].to_numpy()
    assert np.array_equal(store.coordinates(), (make_adata().obsm["spatial"][rows] * 0.5).astype(np.float32))


def test_sections_of_a_file_become_slices(catalog, tmp_path):
    source = write_h5ad(tmp_path / "x.h5ad", make_adata())
    for value in section_values(source, "section"):
        catalog = put(catalog, source, slice_id=value, slice_key="section", slice_value=value)
    assert sorted(catalog.state.slices) == ["one", "two"]
    assert sorted(stored(catalog, "two").obs()["source_row"]) == list(range(1, 30, 2))
    assert catalog.slice("one").panel == catalog.slice("two").panel


@pytest.mark.parametrize("on_disk", [True, False])
def test_elements_of_a_spatialdata_are_carried(catalog, tmp_path, on_disk):
    source = make_spatial_data(make_adata())
    if on_disk:
        source.write(tmp_path / "x.zarr")
        source = tmp_path / "x.zarr"
    opened = spatialdata.read_zarr(stored(put(catalog, source)).path)
    assert sorted(opened.shapes) == ["cells"]
    assert len(opened.points["transcripts"].compute()) == 30
    assert opened.images["dapi"].shape == (1, 8, 8)
    assert np.array_equal(opened.images["dapi"].to_numpy().ravel(), np.arange(64))


def test_table_still_annotates_its_shapes(catalog):
    opened = spatialdata.read_zarr(stored(put(catalog, make_spatial_data(make_adata()))).path)
    table = opened["table"]
    assert table.uns["spatialdata_attrs"]["region"] == "cells"
    centers = opened.shapes["cells"].geometry.centroid.loc[table.obs["instance"].to_numpy()]
    assert np.allclose(np.column_stack([centers.x, centers.y]), table.obsm["spatial"], atol=1e-3)


def test_every_element_gets_its_way_to_micrometre(catalog):
    # circles and transcripts in units of half a micrometre, the image in pixels of four such units
    source = make_spatial_data(make_adata(), to_global=0.25)
    opened = spatialdata.read_zarr(stored(put(catalog, source, coordinate_unit="pixel", um_per_unit=0.5)).path)
    factors = {
        name: get_transformation(opened[name], "micrometer").to_affine_matrix(("x", "y"), ("x", "y"))[0, 0]
        for name in ("cells", "transcripts", "dapi")
    }
    assert factors == {"cells": 0.5, "transcripts": 0.5, "dapi": 2.0}
    circles = spatialdata.transform(opened["cells"], to_coordinate_system="micrometer").geometry.centroid
    at = opened["table"].obs["instance"].to_numpy()
    assert np.allclose(np.column_stack([circles.x, circles.y])[at - 100], opened["table"].obsm["spatial"], atol=1e-3)


def test_source_in_memory_is_not_changed(catalog):
    source = make_spatial_data(make_adata())
    put(catalog, source, coordinate_unit="mm")
    for name in ("cells", "transcripts", "dapi"):
        assert list(get_transformation(source[name], get_all=True)) == ["global"]
    assert list(source["table"].obs) == ["cell_type", "section", "volume", "cluster", "region", "instance"]


def test_region_without_a_cell_of_the_section_is_left_behind(catalog):
    source = make_spatial_data(make_adata())
    source.shapes["others"] = source.shapes["cells"].copy()
    table = source.tables["table"]
    table.obs["region"] = pd.Categorical(np.where(table.obs["section"] == "one", "cells", "others"))
    table.uns["spatialdata_attrs"]["region"] = ["cells", "others"]
    opened = spatialdata.read_zarr(stored(put(catalog, source, slice_key="section", slice_value="two")).path)
    assert list(opened.shapes) == ["others"]
    assert opened["table"].uns["spatialdata_attrs"]["region"] == "others"


def test_spatialdata_with_shapes_alone_gets_positions(catalog):
    adata = make_adata()
    store = stored(put(catalog, make_spatial_data(adata, spatial=False), coordinate_unit="mm"))
    rows = store.obs(["source_row"])["source_row"].to_numpy()
    assert np.allclose(store.coordinates(), adata.obsm["spatial"][rows] * 1000, rtol=1e-6)


def test_same_slice_again_changes_nothing(catalog):
    first = put(catalog, make_adata())
    before = folder_digest(first.root)
    assert put(first, make_adata()) is first
    assert folder_digest(first.root) == before


def test_same_content_under_another_path_is_the_same_slice(catalog, tmp_path):
    first = put(catalog, write_h5ad(tmp_path / "a.h5ad", make_adata()))
    (tmp_path / "b.h5ad").write_bytes((tmp_path / "a.h5ad").read_bytes())
    assert put(first, tmp_path / "b.h5ad") is first


def test_published_object_is_used_again(catalog, monkeypatch):
    # its writer died before the commit
    put(catalog, make_adata())
    monkeypatch.setattr(module, "write_slice", None)
    other = make_catalog(catalog.root.parent / "other")
    (catalog.root / "slices").rename(other.root / "slices")
    assert stored(put(other, make_adata())).n_cells == 30


@pytest.mark.parametrize(
    "options", [{"technology": "STARmap"}, {"coordinate_unit": "mm"}, {"label_key": "cell_type"}, {"source": 1}]
)
def test_known_id_with_other_content_is_refused(catalog, options):
    first = put(catalog, make_adata())
    before = folder_digest(first.root)
    with pytest.raises(InputError, match=r"'one' is in .* already .*: choose another id"):
        put(first, make_adata(seed=options.pop("source", 0)), **options)
    assert folder_digest(first.root) == before


def changed_file(tmp_path):
    """A file that is ingested, and then changes."""
    path = write_h5ad(tmp_path / "tiny.h5ad", make_adata())
    return path, lambda: write_h5ad(path, make_adata(seed=1))


def test_a_file_that_changed_is_a_new_version_of_its_slice(catalog, tmp_path):
    source, change = changed_file(tmp_path)
    first = put(catalog, source)
    change()
    second = put(first, source)
    assert second.version == first.version + 1
    assert second.slice("one").objects != first.slice("one").objects
    before = open_catalog(first.root, version=first.version)
    assert stored(before).metadata["source_digest"] != stored(second).metadata["source_digest"]
    assert verify(before) == verify(second) == []


def test_a_file_that_is_read_in_another_way_is_a_new_version_of_its_slice(catalog, tmp_path):
    first = put(catalog, changed_file(tmp_path)[0])
    assert put(first, tmp_path / "tiny.h5ad", technology="STARmap").slice("one").technology == "STARmap"


def test_a_file_that_changed_is_refused_when_it_may_not_replace(catalog, tmp_path):
    source, change = changed_file(tmp_path)
    first = put(catalog, source)
    change()
    with pytest.raises(InputError, match="already with other content"):
        put(first, source, replace=False)


def test_any_source_replaces_a_slice_when_it_is_told(catalog):
    first = put(catalog, make_adata())
    second = put(first, make_adata(seed=1), replace=True)
    assert second.slice("one").objects != first.slice("one").objects
    assert put(second, make_adata(seed=1), replace=True) is second


def test_a_replaced_slice_has_no_later_stage(catalog, tmp_path):
    first = put(catalog, make_adata())
    record = first.slice("one")
    objects = {**record.objects, "tile": publish_statistics(first)}
    later = commit(first, Change(slices={"one": dataclasses.replace(record, objects=objects)}), message="ran")
    assert list(put(later, make_adata(seed=1), replace=True).slice("one").objects) == ["ingest"]


def publish_statistics(catalog):
    write_arrays(catalog.path("staging", "s"), {"x": np.zeros(1)}, dims={"x": ("one",)}, attributes={})
    publish(catalog.path("staging", "s"), catalog.path("statistics", "1" * 32), lineage={})
    return "1" * 32


def test_the_same_request_of_the_same_bytes_is_known_without_parsing(catalog, tmp_path, monkeypatch):
    source = write_h5ad(tmp_path / "tiny.h5ad", make_adata())
    first = put(catalog, source, label_key="cell_type")
    monkeypatch.setattr(module, "open_source", None)
    assert put(first, source, label_key=["cell_type"]) is first
    (tmp_path / "copy.h5ad").write_bytes(source.read_bytes())
    assert put(first, tmp_path / "copy.h5ad", label_key="cell_type") is first


@pytest.mark.parametrize("options", [{"empty_cells": "keep"}, {"accept_normalized": True}, {"table": None}], ids=str)
def test_another_request_of_the_same_bytes_is_parsed(catalog, tmp_path, monkeypatch, options):
    source = write_h5ad(tmp_path / "tiny.h5ad", make_adata())
    first = put(catalog, source)
    parsed = []
    original = module.open_source
    monkeypatch.setattr(module, "open_source", lambda *given, **how: parsed.append(how) or original(*given, **how))
    assert put(first, source, **options) is first
    assert len(parsed) == (0 if options == {"table": None} else 1)


def test_another_gene_map_under_the_same_name_is_another_request(catalog, tmp_path):
    source, genes = write_h5ad(tmp_path / "tiny.h5ad", make_adata()), tmp_path / "genes.tsv"
    genes.write_text("Gad1\tGAD1\n")
    first = put(catalog, source, gene_map=genes)
    genes.write_text("Gad1\tTP53\n")
    assert stored(put(first, source, gene_map=genes)).symbols[0] == "TP53"


def test_a_receipt_of_an_earlier_release_means_parsing_again(catalog, tmp_path):
    source = write_h5ad(tmp_path / "tiny.h5ad", make_adata())
    first = put(catalog, source)
    receipt = receipt_path(stored(first).path)
    content = json.loads(receipt.read_bytes())
    del content["lineage"]["request"]
    receipt.write_text(json.dumps(content))
    assert put(first, source) is first


def test_other_writer_of_the_same_id_is_a_conflict(catalog):
    put(catalog, make_adata())
    with pytest.raises(ConflictError, match="meanwhile: open the head"):
        put(catalog, make_adata(seed=1))
    assert list((catalog.root / "staging").iterdir()) == []


def test_other_writer_of_another_id_is_none(catalog):
    put(catalog, make_adata())
    both = put(catalog, make_adata(), slice_id="two")
    assert sorted(both.state.slices) == ["one", "two"]


def with_negative_counts():
    adata = make_adata()
    adata.X.data[0] = -1
    return adata


def without_positions():
    adata = make_adata()
    del adata.obsm["spatial"]
    return adata


def without_cells():
    return make_adata()[:0].copy()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (with_negative_counts, {}, "negative"),
        (without_positions, {}, r"no obsm\['spatial'\]"),
        (without_cells, {}, "has no cells"),
        (lambda: "absent.h5ad", {}, "does not exist"),
        (make_adata, {"organism": "rat"}, "choose from mouse, human"),
        (make_adata, {"coordinate_unit": "inch"}, "unknown coordinate_unit"),
        (make_adata, {"label_key": "leiden"}, "choose label_key from"),
        (make_adata, {"reference_symbols": lambda: ["CD3E"]}, "shares no gene"),
        (make_adata, {"reference_symbols": None}, "has no reference: create it with"),
        (make_adata, {"layer": "raw"}, "no layer 'raw'"),
        (make_adata, {"gene_map": "absent.tsv"}, "cannot read the gene map"),
        (make_adata, {"slice_id": ""}, "slice_id"),
    ],
)
def test_refusal_leaves_the_catalog_as_it_was(catalog, make, options, message):
    before = folder_digest(catalog.root)
    with pytest.raises(InputError, match=message):
        put(catalog, make(), **options)
    assert folder_digest(catalog.root) == before
    assert open_catalog(catalog.root).version == 1


def test_catalog_open_for_reading_is_refused_before_anything_is_read(catalog):
    with pytest.raises(InputError, match=r"mode='r\+' to ingest"):
        put(open_catalog(catalog.root), "absent.h5ad")


def test_failure_while_writing_leaves_nothing_in_staging(catalog, monkeypatch):
    def fail(prepared, folder):
        folder.mkdir()
        (folder / "zarr.json").write_text("{}")
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "write_slice", fail)
    with pytest.raises(OSError, match="no space left"):
        put(catalog, make_adata())
    assert list((catalog.root / "staging").iterdir()) == []
    assert open_catalog(catalog.root).state.slices == {}


def test_reference_symbols_are_read_from_the_catalog(catalog):
    staging = catalog.path("staging", "reference")
    write_arrays(staging, {"symbols": np.array(["GAD1", "TP53"])}, dims={"symbols": ("gene",)}, attributes={})
    publish(staging, catalog.path("references", "0" * 32), lineage={})
    catalog = commit(catalog, Change(reference="0" * 32), message="reference")
    assert stored(put(catalog, make_adata(), reference_symbols=None)).n_cells == 30
    with pytest.raises(InputError, match="shares no gene"):
        put(catalog, make_adata(genes=("Cd3e", "Cd4")), slice_id="two", reference_symbols=None)


@pytest.mark.parametrize(
    ("name", "section", "n_cells", "alias"),
    [
        ("osmfish_ssp_codeluppi2018", None, 4363, ["Ctps", "CTPS1", "alias"]),
        ("starmap_mpfc_wang2018", "starmap_BZ5", 1049, ["Car4", "CA4", "ortholog"]),
    ],
)
def test_real_slice_is_ingested(catalog, data_folder, name, section, n_cells, alias):
    path = data_folder / f"{name}.h5ad"
    chosen = {} if section is None else {"slice_key": "slice", "slice_value": section}
    symbols = [symbol.upper() for symbol in anndata.read_h5ad(data_folder / "ref_mop_10x_biccn.h5ad").var_names]
    catalog = put(catalog, path, label_key="cell_type", reference_symbols=lambda: symbols, **chosen)
    store, source = stored(catalog), anndata.read_h5ad(path)
    rows = store.obs(["source_row"])["source_row"].to_numpy()
    assert store.n_cells == n_cells
    assert (store.counts() != source.X[rows]).nnz == 0
    assert np.array_equal(store.coordinates(), source.obsm["spatial"][rows])
    assert alias in store.metadata["gene_report"]["not_exact"]


@pytest.mark.parametrize("lost", ["folder", "folder and receipt"])
def test_ingesting_again_restores_a_lost_object_and_makes_no_version(catalog, tmp_path, lost):
    source = write_h5ad(tmp_path / "tiny.h5ad", make_adata())
    done = put(catalog, source)
    path = done.path("slices", done.slice("one").objects["ingest"])
    before = folder_digest(path)
    shutil.rmtree(path)
    if lost == "folder and receipt":
        receipt_path(path).unlink()
    again = put(done, source)
    assert again.version == done.version
    assert folder_digest(path) == before
    assert verify(again) == []
