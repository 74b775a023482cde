"""Good sources with bytes flipped, cut, dropped or swapped: a whole slice, or one of our errors and nothing changed."""

from __future__ import annotations

import contextlib
import io
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.folders import folder_digest
from support.slices import SYMBOLS, make_adata, make_catalog, make_spatial_data, with_matrix, write_h5ad
from support.vendors import UNITS, write_vendor

from lloki_atlas.errors import LlokiAtlasError
from lloki_atlas.stages.ingest import ingest
from lloki_atlas.store.catalog import open_catalog, verify

KINDS = ("h5ad", "dense", "store", "shapes", "Xenium", "MERSCOPE", "CosMx")
SILENT = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
NOT_READ = b"not read"

# an edit: what is done, to which file, where in it, and a byte; fractions, so that every one fits every file
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "flip", "cut", "zero", "insert", "delete", "swap"]),
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 255),
    ),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with an empty catalog and one good source of each kind."""
    folder = tmp_path_factory.mktemp("mutations")
    catalog = make_catalog(folder / "catalog")
    # a refused slice may leave this folder behind, empty
    (catalog.root / "staging").mkdir(exist_ok=True)
    write_h5ad(folder / "h5ad.h5ad", make_adata())
    write_h5ad(folder / "dense.h5ad", with_matrix(make_adata(), "dense"), compression="gzip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_spatial_data(make_adata()).write(folder / "store.zarr")
        make_spatial_data(make_adata(), spatial=False).write(folder / "shapes.zarr")
    for vendor in UNITS:
        write_vendor(vendor, folder / vendor)
    return folder


def apply(source: Path, edits: list[tuple[str, float, float, int]]) -> None:
    """Damage a source."""
    for what, which, where, byte in edits:
        files = sorted(file for file in source.rglob("*") if file.is_file()) if source.is_dir() else [source]
        files = [file for file in files if file.exists() and file.read_bytes() not in (b"", NOT_READ)]
        if not files:
            return
        file = files[int(which * len(files))]
        content = bytearray(file.read_bytes())
        place = int(where * len(content))
        if what == "delete":
            file.unlink()
            continue
        if what == "swap":
            other = files[int(where * len(files))]
            file_bytes, other_bytes = file.read_bytes(), other.read_bytes()
            file.write_bytes(other_bytes)
            other.write_bytes(file_bytes)
            continue
        if what == "flip":
            content[place] ^= byte
        elif what == "cut":
            del content[place:]
        elif what == "zero":
            content[place : place + 8] = bytes(len(content[place : place + 8]))
        else:
            content[place:place] = bytes([byte])
        file.write_bytes(content)


def ingested(root: Path, source: Path, kind: str) -> str | None:
    """Ingest a source; what one of our errors says, if there was one."""
    unit, size = UNITS.get(kind, ("micrometer", None))
    try:
        ingest(
            open_catalog(root, mode="r+"),
            source,
            slice_id="damaged",
            technology="T",
            organism="mouse",
            coordinate_unit=unit,
            um_per_unit=size,
            reference_symbols=lambda: SYMBOLS,
        )
    except LlokiAtlasError as error:
        return str(error)
    return None


def check(workplace: Path, kind: str, edits: list[tuple[str, float, float, int]]) -> None:
    """Ingest a damaged copy; anything but one of our errors is a failure, and so is a word to the user besides."""
    work = workplace / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    good = next(workplace.glob(f"{kind}*"))
    source = work / good.name
    (shutil.copytree if good.is_dir() else shutil.copy)(good, source)
    apply(source, edits)
    root = Path(shutil.copytree(workplace / "catalog", work / "catalog"))
    before = folder_digest(root)
    said = io.StringIO()
    with (
        warnings.catch_warnings(record=True) as caught,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        warnings.resetwarnings()
        refusal = ingested(root, source, kind)
    if refusal is None:
        assert verify(open_catalog(root)) == []
        assert not list((root / "staging").iterdir())
    else:
        assert folder_digest(root) == before
        assert "\n" not in refusal
        assert len(refusal) < 600
    assert said.getvalue() == ""
    assert [str(one.message) for one in caught if not issubclass(one.category, SILENT)] == []


def mutations(n_examples: int) -> Callable:
    return settings(
        max_examples=n_examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_source_becomes_a_slice(workplace, kind):
    check(workplace, kind, [])
    assert open_catalog(workplace / "work" / "catalog").state.slices


@pytest.mark.parametrize("kind", KINDS)
@mutations(10)
@given(edits=EDITS)
def test_a_damaged_source_becomes_a_slice_or_is_refused(workplace, kind, edits):
    check(workplace, kind, edits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@mutations(400)
@given(edits=EDITS)
def test_many_damaged_sources_become_slices_or_are_refused(workplace, kind, edits):
    check(workplace, kind, edits)
