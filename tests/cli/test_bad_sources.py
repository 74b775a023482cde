"""Sources that cannot be used, of every kind: one sentence, exit code 3, every byte of the catalog as it was."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from support.commands import run_main, run_process
from support.refusals import assert_refused_by, ingest_arguments
from support.slices import make_adata, make_spatial_data, write_h5ad
from support.vendors import write_cosmx, write_merscope, write_xenium

from lloki_atlas.store.catalog import open_catalog

Case = tuple[Callable[[Path], Path], tuple[str, ...]]


@pytest.fixture(scope="module")
def catalog(root, tmp_path_factory):
    """A copy of the atlas that no command of these tests may change."""
    return Path(shutil.copytree(root, tmp_path_factory.mktemp("bad") / "atlas"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A SpatialData store without positions, which the shapes have: copy it to change it."""
    path = tmp_path_factory.mktemp("store") / "store.zarr"
    make_spatial_data(make_adata(), spatial=False).write(path)
    return path


def refuse(catalog: Path, source: Path, *words: str, run: Callable = run_main, **options: object) -> None:
    assert_refused_by(catalog, ingest_arguments(catalog, source, **options), *words, run=run)
    staging = catalog / "staging"
    assert not staging.exists() or not any(staging.iterdir())


def h5ad(folder: Path, edit: Callable | None = None, **settings: object) -> Path:
    """A good h5ad file, but for what `edit` does to its AnnData."""
    adata = make_adata()
    if edit is not None:
        edit(adata)
    return write_h5ad(folder / "slice.h5ad", adata, **settings)


def edited(folder: Path, edit: Callable[[h5py.File], object]) -> Path:
    """A good h5ad file, but for what `edit` does to its HDF5."""
    source = h5ad(folder)
    with h5py.File(source, "r+") as file:
        edit(file)
    return source


def replaced(file: h5py.File, name: str, data: object, **settings: object) -> None:
    attributes = dict(file[name].attrs)
    del file[name]
    file.create_dataset(name, data=data, **settings).attrs.update(attributes)


# what is no h5ad file, or no whole one


def text(folder):
    (folder / "notes.h5ad").write_text("cell,Gad1\na,1\n" * 100)
    return folder / "notes.h5ad"


def pickled(folder):
    (folder / "pickle.h5ad").write_bytes(pickle.dumps({"X": list(range(1000))}))
    return folder / "pickle.h5ad"


def zipped(folder):
    with zipfile.ZipFile(folder / "zip.h5ad", "w") as archive:
        archive.writestr("slice.h5ad", h5ad(folder).read_bytes())
    return folder / "zip.h5ad"


def gzipped(folder):
    (folder / "slice.h5ad.gz").write_bytes(gzip.compress(h5ad(folder).read_bytes()))
    return folder / "slice.h5ad.gz"


def empty(folder):
    (folder / "empty.h5ad").touch()
    return folder / "empty.h5ad"


def cut(share):
    def make(folder):
        source = h5ad(folder)
        content = source.read_bytes()
        source.write_bytes(content[: max(1, int(len(content) * share))])
        return source

    return make


def flipped(start, stop):
    def make(folder):
        source = h5ad(folder)
        content = bytearray(source.read_bytes())
        content[start:stop] = bytes(255 - byte for byte in content[start:stop])
        source.write_bytes(content)
        return source

    return make


def pipe(folder):
    os.mkfifo(folder / "pipe.h5ad")
    return folder / "pipe.h5ad"


def loop(folder):
    (folder / "loop.h5ad").symlink_to(folder / "loop.h5ad")
    return folder / "loop.h5ad"


