"""Output folders of vendors: recognised, read through spatialdata-io, and equal to what was written."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pandas as pd
import pytest
from support.slices import SYMBOLS, make_catalog
from support.vendors import CONTROLS, GENES, UNITS, write_cosmx, write_vendor, write_xenium

from lloki_atlas.errors import InputError
from lloki_atlas.stages.genes import map_symbols
from lloki_atlas.stages.ingest import ingest
from lloki_atlas.stages.prepare import prepare_slice
from lloki_atlas.stages.sources import open_source
from lloki_atlas.stages.vendors import find_vendor
from lloki_atlas.store.catalog import verify
from lloki_atlas.store.slices import SliceStore

VENDORS = ("Xenium", "MERSCOPE", "CosMx")
READ = {
    "Xenium": {"experiment.xenium", "cells.parquet", "cell_feature_matrix.h5"},
    "MERSCOPE": {"cell_by_gene.csv", "cell_metadata.csv"},
    "CosMx": {"Run1_exprMat_file.csv", "Run1_metadata_file.csv"},
}


@pytest.fixture(scope="module", params=VENDORS)
def vendor(request):
    return request.param


@pytest.fixture(scope="module")
def written(vendor, tmp_path_factory):
    return write_vendor(vendor, tmp_path_factory.mktemp("vendor") / "run" / "region_0")


@pytest.fixture
def copy(vendor, written, tmp_path):
    return shutil.copytree(written.folder, tmp_path / "copy")


def test_what_was_written_is_read(vendor, written):
    table = open_source(written.folder)
    assert table.cells == written.cells
    assert table.symbols == written.genes
    assert np.array_equal(table.counts.toarray(), written.counts)
    assert np.array_equal(table.coordinates, written.positions)
    assert table.unit == UNITS[vendor]
    assert table.origin["kind"] == vendor


def test_a_folder_becomes_a_slice(vendor, written, tmp_path):
    catalog = ingest(
        make_catalog(tmp_path / "atlas"),
        written.folder,
        slice_id="one",
        technology=vendor,
        organism="mouse",
        coordinate_unit=written.unit,
        um_per_unit=written.um_per_unit,
        reference_symbols=lambda: SYMBOLS,
    )
    assert verify(catalog) == []
    stored = SliceStore(catalog.path("slices", catalog.slice("one").objects["ingest"]))
    rows = [written.cells.index(cell) for cell in stored.obs().index]
    assert sorted(rows) == list(range(len(written.cells)))
    assert np.array_equal(stored.counts().toarray(), written.counts[rows])
    assert np.allclose(stored.coordinates(), written.positions[rows] * written.um_per_unit, rtol=1e-6)


def test_columns_of_the_cells_are_kept_and_those_of_the_folder_are_not(vendor, written):
    columns = set(open_source(written.folder).obs.columns)
    kept = {"Xenium": "transcript_counts", "MERSCOPE": "volume", "CosMx": "Mean.CD298/B2M"}[vendor]
    assert kept in columns
    assert not columns & {"region", "slide", "dataset_id", "cells_region", "fov_labels"}


@pytest.mark.parametrize("organism", ["mouse", "human"])
def test_controls_are_no_genes(vendor, organism):
    genes = map_symbols([*GENES, *CONTROLS[vendor]], organism=organism)
    assert genes.how[len(GENES) :] == ("control",) * len(CONTROLS[vendor])
    assert "control" not in genes.how[: len(GENES)]


def test_digest_is_of_the_files_that_are_read_wherever_they_lie(vendor, written, copy):
    before = open_source(written.folder).digest
    (copy / "notes.txt").write_text("mine")
    shutil.rmtree(copy / ("CellComposite" if vendor == "CosMx" else "images"), ignore_errors=True)
    for file in copy.iterdir():
        if file.is_file() and file.name not in READ[vendor]:
            file.unlink()
    assert open_source(copy).digest == before
    for name in READ[vendor]:
        original = (copy / name).read_bytes()
        (copy / name).write_bytes(original + b"\n")
        try:
            assert open_source(copy).digest != before
        except InputError:
            assert name == "cells.parquet"
        (copy / name).write_bytes(original)


def test_a_missing_file_is_named(vendor, copy):
    for name in READ[vendor]:
        (copy / name).rename(copy / "away")
        with pytest.raises(InputError, match=f"output of {vendor}, but {name} is missing"):
            open_source(copy)
        (copy / "away").rename(copy / name)


def test_a_folder_of_two_vendors_is_refused(vendor, copy):
    other = {"Xenium": "cell_by_gene.csv", "MERSCOPE": "cells.parquet", "CosMx": "experiment.xenium"}[vendor]
    (copy / other).touch()
    with pytest.raises(InputError, match="give a folder of one run"):
        find_vendor(copy)


def test_the_folder_above_is_refused_with_a_hint(written):
    with pytest.raises(InputError, match=r"has no table.*such as region_0 in it"):
        open_source(written.folder.parent)


def test_a_store_is_no_vendor(tmp_path):
    assert find_vendor(tmp_path) is None


def test_a_unit_is_the_vendors_own(vendor, written):
    table = open_source(written.folder)
    assert table.scale(written.unit, um_per_unit=written.um_per_unit) == UNITS[vendor]
    assert table.scale(written.unit) == UNITS[vendor]
    other = "micrometer" if vendor == "CosMx" else "millimeter"
    with pytest.raises(InputError, match=f"are in {written.unit}, not in {other}"):
        table.scale(other)


def test_the_size_of_a_pixel_may_be_another(tmp_path):
    table = open_source(write_cosmx(tmp_path / "run").folder)
    assert table.scale("px", um_per_unit=0.18) == ("pixel", 0.18)


def test_packed_tables_are_read(tmp_path):
    written = write_cosmx(tmp_path / "run", packed=True)
    table = open_source(written.folder)
    assert table.cells == written.cells
    assert np.array_equal(table.counts.toarray(), written.counts)


def test_two_runs_in_a_folder_are_refused(tmp_path):
    folder = write_cosmx(tmp_path / "run").folder
    shutil.copy(folder / "Run1_exprMat_file.csv", folder / "Run2_exprMat_file.csv")
    with pytest.raises(InputError, match=r"several CosMx runs \(Run1, Run2\)"):
        find_vendor(folder)


def test_intensities_of_proteins_are_left_out(tmp_path):
    written = write_xenium(tmp_path / "run", proteins=True)
    table = open_source(written.folder)
    assert table.symbols == written.genes
    assert np.array_equal(table.counts.toarray(), written.counts)


@pytest.mark.parametrize("vendor", ["MERSCOPE", "CosMx"])
def test_the_order_of_the_metadata_does_not_matter(vendor, tmp_path):
    written = write_vendor(vendor, tmp_path / "run")
    metadata = next(written.folder.glob("*metadata*"))
    text = pd.read_csv(metadata, dtype=str)
    text.iloc[::-1].to_csv(metadata, index=False)
    table = open_source(written.folder)
    order = [table.cells.index(cell) for cell in written.cells]
    assert np.array_equal(table.counts.toarray()[order], written.counts)
    assert np.array_equal(table.coordinates[order], written.positions)


def test_older_merscope_metadata_without_a_name_for_the_cells_are_read(tmp_path):
    written = write_vendor("MERSCOPE", tmp_path / "run")
    metadata = written.folder / "cell_metadata.csv"
    metadata.write_text(metadata.read_text().replace("EntityID,", ",", 1))
    assert open_source(written.folder).cells == written.cells


def test_spatialdata_io_is_asked_for_where_it_is_missing(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "spatialdata_io", None)
    with pytest.raises(InputError, match=r"pip install 'lloki-atlas\[vendors\]'"):
        open_source(written.folder)


def test_a_table_is_not_to_be_chosen_in_a_folder(written):
    with pytest.raises(InputError, match="only a SpatialData source has tables"):
        open_source(written.folder, table="table")


def test_pixels_of_cosmx_need_no_size(tmp_path):
    written = write_cosmx(tmp_path / "run")
    names = {"slice_id": "one", "technology": "CosMx", "organism": "mouse", "reference_symbols": SYMBOLS}
    source = open_source(written.folder)
    given = prepare_slice(source, coordinate_unit="pixel", um_per_unit=0.18, **names)
    usual = prepare_slice(source, coordinate_unit="pixel", **names)
    assert (given.metadata["um_per_unit"], usual.metadata["um_per_unit"]) == (0.18, 0.12028)
    with pytest.raises(InputError, match="are in pixel, not in micrometer: say pixel"):
        prepare_slice(source, coordinate_unit="micrometer", **names)
