"""Reading: every kind of source gives the same table, and every missing part is named."""

from __future__ import annotations

import h5py
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from support.slices import GENES, make_adata, make_spatial_data, with_matrix, write_h5ad

from lloki_atlas.errors import InputError
from lloki_atlas.stages.sources import open_source, section_values

ADATA = make_adata()


@pytest.fixture(scope="module")
def h5ad(tmp_path_factory):
    return write_h5ad(tmp_path_factory.mktemp("source") / "tiny.h5ad", ADATA)


@pytest.fixture(scope="module")
def zarr_store(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "tiny.zarr"
    make_spatial_data(ADATA).write(path)
    return path


@pytest.fixture(params=["AnnData", "h5ad", "SpatialData", "store"])
def any_source(request, h5ad, zarr_store):
    if request.param == "SpatialData":
        return make_spatial_data(ADATA)
    return {"AnnData": ADATA, "h5ad": h5ad, "store": zarr_store}[request.param]


def test_every_kind_gives_the_same_table(any_source):
    table = open_source(any_source)
    assert (table.counts != ADATA.X).nnz == 0
    assert table.counts.dtype == np.float32
    assert table.symbols == GENES
    assert table.cells == tuple(ADATA.obs_names)
    assert np.array_equal(table.coordinates, ADATA.obsm["spatial"])
    assert table.obs["cell_type"].astype(str).tolist() == ADATA.obs["cell_type"].astype(str).tolist()
    assert table.obs["volume"].tolist() == ADATA.obs["volume"].tolist()
    assert table.rows.tolist() == list(range(30))


def test_every_kind_is_cut_to_a_section(any_source):
    table = open_source(any_source, slice_key="section", slice_value="two")
    assert table.rows.tolist() == list(range(1, 30, 2))
    assert (table.counts != ADATA.X[1::2]).nnz == 0
    assert np.array_equal(table.coordinates, ADATA.obsm["spatial"][1::2])
    assert table.cells == tuple(ADATA.obs_names[1::2])


def test_every_kind_lists_its_sections(any_source):
    assert section_values(any_source, "section") == ["one", "two"]


def test_values_of_a_section_compare_as_text():
    assert open_source(ADATA, slice_key="cluster", slice_value=3).rows.tolist() == list(range(3, 30, 4))
    assert open_source(ADATA, slice_key="cluster", slice_value="3").origin["slice_value"] == "3"


def test_cell_without_a_section_is_in_none():
    adata = make_adata(4)
    adata.obs["section"] = pd.Categorical(["one", None, "nan", "one"])
    assert section_values(adata, "section") == ["one", "nan"]
    assert open_source(adata, slice_key="section", slice_value="nan").rows.tolist() == [2]


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_form_of_the_matrix_does_not_show(form, tmp_path):
    adata = with_matrix(ADATA, form)
    in_memory, on_disk = open_source(adata), open_source(write_h5ad(tmp_path / "x.h5ad", adata))
    assert in_memory.digest == open_source(ADATA).digest
    for table in (in_memory, on_disk):
        assert (table.counts != ADATA.X).nnz == 0


def test_backed_anndata_is_read(h5ad):
    import anndata

    backed = anndata.read_h5ad(h5ad, backed="r")
    assert open_source(backed).digest == open_source(ADATA).digest


def test_view_is_read():
    table = open_source(ADATA[5:9])
    assert (table.counts != ADATA.X[5:9]).nnz == 0
    assert table.cells == tuple(ADATA.obs_names[5:9])


def test_lazy_dense_table_is_read(tmp_path):
    path = tmp_path / "dense.zarr"
    make_spatial_data(with_matrix(ADATA, "dense")).write(path)
    assert (open_source(path).counts != ADATA.X).nnz == 0


def test_layer_is_read_in_place_of_x(tmp_path):
    adata = make_adata()
    adata.layers["counts"] = adata.X * 2
    for source in (adata, write_h5ad(tmp_path / "x.h5ad", adata)):
        assert (open_source(source, layer="counts").counts != ADATA.X * 2).nnz == 0


def test_coordinates_may_be_a_table_or_integers():
    adata = make_adata(5)
    adata.obsm["xy"] = pd.DataFrame({"x": range(5), "y": range(5)}, index=adata.obs_names)
    assert open_source(adata, spatial_key="xy").coordinates.tolist() == [[i, i] for i in range(5)]


def test_without_spatial_key_no_coordinates_are_read():
    adata = make_adata()
    del adata.obsm["spatial"]
    assert open_source(adata, spatial_key=None).coordinates is None


def test_constant_third_column_is_left_out():
    adata = make_adata(6)
    adata.obsm["spatial"] = np.column_stack([np.arange(6), np.arange(6), np.full(6, 2.5)])
    assert open_source(adata).coordinates.shape == (6, 2)


@pytest.mark.parametrize(
    ("coordinates", "message"),
    [
        (np.arange(18.0).reshape(6, 3), "choose the two that lie in the section"),
        (np.zeros((6, 1)), "give two columns"),
        (np.zeros((6, 4)), "give two columns"),
        (np.array([["a", "b"]] * 6), "does not hold numbers"),
    ],
)
def test_coordinates_that_are_no_plane_are_refused(coordinates, message):
    adata = make_adata(6)
    adata.obsm["spatial"] = coordinates
    with pytest.raises(InputError, match=message):
        open_source(adata)


@pytest.mark.parametrize("stored", [True, False])
def test_spatialdata_without_positions_takes_centroids(stored, tmp_path):
    source = make_spatial_data(ADATA, spatial=False)
    if stored:
        source.write(tmp_path / "x.zarr")
        source = tmp_path / "x.zarr"
    table = open_source(source, slice_key="section", slice_value="two")
    assert np.allclose(table.coordinates, ADATA.obsm["spatial"][1::2])


def test_cell_without_a_shape_is_refused():
    source = make_spatial_data(ADATA, spatial=False)
    source.shapes["cells"] = source.shapes["cells"].iloc[1:]
    with pytest.raises(InputError, match=r"1 cells of .* have no shape in 'cells'"):
        open_source(source)


def test_region_that_is_no_shapes_element_is_refused():
    source = make_spatial_data(ADATA, spatial=False)
    del source.shapes["cells"]
    with pytest.raises(InputError, match=r"put the cells' positions in obsm\['spatial'\]"):
        open_source(source)


def test_one_of_several_tables_has_to_be_chosen():
    source = make_spatial_data(ADATA)
    source.tables["first"] = source.tables["table"]
    source.tables["second"] = source.tables["table"]
    assert open_source(source).origin["table"] == "table"
    del source.tables["table"]
    with pytest.raises(InputError, match="choose one with table= from first, second"):
        open_source(source)
    assert open_source(source, table="second").origin["table"] == "second"
    with pytest.raises(InputError, match="no table 'third'"):
        open_source(source, table="third")


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_source(tmp_path / "absent.h5ad")


@pytest.mark.parametrize("kept", [100, 4000, -200])
def test_truncated_file_is_refused(kept, h5ad, tmp_path):
    path = tmp_path / "cut.h5ad"
    path.write_bytes(h5ad.read_bytes()[:kept])
    with pytest.raises(InputError, match="cut short or no h5ad file: copy or export it again"):
        open_source(path)


def test_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("cell,Gad1\na,1\n")
    with pytest.raises(InputError, match="no h5ad file"):
        open_source(path)


def test_hdf5_that_is_no_anndata_is_refused(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["matrix"] = [1]
    with pytest.raises(InputError, match="no obs and var"):
        open_source(tmp_path / "x.h5")


def test_damaged_column_is_refused(tmp_path):
    path = write_h5ad(tmp_path / "x.h5ad", ADATA)
    with h5py.File(path, "r+") as file:
        del file["X/indices"]
    with pytest.raises(InputError, match="damaged"):
        open_source(path)


def test_folder_without_a_table_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no table"):
        open_source(tmp_path)


def test_object_of_another_kind_is_refused():
    with pytest.raises(InputError, match="a DataFrame is no source"):
        open_source(pd.DataFrame())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": "counts"}, "has no layer 'counts': choose from none"),
        ({"spatial_key": "xy"}, r"no obsm\['xy'\].*spatial_key= \(there is spatial\)"),
        ({"slice_key": "sample", "slice_value": "a"}, "no obs column 'sample': choose slice_key from cell_type"),
        ({"slice_key": "section", "slice_value": "three"}, "section 'three': choose from one, two"),
        ({"slice_key": "section"}, "give both, or neither"),
        ({"table": "table"}, "only a SpatialData source has tables"),
    ],
)
def test_missing_part_is_named_with_what_there_is(settings, message, h5ad):
    for source in (ADATA, h5ad):
        with pytest.raises(InputError, match=message):
            open_source(source, **settings)