FILES: dict[str, Case] = {
    "that is one of a folder": (
        lambda folder: write_xenium(folder / "run").folder / "cell_feature_matrix.h5",
        ("without positions", "output folder"),
    ),
    "that is nowhere": (lambda folder: folder / "nowhere.h5ad", ("nowhere.h5ad", "does not exist")),
    "below a file": (lambda folder: h5ad(folder) / "X", ("does not exist",)),
    "of no bytes": (empty, ("empty.h5ad", "no h5ad file", "again")),
    "of text": (text, ("notes.h5ad", "no h5ad file", "again")),
    "that is a pickle": (pickled, ("pickle.h5ad", "no h5ad file", "again")),
    "that is a zip": (zipped, ("zip.h5ad", "no h5ad file", "again")),
    "that is packed": (gzipped, ("slice.h5ad.gz", "no h5ad file", "again")),
    "cut to a byte": (cut(0), ("slice.h5ad", "cut short", "again")),
    "cut to a tenth": (cut(0.1), ("slice.h5ad", "cut short", "again")),
    "cut to a half": (cut(0.5), ("slice.h5ad", "cut short", "again")),
    "cut at its end": (cut(0.999), ("slice.h5ad", "cut short", "again")),
    "with another signature": (flipped(0, 8), ("slice.h5ad", "no h5ad file", "again")),
    "with a damaged superblock": (flipped(8, 48), ("slice.h5ad", "again")),
    "with a damaged root group": (flipped(96, 400), ("slice.h5ad", "again")),
    "that is a pipe": (pipe, ("pipe.h5ad", "a pipe or a device", "give a file")),
    "that is a device": (lambda _: Path("/dev/zero"), ("/dev/zero", "a pipe or a device", "give a file")),
    "that is a link to itself": (loop, ("loop.h5ad", "may not be read")),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_refused(catalog, tmp_path, name):
    make, words = FILES[name]
    refuse(catalog, make(tmp_path), *words)


# h5ad files with something in them that cannot be used


def set_counts(values):
    return lambda adata: setattr(adata, "X", values(adata.X.toarray()))


def one_of(change):
    def edit(adata):
        adata.obsm["spatial"] = change(adata.obsm["spatial"])

    return edit


def link_outside(file):
    Path(file.filename).with_name("other.h5").touch()
    with h5py.File(Path(file.filename).with_name("other.h5"), "w") as other:
        other["secret"] = np.arange(3)
    file["obsm/other"] = h5py.ExternalLink("other.h5", "/secret")


def counts_outside(file):
    with h5py.File(Path(file.filename).with_name("other.h5"), "w") as other:
        other["X"] = np.ones((30, 6), dtype=np.float32)
    del file["X"]
    file["X"] = h5py.ExternalLink("other.h5", "/X")


def virtual_counts(file):
    with h5py.File(Path(file.filename).with_name("other.h5"), "w") as other:
        other["X"] = np.ones((30, 6), dtype=np.float32)
    layout = h5py.VirtualLayout((30, 6), dtype=np.float32)
    layout[:] = h5py.VirtualSource(Path(file.filename).with_name("other.h5"), "X", (30, 6))
    attributes = {"encoding-type": "array", "encoding-version": "0.2.0"}
    del file["X"]
    file.create_virtual_dataset("X", layout).attrs.update(attributes)


def raw_counts(file):
    raw = Path(file.filename).with_name("raw.bin")
    raw.write_bytes(np.ones((30, 6), dtype=np.float32).tobytes())
    del file["X"]
    external = [(str(raw), 0, h5py.h5f.UNLIMITED)]
    matrix = file.create_dataset("X", (30, 6), dtype=np.float32, external=external)
    matrix.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


def gigantic(name, shape):
    def edit(file):
        attributes = dict(file[name].attrs)
        del file[name]
        chunks = tuple(min(length, 1000) for length in shape)
        file.create_dataset(name, shape, dtype=np.float64, chunks=chunks).attrs.update(attributes)

    return edit


def dense_gigantic(file):
    del file["X"]
    matrix = file.create_dataset("X", (30, 10**13), dtype=np.float32, chunks=(1, 1000))
    matrix.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


def dangling(file):
    del file["obs"]
    file["obs"] = h5py.SoftLink("/nowhere")


def own_tail(file):
    file["obs/below"] = h5py.SoftLink("/obs")
    del file["obs/volume"]
    file["obs/volume"] = h5py.SoftLink("/obs/volume")


CONTENT: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "no positions": (lambda a: a.obsm.pop("spatial"), ("obsm['spatial']", "spatial_key")),
    "one column of positions": (one_of(lambda xy: xy[:, :1]), ("two columns",)),
    "positions in text": (one_of(lambda xy: np.where(xy > 500, "left", "right")), ("numbers", "two columns")),
    "positions that are not there": (one_of(lambda xy: xy * np.nan), ("30 cells", "NaN", "remove")),
    "an infinite position": (one_of(lambda xy: np.where(xy > 500, np.inf, xy)), ("infinite", "remove")),
    "positions beyond any slide": (one_of(lambda xy: xy * 1e300), ("beyond", "on a slide")),
    "all cells at one point": (one_of(lambda xy: xy * 0 + 7), ("one point", "cells' positions")),
    "negative counts": (set_counts(lambda x: x - 1), ("negative", "raw counts")),
    "counts that are not there": (set_counts(lambda x: np.where(x > 1, np.nan, x)), ("NaN", "replace")),
    "shares in place of counts": (
        set_counts(lambda x: x / x.sum(axis=1, keepdims=True)),
        ("whole numbers", "accept-normalized"),
    ),
    "logarithms in place of counts": (set_counts(np.log1p), ("whole numbers", "accept-normalized")),
    "counts beyond float32": (set_counts(lambda x: x + 2.0**25), ("count of", "below")),
    "no cells": (lambda a: a._inplace_subset_obs(slice(0, 0)), ("no cells",)),
    "no genes": (lambda a: a._inplace_subset_var(slice(0, 0)), ("no genes",)),
    "identifiers in place of symbols": (
        lambda a: setattr(a, "var_names", [f"ENSMUSG0000000000{n}" for n in range(a.n_vars)]),
        ("no gene", "organism"),
    ),
    "symbols of a fly": (
        lambda a: setattr(a, "var_names", ["Antp", "Ubx", "ftz", "eve", "bcd", "nos"]),
        ("no gene", "organism"),
    ),
    "controls alone": (
        lambda a: setattr(a, "var_names", [f"Blank-{n}" for n in range(a.n_vars)]),
        ("no gene", "organism"),
    ),
    "one gene twice": (
        lambda a: setattr(a, "var_names", ["Gad1", "Gad1", *a.var_names[2:]]),
        ("duplicate gene symbols", "Gad1"),
    ),
    "one cell twice": (
        lambda a: setattr(a, "obs_names", ["cell1", *a.obs_names[1:]]),
        ("duplicate cell names", "cell1"),
    ),
}


