"""Files that were cut, altered or deleted after a run: damage is named, others are unharmed, a run restores it."""

from __future__ import annotations

import hashlib
import shutil

import numpy as np
import pytest
from support.aftermath import reachable_files, stored_values
from support.atlases import SLICES, copied, run_here

from lloki_atlas.errors import FormatError, LlokiAtlasError
from lloki_atlas.query import nearest_cells, select_cells
from lloki_atlas.stages.pipeline import plan
from lloki_atlas.store.arrays import read_row_blocks
from lloki_atlas.store.catalog import open_catalog, verify
from lloki_atlas.store.objects import object_name
from lloki_atlas.store.records import split_name

HURT, OTHER = SLICES
N_DAMAGES = 120  # of all files and kinds of damage, chosen by a key


def half(data):
    return data[: len(data) // 2]


def flip(data):
    """One bit in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]


DAMAGES = {"cut": half, "emptied": lambda data: b"", "flipped": flip, "gone": None}


@pytest.fixture(scope="module")
def root(built, tmp_path_factory):
    """A finished atlas that every test leaves as it found it."""
    return copied(built, tmp_path_factory.mktemp("damage") / "atlas").root


def files_of(catalog, names):
    """(object's path, file) of objects and their receipts."""
    for name in sorted(names):
        path = catalog.path(*split_name(name))
        yield path, path.with_name(f"{path.name}.json")
        yield from ((path, file) for file in sorted(path.rglob("*")) if file.is_file())


class Damage:
    """A file as it is not while the block lasts."""

    def __init__(self, file, kind):
        self.file, self.change, self.data = file, DAMAGES[kind], file.read_bytes()

    def __enter__(self):
        if self.change is None:
            self.file.unlink()
        else:
            self.file.write_bytes(self.change(self.data))

    def __exit__(self, *_):
        self.file.write_bytes(self.data)


def answers(root, slice_id):
    """Digest of what a user gets of a slice."""
    cells = select_cells(open_catalog(root), slices=[slice_id])
    table = cells.to_anndata(counts=True)
    near = nearest_cells(open_catalog(root), cells, n_neighbors=3, slices=[slice_id]).to_dataframe()
    parts = [table.X.data, table.X.indices, table.X.indptr, *(table.obsm[name] for name in sorted(table.obsm))]
    whole = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts))
    for frame in (table.obs, table.var, near):
        whole.update(frame.to_csv().encode())
    return whole.hexdigest()


def test_verify_names_the_object_and_the_file_that_are_damaged_and_no_other(root):
    catalog = open_catalog(root)
    pairs = list(files_of(catalog, catalog.state.references()))
    choices = [(path, file, kind) for path, file in pairs for kind in DAMAGES if kind == "gone" or file.stat().st_size]
    chosen = np.random.default_rng([6, len(choices)]).permutation(len(choices))[:N_DAMAGES]
    for path, file, kind in (choices[i] for i in chosen):
        with Damage(file, kind):
            problems = verify(catalog)
        assert len(problems) == 1, (file, kind, problems)
        assert problems[0].startswith(f"{object_name(path)}: "), (file, kind, problems)
        if file.parent != path.parent:
            assert f"file {file.relative_to(path).as_posix()} " in problems[0], (file, kind, problems)
        else:
            assert file.name in problems[0] or "receipt" in problems[0], (file, kind, problems)
    assert verify(catalog) == []


def test_readers_of_another_slice_and_of_an_older_version_are_unharmed(root, ingested):
    catalog, older = open_catalog(root), open_catalog(root, version=3)
    own = catalog.slice(HURT).references() - {f"slices/{catalog.slice(HURT).objects['ingest']}"}
    expected, before = answers(root, OTHER), stored_values(older)
    assert before == stored_values(open_catalog(ingested))
    for _, file in files_of(catalog, own):
        file.rename(file.with_name(f"{file.name}.away"))
    try:
        assert answers(root, OTHER) == expected
        assert stored_values(older) == before
        with pytest.raises(LlokiAtlasError):
            answers(root, HURT)
    finally:
        for away in root.rglob("*.away"):
            away.rename(away.with_suffix(""))


