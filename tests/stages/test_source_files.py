"""What a file has to be before it is opened: nothing good is refused, nothing is followed out of the source."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
import zarr
from scipy import sparse
from support.slices import make_adata, make_spatial_data, with_matrix, write_h5ad

from lloki_atlas.errors import InputError
from lloki_atlas.stages import source_files
from lloki_atlas.stages.source_files import check_hdf5, check_zarr, checked_path, plain_files
from lloki_atlas.stages.sources import open_source


def check_file(path):
    with h5py.File(path, "r") as file:
        check_hdf5(file, path=path)


def check_table(folder):
    check_zarr(folder, plain_files(folder))


def written(adata, path):
    """The table of an AnnData, written as a SpatialData store."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_spatial_data(adata).write(path)
    return path / "tables" / "table"


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_good_sources_pass(tmp_path, form):
    adata = with_matrix(make_adata(), form)
    check_file(write_h5ad(tmp_path / "x.h5ad", adata, compression="gzip"))
    check_table(written(adata, tmp_path / "x.zarr"))


def test_a_matrix_of_hardly_any_counts_passes(tmp_path, monkeypatch):
    """What compresses best of all that is real: gzip on zeros."""
    monkeypatch.setattr(source_files, "SMALL_BYTES", 1000)
    values = np.zeros((2000, 2000), dtype=np.float32)
    values[0, 0] = 1
    with h5py.File(tmp_path / "x.h5ad", "w") as file:
        file.create_dataset("X", data=values, chunks=(500, 1000), compression="gzip", compression_opts=9)
    assert values.nbytes > 400 * (tmp_path / "x.h5ad").stat().st_size
    check_file(tmp_path / "x.h5ad")


def test_one_gene_and_cells_without_counts_pass(tmp_path):
    adata = make_adata(genes=("Gad1",))
    check_table(written(adata, tmp_path / "one.zarr"))
    adata = make_adata()
    adata.X = sparse.csr_matrix(adata.shape, dtype=np.float32)
    check_table(written(adata, tmp_path / "none.zarr"))


def test_a_named_index_and_a_layer_pass(tmp_path):
    adata = make_adata()
    adata.obs_names.name, adata.var_names.name = "cell_id", "gene"
    adata.layers["counts"] = adata.X.copy()
    path = tmp_path / "x.zarr"
    check_table(written(adata, path))
    assert open_source(path, layer="counts").cells == tuple(adata.obs_names)


@pytest.mark.parametrize(
    ("version", "shards"), [(2, None), (3, None), (3, (40,))], ids=["version 2", "version 3", "shards"]
)
def test_each_chunk_of_counts_is_asked_for(tmp_path, version, shards):
    table = zarr.open_group(tmp_path / "table", mode="w", zarr_format=version)
    values = np.arange(1, 101, dtype=np.float32)
    table.create_group("X").create_array("data", data=values, chunks=(10,), shards=shards)
    check_table(tmp_path / "table")
    chunk = next(file for file in sorted((tmp_path / "table/X/data").rglob("*[0-9]")) if file.is_file())
    chunk.unlink()
    with pytest.raises(InputError, match=r"'X/data' .* lost 1 of (10|3) chunks: copy or export it again"):
        check_table(tmp_path / "table")


def test_chunks_of_zeros_may_be_missing_where_zeros_are_values(tmp_path):
    table = zarr.open_group(tmp_path / "table", mode="w")
    table.create_group("obs").create_array("cluster", shape=(100,), chunks=(10,), dtype=np.int64)
    table.create_array("X", shape=(100, 5), chunks=(10, 5), dtype=np.float32)
    check_table(tmp_path / "table")


@pytest.mark.parametrize("name", ["shape", "chunks"])
def test_version_two_metadata_are_looked_at(tmp_path, name):
    table = zarr.open_group(tmp_path / "table", mode="w", zarr_format=2)
    table.create_array("X", shape=(10,), chunks=(10,), dtype=np.float32)
    metadata = tmp_path / "table" / "X" / ".zarray"
    content = json.loads(metadata.read_text())
    content[name] = [10**14]
    metadata.write_text(json.dumps(content))
    with pytest.raises(InputError, match="declares 100000000000000 values"):
        check_table(tmp_path / "table")


def test_a_large_declared_array_needs_a_file_in_proportion(tmp_path, monkeypatch):
    monkeypatch.setattr(source_files, "SMALL_BYTES", 1000)
    monkeypatch.setattr(source_files, "MAX_RATIO", 2)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = np.arange(5000, dtype=np.float64)
    check_file(tmp_path / "x.h5")
    with h5py.File(tmp_path / "y.h5", "w") as file:
        file.create_dataset("y", (5000,), dtype=np.float64, chunks=(100,))
    with pytest.raises(InputError, match=r"'y' of .* declares 5000 values"):
        check_file(tmp_path / "y.h5")


@pytest.fixture
def older(tmp_path):
    """A store whose table is in zarr 2, as older releases wrote it."""
    folder = tmp_path / "older.zarr" / "tables" / "table"
    folder.parent.mkdir(parents=True)
    with anndata.settings.override(zarr_write_format=2), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_adata().write_zarr(folder)
    return tmp_path / "older.zarr"


def test_a_table_of_older_releases_is_read(older):
    table = open_source(older)
    assert table.cells == tuple(make_adata().obs_names)
    assert (table.counts != make_adata().X).nnz == 0


class Payload:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (print, ("the code of a source ran",))


def test_no_code_of_a_source_runs(older, capfd):
    array = older / "tables/table/obs/section/categories"
    content = json.loads((array / ".zarray").read_text())
    for root in (array, older / "tables/table/obs/section", older / "tables/table"):
        (root / ".zmetadata").unlink(missing_ok=True)
    (array / ".zarray").write_text(json.dumps({**content, "filters": [{"id": "pickle", "protocol": 5}]}))
    (array / "0").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(InputError, match="cannot be read"):
        open_source(older)
    assert "ran" not in capfd.readouterr().out


def test_soft_links_within_a_file_are_followed(tmp_path):
    path = write_h5ad(tmp_path / "x.h5ad", make_adata())
    with h5py.File(path, "r+") as file:
        file["layers/counts"] = h5py.SoftLink("/X")
    table = open_source(path, layer="counts")
    assert (table.counts != make_adata().X).nnz == 0


def test_the_path_itself_may_be_a_link(tmp_path):
    path = write_h5ad(tmp_path / "x.h5ad", make_adata())
    (tmp_path / "link.h5ad").symlink_to(path)
    (tmp_path / "store.zarr").symlink_to(written(make_adata(), tmp_path / "real.zarr").parent.parent)
    for link in ("link.h5ad", "store.zarr"):
        assert open_source(tmp_path / link).cells == tuple(make_adata().obs_names)


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.h5ad").touch()
    assert checked_path("~/x.h5ad") == tmp_path / "x.h5ad"


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, ""])
def test_what_is_no_path_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if path:
        with pytest.raises(InputError):
            checked_path(path)
    else:
        assert checked_path(path) == Path()


def test_files_are_listed_without_following_links(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"123")
    (tmp_path / "z").write_bytes(b"")
    assert plain_files(tmp_path) == {"a/b/c": 3, "z": 0}
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    with pytest.raises(InputError, match="a/up is a link or a device: copy it without links"):
        plain_files(tmp_path)


def test_a_pipe_in_a_folder_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is a link or a device"):
        plain_files(tmp_path)