@pytest.mark.parametrize("name", CONTENT)
def test_an_h5ad_is_refused_for(catalog, tmp_path, name):
    edit, words = CONTENT[name]
    refuse(catalog, h5ad(tmp_path, edit), "slice.h5ad", *words)


HDF5: dict[str, tuple[Callable[[h5py.File], object], tuple[str, ...]]] = {
    "a link to another file": (link_outside, ("links to another file", "obsm/other", "one file")),
    "counts in another file": (counts_outside, ("links to another file", "'X'", "one file")),
    "counts that are a view of another file": (virtual_counts, ("other files", "'X'", "one file")),
    "counts in raw bytes beside it": (raw_counts, ("other files", "'X'", "one file")),
    "a link that leads nowhere": (dangling, ("again",)),
    "links in a circle": (own_tail, ("again",)),
    "text in place of counts": (
        lambda f: replaced(f, "X/data", [str(v) for v in f["X/data"][:]], dtype=h5py.string_dtype()),
        ("type object", "give numbers"),
    ),
    "complex counts": (
        lambda f: replaced(f, "X/data", f["X/data"][:] + 1j),
        ("type complex", "give numbers"),
    ),
    "an index beyond the genes": (
        lambda f: replaced(f, "X/indices", f["X/indices"][:] + 6),
        ("sparse counts", "damaged"),
    ),
    "an index below the genes": (
        lambda f: replaced(f, "X/indices", f["X/indices"][:] - 1),
        ("sparse counts", "damaged"),
    ),
    "rows that run backwards": (
        lambda f: replaced(f, "X/indptr", f["X/indptr"][:][::-1]),
        ("sparse counts", "indptr", "again"),
    ),
    "fewer values than indices": (
        lambda f: replaced(f, "X/data", f["X/data"][:-1]),
        ("sparse counts", "length", "again"),
    ),
    "a matrix without values": (lambda f: f.pop("X/data"), ("sparse counts", "no data", "again")),
    "another number of cells in the counts": (
        lambda f: f["X"].attrs.update(shape=[29, 6]),
        ("29 × 6", "30 cells", "again"),
    ),
    "a gigantic matrix in a tiny file": (dense_gigantic, ("declares", "10000000000000", "again")),
    "gigantic values in a tiny file": (gigantic("X/data", (10**14,)), ("declares", "'X/data'", "again")),
    "gigantic positions in a tiny file": (gigantic("obsm/spatial", (10**13, 2)), ("declares", "obsm/spatial")),
    "a gigantic column in a tiny file": (gigantic("obs/volume", (10**13,)), ("declares", "obs/volume", "again")),
    "a column of another length": (lambda f: replaced(f, "obs/volume", np.zeros(7)), ("again",)),
    "no obs": (lambda f: f.pop("obs"), ("no obs and var", "write_h5ad")),
    "no var": (lambda f: f.pop("var"), ("no obs and var", "write_h5ad")),
    "an obs that is no table": (lambda f: (f.pop("obs"), f.create_dataset("obs", data=[1, 2])), ("again",)),
    "no X": (lambda f: f.pop("X"), ("no X", "layer")),
}