def answer_or_message(root):
    try:
        return answers(root, HURT), ""
    except FormatError as error:
        return None, str(error)


@pytest.mark.parametrize("kind", ["cut", pytest.param("emptied", marks=pytest.mark.slow)])
def test_a_file_that_is_cut_short_is_an_error_that_names_its_object_or_does_not_matter(root, kind):
    catalog, expected = open_catalog(root), answers(root, HURT)
    n_errors = 0
    for path, file in files_of(catalog, catalog.slice(HURT).references()):
        if file.parent == path.parent or not file.stat().st_size:
            continue
        with Damage(file, kind):
            answer, message = answer_or_message(root)
        assert answer == expected or path.name in message, (file, answer, message)
        n_errors += bool(message)
    assert n_errors > 20


@pytest.mark.parametrize("name", ["X_fp", "X_lloki"])
def test_rows_of_a_finished_embedding_that_are_gone_are_no_missing_values(root, name):
    catalog = open_catalog(root)
    key = catalog.slice(HURT).objects["embed" if name == "X_fp" else "integrate"]
    with (
        Damage(catalog.path("embeddings", key) / name / "c" / "1" / "0", "gone"),
        pytest.raises(FormatError, match=f"{key}.zarr is damaged"),
    ):
        select_cells(catalog, slices=[HURT]).embedding(name)


def test_rows_of_a_finished_embedding_that_are_gone_are_not_trained_on(root):
    catalog = open_catalog(root)
    path = catalog.path("embeddings", catalog.slice(HURT).objects["embed"])
    with Damage(path / "X_fp" / "c" / "1" / "0", "gone"), pytest.raises(FormatError, match=f"{path.name} is damaged"):
        read_row_blocks(path, "X_fp", [(0, 4), (40, 44)])


@pytest.mark.parametrize(
    ("file", "kind", "message"),
    [
        ("codes", "flipped", "column 'obs/cell_type_coarse' of .*"),
        ("categories", "gone", "file tables/table/obs/cell_type_coarse/categories/c/0 of slices/"),
    ],
)
def test_labels_that_are_altered_are_an_error_that_names_their_slice(root, file, kind, message):
    catalog = open_catalog(root)
    path = catalog.path("slices", catalog.slice(HURT).objects["ingest"])
    column = path / "tables" / "table" / "obs" / "cell_type_coarse" / file / "c" / "0"
    with Damage(column, kind), pytest.raises(FormatError, match=f"{message}{path.name}"):
        select_cells(catalog, slices=[HURT]).to_dataframe()


@pytest.mark.parametrize("stage", ["tile", "reference", "propagate", "embed", "integrate"])
def test_a_run_restores_the_bytes_of_an_object_that_was_removed(built, tmp_path, stage):
    catalog = copied(built, tmp_path / "atlas")
    expected = reachable_files(catalog)
    key = catalog.slice(HURT).objects[stage]
    (path,) = (catalog.path(*split_name(name)) for name in catalog.slice(HURT).references() if name.endswith(f"/{key}"))
    shutil.rmtree(path)
    path.with_name(f"{path.name}.json").unlink()
    assert len(verify(catalog)) == 1
    after = run_here(plan(open_catalog(catalog.root, mode="r+")))
    assert reachable_files(after) == expected
    assert verify(after) == []
    assert after.state == catalog.state


def test_a_run_on_counts_that_are_cut_short_names_their_slice_and_commits_nothing(ingested, tmp_path):
    catalog = copied(ingested, tmp_path / "atlas")
    path = catalog.path("slices", catalog.slice(HURT).objects["ingest"])
    chunk = path / "tables" / "table" / "X" / "data" / "c" / "0"
    chunk.write_bytes(half(chunk.read_bytes()))
    with pytest.raises(FormatError, match=path.name):
        run_here(plan(catalog))
    assert open_catalog(catalog.root).version == catalog.version