def test_table_without_x_is_refused():
    with pytest.raises(InputError, match="has no X: pass the layer"):
        open_source(AnnData(obs=ADATA.obs, obsm={"spatial": ADATA.obsm["spatial"]}))


def test_text_in_place_of_counts_is_refused():
    adata = make_adata(3)
    adata.X = np.full((3, 6), "1", dtype=object)
    with pytest.raises(InputError, match="give numbers"):
        open_source(adata)


def test_digest_of_a_file_is_that_of_its_bytes(h5ad, tmp_path):
    copy = tmp_path / "copy.h5ad"
    copy.write_bytes(h5ad.read_bytes())
    assert open_source(copy).digest == open_source(h5ad).digest
    assert len(open_source(copy).digest) == 64


@pytest.mark.parametrize("part", ["counts", "coordinates", "obs", "cells", "genes"])
def test_digest_of_arrays_in_memory_changes_with_every_part(part):
    adata = make_adata()
    if part == "counts":
        adata.X = sparse.csr_matrix(adata.X) * 2
    elif part == "coordinates":
        adata.obsm["spatial"] = adata.obsm["spatial"] + 1
    elif part == "obs":
        adata.obs["volume"] += 1
    elif part == "cells":
        adata.obs_names = [f"other{name}" for name in adata.obs_names]
    else:
        adata.var_names = [f"{name}x" for name in adata.var_names]
    assert open_source(adata).digest != open_source(ADATA).digest


@pytest.mark.parametrize("part", ["points", "shapes", "images", "transformation"])
def test_digest_of_a_spatialdata_in_memory_changes_with_its_elements(part):
    from spatialdata.transformations import Scale, set_transformation

    source, other = make_spatial_data(ADATA), make_spatial_data(ADATA)
    assert open_source(source).digest == open_source(other).digest
    if part == "points":
        del other.points["transcripts"]
    elif part == "shapes":
        other.shapes["cells"] = other.shapes["cells"].assign(radius=6.0)
    elif part == "images":
        other.images["dapi"] = other.images["dapi"] + 1
    else:
        set_transformation(other.shapes["cells"], Scale([3.0, 3.0], axes=("x", "y")), "global")
    assert open_source(source).digest != open_source(other).digest