@pytest.mark.parametrize("name", HDF5)
def test_an_hdf5_file_is_refused_for(catalog, tmp_path, name):
    edit, words = HDF5[name]
    refuse(catalog, edited(tmp_path, edit), "slice.h5ad", *words)


OPTIONS = {
    "a layer that is not there": ({"layer": "raw"}, ("layer 'raw'", "leave layer out")),
    "a label that is not there": ({"label_key": "subclass"}, ("'subclass'", "cell_type")),
    "a section that is not there": ({"slice_key": "sample"}, ("'sample'", "section")),
    "a unit that is none": ({"unit": "parsec"}, ("parsec", "micrometer")),
    "pixels of no size": ({"unit": "pixel"}, ("um_per_unit",)),
    "a key that is not there": ({"spatial_key": "X_umap"}, ("X_umap", "there is spatial")),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_refused_for(catalog, tmp_path, name):
    options, words = OPTIONS[name]
    refuse(catalog, h5ad(tmp_path), *words, **options)


# SpatialData stores


def without_tables(store):
    shutil.rmtree(store / "tables")


def two_tables(store):
    (store / "tables" / "table").rename(store / "tables" / "first")
    shutil.copytree(store / "tables" / "first", store / "tables" / "second")


def half_a_table(store):
    shutil.rmtree(store / "tables" / "table" / "obs")


def cut_array(store):
    file = next(file for file in sorted((store / "tables/table/X/data").rglob("*")) if file.name != "zarr.json")
    while file.is_dir():
        file = next(file.iterdir())
    file.write_bytes(file.read_bytes()[:-3])


def cut_image(store):
    file = store / "images/dapi/s0/c/0/0/0"
    file.write_bytes(file.read_bytes()[:9])


def cut_shapes(store):
    file = store / "shapes/cells/shapes.parquet"
    file.write_bytes(file.read_bytes()[:-100])


def change_json(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def name_region(name):
    def edit(store):
        import zarr

        obs = zarr.open_group(store / "tables/table", mode="r+")["obs/region/categories"]
        obs[:] = np.array([name], dtype=object)

    return edit


def outer_metadata(store):
    change_json(
        store / "tables/table/zarr.json",
        lambda content: content.update(
            consolidated_metadata={
                "kind": "inline",
                "must_understand": False,
                "metadata": {"../../../other": {"node_type": "group", "zarr_format": 3, "attributes": {}}},
            }
        ),
    )


def link_within(store):
    away = store.parent / "away"
    shutil.move(store / "tables/table/X", away)
    (store / "tables/table/X").symlink_to(away)


def linked_image(store):
    away = store.parent / "away"
    shutil.move(store / "images/dapi", away)
    (store / "images/dapi").symlink_to(away)


def gigantic_array(store):
    change_json(store / "tables/table/X/data/zarr.json", lambda content: content.update(shape=[10**14]))


def gigantic_chunks(store):
    change_json(
        store / "tables/table/X/data/zarr.json",
        lambda content: content["chunk_grid"]["configuration"].update(chunk_shape=[10**14]),
    )


def pipe_within(store):
    os.mkfifo(store / "tables/table/pipe")


def garbled(store):
    (store / "tables/table/zarr.json").write_text("{")


def lose(array):
    def edit(store):
        shutil.rmtree(store / "tables/table" / array / "c")

    return edit


STORES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "without tables": (without_tables, ("no table", "SpatialData")),
    "with two tables": (two_tables, ("2 tables", "first, second")),
    "with half a table": (half_a_table, ("again",)),
    "with an array that is cut short": (cut_array, ("again",)),
    "that lost a chunk of its counts": (lose("X/data"), ("'X/data'", "lost 1 of 1 chunks", "again")),
    "that lost the names of its cells": (lose("obs/_index"), ("'obs/_index'", "lost", "again")),
    "that lost the names of its labels": (lose("obs/cell_type/categories"), ("cell_type", "lost", "again")),
    "with an image that is cut short": (cut_image, ("again",)),
    "with an image that says nothing": (
        lambda s: (s / "images/dapi/zarr.json").write_text("{"),
        ("again",),
    ),
    "without its transcripts": (lambda s: shutil.rmtree(s / "points/transcripts/points.parquet"), ("again",)),
    "with shapes that are cut short": (cut_shapes, ("again",)),
    "without the shapes of its region": (lambda s: shutil.rmtree(s / "shapes/cells"), ("'cells'", "obsm['spatial']")),
    "with a region outside": (name_region("../../secret"), ("'../../secret'", "no name of an element")),
    "with a region above": (name_region(".."), ("'..'", "no name of an element")),
    "with names outside in its metadata": (outer_metadata, ("../../../other", "outside")),
    "with a link for a matrix": (link_within, ("link", "copy it without links")),
    "with a link for an image": (linked_image, ("link", "copy it without links")),
    "with a pipe in it": (pipe_within, ("link or a device", "copy it")),
    "with a gigantic array": (gigantic_array, ("declares", "X/data", "again")),
    "with gigantic chunks": (gigantic_chunks, ("declares", "X/data", "again")),
    "with garbled metadata": (garbled, ("again",)),
}


@pytest.mark.parametrize("name", STORES)
def test_a_store_is_refused(catalog, store, tmp_path, name):
    edit, words = STORES[name]
    copy = Path(shutil.copytree(store, tmp_path / "store.zarr"))
    edit(copy)
    refuse(catalog, copy, "store.zarr", *words)


def test_a_store_is_refused_for_a_column_that_names_the_regions(catalog, store, tmp_path):
    copy = Path(shutil.copytree(store, tmp_path / "store.zarr"))
    shutil.rmtree(copy / "tables/table/obs/region")
    change_json(
        copy / "tables/table/obs/zarr.json",
        lambda content: content["attributes"]["column-order"].remove("region"),
    )
    change_json(copy / "tables/table/zarr.json", lambda content: content.pop("consolidated_metadata", None))
    refuse(catalog, copy, "'region'", "obs lacks", "mend the table")


# folders of vendors


def csv_without(name, column):
    def edit(folder):
        frame = pd.read_csv(folder / name, dtype=str)
        frame.drop(columns=column).to_csv(folder / name, index=False)

    return edit


def csv_changed(name, change):
    def edit(folder):
        change(pd.read_csv(folder / name, dtype=str)).to_csv(folder / name, index=False)

    return edit


def emptied(name):
    return lambda folder: (folder / name).write_bytes(b"")


def shortened(name, share=0.5):
    def edit(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return edit


def away(name):
    return lambda folder: (folder / name).unlink()


def linked(name):
    def edit(folder):
        shutil.move(folder / name, folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return edit


def parquet_changed(change):
    def edit(folder):
        change(pd.read_parquet(folder / "cells.parquet")).to_parquet(folder / "cells.parquet", index=False)

    return edit


def matrix_changed(change):
    def edit(folder):
        with h5py.File(folder / "cell_feature_matrix.h5", "r+") as file:
            change(file)

    return edit


def matrix_outside(file):
    with h5py.File(Path(file.filename).with_name("other.h5"), "w") as other:
        file.copy("matrix", other)
    del file["matrix"]
    file["matrix"] = h5py.ExternalLink("other.h5", "/matrix")


def other_first_cell(column):
    def change(frame):
        frame.loc[0, column] = "999"
        return frame

    return change


COUNTS, CELLS, SPECS = "cell_feature_matrix.h5", "cells.parquet", "experiment.xenium"
BY_GENE, METADATA = "cell_by_gene.csv", "cell_metadata.csv"
EXPRESSION, COSMX_METADATA = "Run1_exprMat_file.csv", "Run1_metadata_file.csv"

FOLDERS: dict[str, tuple[Callable[..., object], Callable[[Path], object], tuple[str, ...]]] = {
    "Xenium without its specification": (write_xenium, away(SPECS), (SPECS, "missing", "Xenium")),
    "Xenium without its cells": (write_xenium, away(CELLS), (CELLS, "missing", "Xenium")),
    "Xenium without its counts": (write_xenium, away(COUNTS), (COUNTS, "missing", "Xenium")),
    "Xenium with a garbled specification": (write_xenium, shortened(SPECS), ("again",)),
    "Xenium with an empty specification": (
        write_xenium,
        lambda folder: (folder / SPECS).write_text("{}"),
        (SPECS, "analysis_sw_version"),
    ),
    "Xenium with counts cut short": (write_xenium, shortened(COUNTS), ("again",)),
    "Xenium with cells cut short": (write_xenium, shortened(CELLS), ("again",)),
    "Xenium with an index beyond its genes": (
        write_xenium,
        matrix_changed(lambda file: replaced(file, "matrix/indices", file["matrix/indices"][:] + 12)),
        (COUNTS, "beyond its 12 genes"),
    ),
    "Xenium with another shape": (
        write_xenium,
        matrix_changed(lambda file: replaced(file, "matrix/shape", np.array([12, 999], dtype=np.int32))),
        (COUNTS, "999", "again"),
    ),
    "Xenium with counts in another file": (
        write_xenium,
        matrix_changed(matrix_outside),
        (COUNTS, "links to another file", "one file"),
    ),
    "Xenium with gigantic counts": (
        write_xenium,
        matrix_changed(gigantic("matrix/data", (10**14,))),
        ("declares", "matrix/data"),
    ),
    "Xenium without a column of positions": (
        write_xenium,
        parquet_changed(lambda frame: frame.drop(columns="y_centroid")),
        (CELLS, "y_centroid"),
    ),
    "Xenium with a cell less in its cells": (
        write_xenium,
        parquet_changed(lambda frame: frame.iloc[1:]),
        ("23 cells", "has 24", "one run"),
    ),
    "Xenium with another name of a cell": (
        write_xenium,
        parquet_changed(other_first_cell("cell_id")),
        ("1 of 24 cells", "not in cells.parquet", "one run"),
    ),
    "Xenium with its cells in another order": (
        write_xenium,
        parquet_changed(lambda frame: frame.iloc[::-1]),
        ("order", "one run"),
    ),
    "MERSCOPE without its counts": (write_merscope, away(BY_GENE), (BY_GENE, "missing", "MERSCOPE")),
    "MERSCOPE without its metadata": (write_merscope, away(METADATA), (METADATA, "missing", "MERSCOPE")),
    "MERSCOPE with empty counts": (write_merscope, emptied(BY_GENE), (BY_GENE, "empty", "again")),
    "MERSCOPE with empty metadata": (write_merscope, emptied(METADATA), (METADATA, "empty", "again")),
    "MERSCOPE with counts cut short": (write_merscope, shortened(BY_GENE), ("one run",)),
    "MERSCOPE with a header alone": (
        write_merscope,
        csv_changed(BY_GENE, lambda frame: frame.iloc[:0]),
        (BY_GENE, "no cells"),
    ),
    "MERSCOPE without a column of positions": (
        write_merscope,
        csv_without(METADATA, "center_x"),
        (METADATA, "center_x"),
    ),
    "MERSCOPE without the names of its cells": (write_merscope, csv_without(BY_GENE, "cell"), (BY_GENE, "cell")),
    "MERSCOPE with one gene twice": (
        write_merscope,
        lambda folder: (folder / BY_GENE).write_text((folder / BY_GENE).read_text().replace("Gad2", "Gad1", 1)),
        (BY_GENE, "duplicate columns (Gad1)"),
    ),
    "MERSCOPE with text for a count": (
        write_merscope,
        csv_changed(BY_GENE, lambda frame: frame.assign(Gad1="many")),
        (BY_GENE, "give numbers"),
    ),
    "MERSCOPE with another name of a cell": (
        write_merscope,
        csv_changed(METADATA, other_first_cell("EntityID")),
        ("1 of 24 cells", "not in cell_metadata.csv", "one run"),
    ),
    "MERSCOPE with one cell twice": (
        write_merscope,
        csv_changed(METADATA, lambda frame: pd.concat([frame, frame.iloc[:1]])),
        (METADATA, "twice"),
    ),
    "MERSCOPE with a position that is none": (
        write_merscope,
        csv_changed(METADATA, lambda frame: frame.assign(center_x="left")),
        ("again",),
    ),
    "MERSCOPE with a link for its counts": (write_merscope, linked(BY_GENE), (BY_GENE, "no plain file", "links")),
    "CosMx without its counts": (write_cosmx, away(EXPRESSION), (EXPRESSION, "missing", "CosMx")),
    "CosMx without its metadata": (write_cosmx, away(COSMX_METADATA), (COSMX_METADATA, "missing", "CosMx")),
    "CosMx with empty counts": (write_cosmx, emptied(EXPRESSION), (EXPRESSION, "empty", "again")),
    "CosMx without global positions": (
        write_cosmx,
        csv_without(COSMX_METADATA, "CenterX_global_px"),
        (COSMX_METADATA, "CenterX_global_px"),
    ),
    "CosMx without fields of view": (write_cosmx, csv_without(EXPRESSION, "fov"), (EXPRESSION, "fov")),
    "CosMx with a cell less in its metadata": (
        write_cosmx,
        csv_changed(COSMX_METADATA, lambda frame: frame.iloc[1:]),
        ("1 of 24 cells", "not in Run1_metadata_file.csv", "one run"),
    ),
    "CosMx with a cell less in its counts": (
        write_cosmx,
        csv_changed(EXPRESSION, lambda frame: frame.iloc[:-1]),
        ("1 of 24 cells", "not in Run1_exprMat_file.csv", "one run"),
    ),
    "CosMx with two runs": (
        write_cosmx,
        lambda folder: (folder / "Run2_metadata_file.csv").touch(),
        ("several CosMx runs", "Run1, Run2"),
    ),
    "CosMx with packed counts that are cut short": (
        partial(write_cosmx, packed=True),
        shortened(f"{EXPRESSION}.gz"),
        ("again",),
    ),
    "CosMx in pixels, said to be micrometres": (
        write_cosmx,
        lambda _: None,
        ("are in pixel, not in micrometer", "say"),
    ),
    "of two vendors": (
        write_merscope,
        lambda folder: (folder / CELLS).touch(),
        ("Xenium and of MERSCOPE", "one run"),
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_refused(catalog, tmp_path, name):
    write, edit, words = FOLDERS[name]
    folder = write(tmp_path / "region_0").folder
    edit(folder)
    refuse(catalog, folder, *words)


def test_a_folder_of_nothing_is_refused(catalog, tmp_path):
    (tmp_path / "nothing").mkdir()
    refuse(catalog, tmp_path / "nothing", "no table", "SpatialData", "Xenium, MERSCOPE or CosMx")


# what the operating system refuses


@pytest.mark.parametrize("part", ["", "tables/table/X/data", "tables/table/zarr.json", "cell_by_gene.csv"])
def test_what_may_not_be_read_is_refused_for_that(catalog, store, tmp_path, monkeypatch, part):
    if part.endswith("csv"):
        source = write_merscope(tmp_path / "region_0").folder
    else:
        source = Path(shutil.copytree(store, tmp_path / "store.zarr")) if part else h5ad(tmp_path)
    secret = source / part if part else source
    mode = secret.stat().st_mode
    secret.chmod(0)
    if os.access(secret, os.R_OK):  # root reads everything
        refuse_as_another_user(monkeypatch, secret)
    try:
        refuse(catalog, source, "may not be read", "ermission denied", "permissions")
    finally:
        secret.chmod(mode)


def refuse_as_another_user(monkeypatch, secret):
    """Make the calls that readers use refuse one path, as they do for anyone but root."""
    import io

    def wrap(call):
        def checked(path, *given, **named):
            if isinstance(path, str | os.PathLike) and Path(path).is_relative_to(secret):
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *given, **named)

        return checked

    for module, name in ((io, "open"), (os, "scandir"), (os, "listdir")):
        monkeypatch.setattr(module, name, wrap(getattr(module, name)))


def test_a_pipe_in_place_of_a_source_that_was_ingested_is_refused(root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "atlas"))
    source = h5ad(tmp_path)
    assert run_main(*ingest_arguments(copy, source)).code == 0
    source.unlink()
    os.mkfifo(source)
    refuse(copy, source, "a pipe or a device")


@pytest.mark.parametrize("make", [pipe, cut(0.5)], ids=["a pipe", "a file cut short"])
def test_a_process_of_its_own_ends_with_one_line_too(catalog, tmp_path, make):
    refuse(catalog, make(tmp_path), run=run_process)


def test_many_sources_are_refused_one_by_one_and_the_good_ones_stay(root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "atlas"))
    result = run_main(*ingest_arguments(copy, h5ad(tmp_path), text(tmp_path), slice_id=None))
    assert result.code == 3
    assert "notes.h5ad" in result.err
    assert "slice" in open_catalog(copy).state.slices
