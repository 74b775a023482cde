"""Size and memory of a source before it is read."""

from __future__ import annotations

import pytest
from support.slices import make_adata, make_spatial_data, with_matrix, write_h5ad

from lloki_atlas.stages.ingest_memory import SourceSize, ingest_memory, source_size

N, G = 30, 6


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_the_size_of_a_file_is_read_from_its_metadata(tmp_path, form):
    adata = with_matrix(make_adata(), form)
    stored = N * G if form == "dense" else adata.X.nnz
    assert source_size(write_h5ad(tmp_path / "x.h5ad", adata)) == SourceSize(N, stored, 4)


def test_the_size_of_a_layer_is_its_own(tmp_path):
    adata = make_adata()
    adata.layers["raw"] = adata.X[:, [0] * G].copy()
    source = write_h5ad(tmp_path / "x.h5ad", adata)
    assert source_size(source, layer="raw").n_entries == adata.layers["raw"].nnz != adata.X.nnz


@pytest.mark.parametrize("form", ["csr", "dense"])
def test_the_size_of_a_spatialdata_store_is_that_of_its_table(tmp_path, form):
    adata = with_matrix(make_adata(), form)
    make_spatial_data(adata).write(tmp_path / "x.zarr")
    stored = N * G if form == "dense" else adata.X.nnz
    # two columns say which shape a cell is
    assert source_size(tmp_path / "x.zarr", table="table") == SourceSize(N, stored, 6)


def test_the_size_of_a_vendors_folder_is_that_of_the_files_that_are_read(tmp_path):
    for name, text in {"cell_by_gene.csv": "x" * 50, "cell_metadata.csv": "x" * 7, "image.tif": "x" * 999}.items():
        (tmp_path / name).write_text(text)
    assert source_size(tmp_path) == SourceSize(n_bytes=57)


@pytest.mark.parametrize("name", ["gone.h5ad", "text.h5ad", "empty"])
def test_what_cannot_be_told_is_left_to_the_reading(tmp_path, name):
    (tmp_path / "text.h5ad").write_text("no HDF5")
    (tmp_path / "empty").mkdir()
    assert source_size(tmp_path / name) == SourceSize()


def test_more_of_anything_needs_more_memory():
    sizes = [SourceSize(), SourceSize(10**5), SourceSize(10**5, 10**7), SourceSize(10**5, 10**7, 30)]
    needs = [ingest_memory(size) for size in sizes]
    assert needs == sorted(set(needs))
    assert ingest_memory(SourceSize(n_bytes=10**9)) > 10**10
