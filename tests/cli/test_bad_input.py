"""Input that cannot be used: one line that says how to mend it, the right exit code, and nothing changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.checkpoints import write_checkpoint
from support.commands import run_main, run_process
from support.folders import folder_digest
from support.queries import GAPPY, inner_client, source_of
from support.refusals import assert_refused, assert_refused_by, ingest_arguments
from support.slices import make_adata, write_h5ad

from lloki_atlas.config import canonical_json
from lloki_atlas.query import select_cells
from lloki_atlas.stages.status import status
from lloki_atlas.store.catalog import open_catalog


@pytest.fixture(scope="module")
def catalog(root, tmp_path_factory):
    """A copy of the atlas that no command of these tests may change."""
    return Path(shutil.copytree(root, tmp_path_factory.mktemp("bad") / "atlas"))


def with_value(adata, value):
    adata.X = adata.X.toarray()
    adata.X[2, 1] = value


def with_coordinate(adata, value):
    adata.obsm["spatial"][3, 1] = value


def without_counts(adata):
    adata.X = adata.X.toarray()
    adata.X[4] = 0


def rename(adata, **names):
    adata.var_names = [names.get(name.replace("-", "_"), name) for name in adata.var_names]


EDITS = {
    "no positions": (lambda a: a.obsm.pop("spatial"), ("obsm['spatial']", "spatial_key")),
    "a NaN position": (lambda a: with_coordinate(a, np.nan), ("NaN", "cell3", "remove")),
    "an infinite position": (lambda a: with_coordinate(a, np.inf), ("infinite", "cell3", "remove")),
    "one column of positions": (lambda a: a.obsm.update(spatial=a.obsm["spatial"][:, :1]), ("two columns",)),
    "a NaN count": (lambda a: with_value(a, np.nan), ("NaN", "replace")),
    "an infinite count": (lambda a: with_value(a, np.inf), ("infinite", "replace")),
    "a negative count": (lambda a: with_value(a, -2), ("negative", "raw counts")),
    "a fractional count": (lambda a: with_value(a, 0.5), ("whole numbers", "normal")),
    "one gene twice": (lambda a: rename(a, Gad2="Gad1"), ("duplicate gene symbols", "Gad1", "keep one")),
    "one cell name twice": (
        lambda a: setattr(a, "obs_names", ["cell0", *a.obs_names[:-1]]),
        ("duplicate cell names", "cell0", "unique"),
    ),
    "no shared gene": (
        lambda a: setattr(a, "var_names", [f"ENSMUSG0000000000{n}" for n in range(a.n_vars)]),
        ("no gene", "organism"),
    ),
    "a cell without counts": (without_counts, ("1 of 30 cells", "cell4", "keep")),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_source_is_refused_for(catalog, tmp_path, name):
    edit, words = EDITS[name]
    adata = make_adata()
    edit(adata)
    source = write_h5ad(tmp_path / "slice.h5ad", adata)
    assert_refused_by(catalog, ingest_arguments(catalog, source), "slice.h5ad", *words)


OPTION_CASES = {
    "an unknown unit": ({"unit": "parsec"}, (), ("parsec", "micrometer")),
    "pixel without its size": ({"unit": "pixel"}, (), ("pixel", "um_per_unit")),
    "a unit and another size": ({"um_per_unit": "3"}, (), ("um_per_unit", "leave")),
    "a size of zero": ({"unit": "pixel", "um_per_unit": "0"}, (), ("um_per_unit", "positive")),
    "a size of NaN": ({"unit": "pixel", "um_per_unit": "nan"}, (), ("um_per_unit", "positive")),
    "an unknown organism": ({"organism": "zebrafish"}, (), ("zebrafish", "mouse")),
    "a missing label column": ({"label_key": "subclass"}, (), ("subclass", "cell_type")),
    "a missing layer": ({"layer": "counts"}, (), ("layer 'counts'", "leave layer out")),
    "a missing key of positions": ({"spatial_key": "X_umap"}, (), ("X_umap", "there is spatial")),
    "a missing column of sections": ({"slice_key": "sample"}, (), ("sample", "section")),
    "a blank slice id": ({"slice_id": " "}, (), ("slice_id", "short text")),
    "a blank technology": ({"technology": ""}, (), ("technology", "short text")),
    "a missing gene map": ({"gene_map": "nowhere.tsv"}, (), ("nowhere.tsv", "tab-separated")),
}


@pytest.mark.parametrize("name", OPTION_CASES)
def test_an_option_is_refused_for(catalog, tmp_path, name):
    changed, extra, words = OPTION_CASES[name]
    source = write_h5ad(tmp_path / "slice.h5ad", make_adata())
    assert_refused_by(catalog, ingest_arguments(catalog, source, *extra, **changed), *words)


def truncated(folder):
    source = write_h5ad(folder / "cut.h5ad", make_adata())
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    return source


def random_bytes(folder):
    source = folder / "noise.h5ad"
    source.write_bytes(np.random.default_rng(0).bytes(5000))
    return source


def empty_file(folder):
    (folder / "empty.h5ad").touch()
    return folder / "empty.h5ad"


def other_hdf5(folder):
    with h5py.File(folder / "other.h5ad", "w") as file:
        file["values"] = np.arange(3)
    return folder / "other.h5ad"


def broken_matrix(folder):
    source = write_h5ad(folder / "broken.h5ad", make_adata())
    with h5py.File(source, "r+") as file:
        del file["X/indptr"]
    return source


def broken_obs(folder):
    source = write_h5ad(folder / "obs.h5ad", make_adata())
    with h5py.File(source, "r+") as file:
        del file["obs/cell_type/codes"]
    return source


def plain_folder(folder):
    (folder / "store").mkdir()
    (folder / "store" / "notes.txt").write_text("no store")
    return folder / "store"


def empty_table(folder):
    (folder / "half.zarr" / "tables" / "table").mkdir(parents=True)
    return folder / "half.zarr"


FILES = {
    "cut short": (truncated, ("cut short", "again")),
    "of random bytes": (random_bytes, ("no h5ad file", "again")),
    "of no bytes": (empty_file, ("no h5ad file", "again")),
    "of another kind": (other_hdf5, ("no obs and var", "write_h5ad")),
    "with half a matrix": (broken_matrix, ("broken.h5ad", "again")),
    "with half a column": (broken_obs, ("obs.h5ad", "again")),
    "that does not exist": (lambda folder: folder / "nowhere.h5ad", ("does not exist", "nowhere.h5ad")),
    "that is a folder": (plain_folder, ("has no table", "SpatialData")),
    "that is half a SpatialData store": (empty_table, ("half.zarr", "again")),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_refused(catalog, tmp_path, name):
    make, words = FILES[name]
    assert_refused_by(catalog, ingest_arguments(catalog, make(tmp_path)), *words)


def test_a_file_that_may_not_be_read_is_refused(catalog, tmp_path, monkeypatch):
    source = write_h5ad(tmp_path / "secret.h5ad", make_adata())
    source.chmod(0)
    if os.access(source, os.R_OK):  # root reads everything

        def refuse(path, *_):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(h5py, "File", refuse)
    assert_refused_by(catalog, ingest_arguments(catalog, source), "secret.h5ad", "ermission denied")


@pytest.mark.parametrize("name", ["a fractional count", "no positions"])
def test_a_process_of_its_own_says_one_line_too(catalog, tmp_path, name):
    edit, words = EDITS[name]
    adata = make_adata()
    edit(adata)
    source = write_h5ad(tmp_path / "slice.h5ad", adata)
    assert_refused_by(catalog, ingest_arguments(catalog, source), *words, run=run_process)


def test_a_slice_id_is_not_given_twice(catalog, root):
    command = ingest_arguments(catalog, root.parent / "sources" / "simmap_1.h5ad", slice_id=GAPPY)
    assert_refused_by(catalog, command, GAPPY, "other content", "another id")


def test_one_id_does_not_name_two_sources(catalog, tmp_path):
    sources = [write_h5ad(tmp_path / f"{name}.h5ad", make_adata()) for name in "ab"]
    assert_refused_by(catalog, ingest_arguments(catalog, sources[0], sources[1]), "--slice-id", "one by one")


def test_fractional_counts_are_taken_when_they_are_said_to_be(root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "atlas"))
    adata = make_adata()
    with_value(adata, 0.5)
    result = run_main(*ingest_arguments(copy, write_h5ad(tmp_path / "slice.h5ad", adata), "--accept-normalized"))
    assert (result.code, result.err) == (0, "")
    assert "new" in open_catalog(copy).state.slices


def test_empty_cells_are_kept_when_asked_for(root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "atlas"))
    adata = make_adata()
    without_counts(adata)
    result = run_main(*ingest_arguments(copy, write_h5ad(tmp_path / "slice.h5ad", adata), "--keep-empty-cells"))
    assert (result.code, result.err) == (0, "")
    assert open_catalog(copy).slice("new").n_cells == adata.n_obs


def test_empty_cells_are_listed_without_an_embedding(root):
    selection = select_cells(open_catalog(root), slices=[GAPPY])
    source = source_of(root, GAPPY)
    empty = source.obs_names[np.asarray(source.X.sum(axis=1)).ravel() == 0]
    without = selection.to_dataframe()["cell"][np.isnan(selection.embedding()).all(axis=1)]
    assert list(without) == list(empty)
    assert len(empty) == 1


def test_a_second_bad_source_leaves_the_first_one_in(root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "atlas"))
    sources = [write_h5ad(tmp_path / "good.h5ad", make_adata()), random_bytes(tmp_path)]
    command = ingest_arguments(copy, sources[0], sources[1], slice_id=None)
    with inner_client() as client:
        result = run_main(*command, "--cluster", client.scheduler.address, "--quiet")
    assert result.code == 3
    (line,) = result.err.splitlines()
    assert line.startswith("error: noise: ")
    assert "noise.h5ad cannot be read" in line
    assert "1 added" in result.out
    assert "1 refused" in result.out
    assert open_catalog(copy).version == open_catalog(root).version + 1


# create


def create_arguments(folder, root, **changed):
    options = {"--reference": root.parent / "sources" / "reference.h5ad", "--organism": "mouse", **changed}
    return ["create", folder / "new.atlas", *(part for pair in options.items() for part in pair)]


def assert_not_created(folder, root, *words, **changed):
    assert_refused(run_main(*create_arguments(folder, root, **changed)), *words)
    assert not (folder / "new.atlas").exists()


def test_a_checkpoint_with_a_wrong_shape_makes_no_catalog(root, tmp_path):
    def cut(state):
        state["encoder.embedding.weight"] = state["encoder.embedding.weight"][:, :-1]

    checkpoint = write_checkpoint(tmp_path / "checkpoint", genes=["GAD1", "GAD2"], edit=cut)
    assert_not_created(tmp_path, root, "encoder.embedding.weight", "shape", **{"--embedder": f"scgpt:{checkpoint}"})


def test_a_missing_checkpoint_makes_no_catalog(root, tmp_path):
    assert_not_created(tmp_path, root, "nowhere", **{"--embedder": f"scgpt:{tmp_path / 'nowhere'}"})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"--embedder": "bert"}, ("bert", "reference")),
        ({"--embedder": "scgpt"}, ("scgpt:DIR",)),
        ({"--reference": "nowhere.h5ad"}, ("nowhere.h5ad", "does not exist")),
        ({"--organism": "rat"}, ("rat", "mouse")),
        ({"--label-key": "subclass"}, ("subclass", "cell_type")),
        ({"--settings": "nowhere.toml"}, ("nowhere.toml",)),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else None,
)
def test_create_refuses(root, tmp_path, changed, words):
    assert_not_created(tmp_path, root, *words, **changed)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[tile]\ntile_cells = 0", ("tile_cells", "at least 1")),
        ("[tile]\ntile_cells = 'many'", ("tile_cells", "int")),
        ("[tiles]\ntile_cells = 3", ("tiles", "tile")),
        ("tile = 3", ("tile",)),
        ("[tile", ("TOML",)),
    ],
)
def test_create_refuses_settings(root, tmp_path, text, words):
    (tmp_path / "settings.toml").write_text(text)
    assert_not_created(tmp_path, root, *words, **{"--settings": tmp_path / "settings.toml"})


def test_create_refuses_a_folder_that_is_taken(root, tmp_path):
    (tmp_path / "new.atlas").mkdir()
    (tmp_path / "new.atlas" / "mine.txt").write_text("mine")
    assert_refused_by(tmp_path / "new.atlas", create_arguments(tmp_path, root), "not empty", "choose")


# manifests

GOOD = {
    "atlas": '[atlas]\nname = "mine"\n',
    "reference": '[reference]\nsource = "r.h5ad"\norganism = "mouse"\n',
    "slices": '[[slices]]\nsource = "s.h5ad"\ntechnology = "T"\norganism = "mouse"\ncoordinate_unit = "micrometer"\n',
}
MANIFESTS = {
    "that is no TOML": ({"atlas": "[atlas\n"}, ("TOML",)),
    "without a name": ({"atlas": "[atlas]\n"}, ("no name",)),
    "whose atlas is no table": ({"atlas": "atlas = 'mine'\n"}, ("atlas",)),
    "whose data is a number": ({"atlas": '[atlas]\nname = "mine"\ndata = 3\n'}, ("data",)),
    "without slices": ({"slices": ""}, ("[[slices]]",)),
    "without a reference": ({"reference": ""}, ("[reference]",)),
    "with an unknown section": ({"slices": GOOD["slices"] + "[extra]\n"}, ("extra",)),
    "with an unknown key": ({"slices": GOOD["slices"] + "color = 1\n"}, ("color", "number 1")),
    "that lacks a key": ({"slices": '[[slices]]\nsource = "s.h5ad"\n'}, ("technology", "number 1")),
    "whose slices are one table": ({"slices": GOOD["slices"].replace("[[slices]]", "[slices]")}, ("slices",)),
    "whose unit size is text": ({"slices": GOOD["slices"] + 'um_per_unit = "one"\n'}, ("um_per_unit",)),
    "whose sources are missing": ({}, ("s.h5ad", "does not exist")),
    "with unknown settings": ({"slices": GOOD["slices"] + "[settings.tile]\nsize = 1\n"}, ("size", "tile_cells")),
    "whose simulation is text": ({"slices": '[simulate]\nn_cells = "many"\n', "reference": ""}, ("n_cells",)),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_build_refuses_a_manifest(tmp_path, name):
    changed, words = MANIFESTS[name]
    manifest = tmp_path / "atlas.toml"
    manifest.write_text("".join({**GOOD, **changed}.values()))
    before = folder_digest(tmp_path)
    assert_refused(run_main("build", manifest, "--root", tmp_path / "new.atlas", "--quiet"), *words)
    assert folder_digest(tmp_path) == before


def test_build_refuses_a_missing_manifest(tmp_path):
    assert_refused(run_main("build", tmp_path / "nowhere.toml", "--quiet"), "nowhere.toml")


def test_build_names_the_variable_that_is_not_set(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_FOLDER", raising=False)
    manifest = tmp_path / "atlas.toml"
    atlas = '[atlas]\nname = "mine"\ndata = "${NO_SUCH_FOLDER}"\n'
    manifest.write_text(atlas + GOOD["reference"] + GOOD["slices"])
    assert_refused(run_main("build", manifest, "--root", tmp_path / "new.atlas"), "NO_SUCH_FOLDER", "set it")


def test_build_refuses_other_settings_for_an_atlas_that_is_there(catalog, root):
    manifest = root.parent / "sources" / "atlas.toml"
    assert_refused_by(catalog, ["build", manifest, "--root", catalog, "--quiet"], "other settings", "--root")


def test_simulate_refuses_too_few_cells(tmp_path):
    assert_refused(run_main("simulate", tmp_path / "new", "--cells", "7"), "n_cells", "ten cells")


# questions

CELL = f"{GAPPY}_0000001"
QUESTIONS = {
    "an unknown slice": (["--slice", "simish_2", "--cell", CELL], ("simish_2", GAPPY)),
    "a name of two lines": (["--slice", "two\nlines", "--cell", CELL], ("two lines",)),
    "an unknown cell": (["--slice", GAPPY, "--cell", "nobody"], ("nobody", GAPPY)),
    "an unknown column": (["--slice", GAPPY, "--cell", CELL, "--where", "subclass == 'L5'"], ("subclass", "cell_type")),
    "no comparison": (["--slice", GAPPY, "--cell", CELL, "--where", "cell ="], ("cannot read", "cell =")),
    "a call": (["--slice", GAPPY, "--cell", CELL, "--where", "open('x')"], ("open('x')", "use columns")),
    "a filter of two lines": (["--slice", GAPPY, "--cell", CELL, "--where", "x\n<<\ny"], ("x << y",)),
    "an empty filter": (["--slice", GAPPY, "--cell", CELL, "--where", ""], ("empty", "leave it out")),
    "text compared with a number": (["--slice", GAPPY, "--cell", CELL, "--where", "cell < 3"], ("different types",)),
    "a filter that leaves nothing": (["--slice", GAPPY, "--cell", CELL, "--where", "x < -1e9"], ("loosen",)),
    "an unknown embedding": (["--slice", GAPPY, "--cell", CELL, "--embedding", "X_pca"], ("X_pca", "X_lloki")),
    "no neighbour": (["--slice", GAPPY, "--cell", CELL, "-k", "0"], ("n_neighbors", "at least 1")),
    "too many neighbours": (["--slice", GAPPY, "--cell", CELL, "-k", "99999999999"], ("n_neighbors", "at most")),
    "an unknown version": (["--slice", GAPPY, "--cell", CELL, "--version", "99"], ("99", "1 to 6")),
    "a version without embeddings": (["--slice", GAPPY, "--cell", CELL, "--version", "5"], ("no embedding", "run")),
    "an empty cell": (["--slice", GAPPY, "--cell", f"{GAPPY}_0000005"], ("no embedding",)),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_query_is_refused_for(catalog, name):
    options, words = QUESTIONS[name]
    assert_refused_by(catalog, ["query", catalog, *options], *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["simish_2", "out.h5ad"], ("simish_2", GAPPY)),
        ([GAPPY, "out.csv"], (".csv", ".h5ad")),
        ([GAPPY, "nowhere/out.h5ad"], ("nowhere", "make it")),
        ([GAPPY, "taken.h5ad"], ("exists", "another name")),
        ([GAPPY, "out.h5ad", "--where", "subclass == 1"], ("subclass",)),
    ],
    ids=["slice", "ending", "folder", "taken", "column"],
)
def test_export_is_refused_for_a_wrong(catalog, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.h5ad").write_text("mine")
    before = folder_digest(tmp_path)
    assert_refused_by(catalog, ["export", catalog, *options], *words)
    assert folder_digest(tmp_path) == before


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["plan", "--until", "paint"], ("paint", "integrate")),
        (["run", "--until", "paint", "--quiet"], ("paint", "integrate")),
        (["run", "--slices", "simish_2", "--quiet"], ("simish_2", GAPPY)),
        (["train", "--slices", "simish_2", "--quiet"], ("simish_2", GAPPY)),
        (["status", "--version", "0"], ("version 0", "1 to 6")),
        (["verify", "--version", "7"], ("version 7", "1 to 6")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_a_command_is_refused_for(catalog, command, words):
    assert_refused_by(catalog, [command[0], catalog, *command[1:]], *words)


# catalogs


@pytest.mark.parametrize("command", ["status", "log", "verify", "plan", "run", "train"])
def test_a_folder_that_is_no_catalog_is_refused_by(tmp_path, command):
    (tmp_path / "notes.txt").write_text("no catalog")
    assert_refused_by(tmp_path, [command, tmp_path], "no catalog", "lloki-atlas create")


def test_an_address_of_an_unknown_kind_is_no_catalog():
    assert_refused(run_main("status", "ftp://bucket/atlas"), "ftp:", "folder")


def test_a_catalog_of_a_newer_format_is_refused(root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "atlas"))
    (copy / "catalog.json").write_bytes(canonical_json({"format_version": 99, "id": "later"}))
    assert_refused_by(copy, ["log", copy], "format 99", "update", code=4, run=run_process)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format_version": "one"}', b"\xff"])
def test_a_damaged_catalog_file_is_refused(root, tmp_path, content):
    copy = Path(shutil.copytree(root, tmp_path / "atlas"))
    (copy / "catalog.json").write_bytes(content)
    assert_refused_by(copy, ["status", copy], "catalog.json", "restore", code=4)


def test_a_damaged_version_record_is_refused(root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "atlas"))
    record = copy / "versions" / "00000006.json"
    record.write_bytes(record.read_bytes().replace(b"SimMAP", b"SimMAT"))
    assert_refused_by(copy, ["status", copy], "00000006.json", "restore", code=4)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["slices", "embeddings", "graphs", "models", "references"])
def test_verify_finds_a_flipped_byte_in(root, tmp_path, kind):
    copy = Path(shutil.copytree(root, tmp_path / "atlas"))
    victim = max((path for path in (copy / kind).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    flip(victim)
    result = run_main("verify", copy, "--deep", "--json")
    assert (result.code, result.err) == (4, "")
    assert len(result.json["problems"]) == 1
    assert victim.name in result.json["problems"][0]


def test_verify_of_a_process_ends_with_code_4(root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "atlas"))
    (victim, *_) = sorted((copy / "embeddings").rglob("c/*/*")) or sorted((copy / "embeddings").rglob("c/*"))
    flip(victim)
    result = run_process("verify", copy, "--deep")
    assert result.code == 4
    assert result.err == ""
    assert len(result.out.splitlines()) == 1


# usage and clusters


@pytest.mark.parametrize(
    "command",
    [
        ["query", "atlas"],
        ["query", "atlas", "--slice", "one"],
        ["ingest", "atlas", "one.h5ad"],
        ["create", "atlas"],
        ["export", "atlas"],
        ["status"],
        ["status", "atlas", "--version", "first"],
        ["paint"],
        ["log", "atlas", "--colour"],
        ["run", "atlas", "--workers", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_code_2(command):
    result = run_main(*command)
    assert result.code == 2
    assert result.out == ""
    assert "Traceback" not in result.err


@pytest.mark.parametrize("command", ["run", "train"])
def test_a_scheduler_that_does_not_answer_ends_with_code_5(catalog, monkeypatch, command):
    import distributed

    client = distributed.Client
    # the connection is refused at once; the wait is for a scheduler that is still starting
    monkeypatch.setattr(distributed, "Client", lambda address, **_: client(address, timeout="500ms"))
    command = [command, catalog, "--cluster", "tcp://127.0.0.1:1", "--quiet"]
    assert_refused_by(catalog, command, "tcp://127.0.0.1:1", "--cluster local", code=5)


def test_ctrl_c_ends_with_code_130_and_a_line(catalog, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lloki_atlas.store.catalog.open_catalog", interrupt)
    result = run_main("status", catalog)
    assert result.code == 130
    assert "the same command continues" in result.err
    assert "Traceback" not in result.err


def test_a_full_disk_is_one_line(catalog, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("lloki_atlas.store.catalog.open_catalog", full)
    assert_refused(run_main("status", catalog), "disk is full", "free some space")


def test_nothing_of_all_this_changed_the_atlas(catalog, root):
    assert folder_digest(catalog) == folder_digest(root)
    assert status(open_catalog(catalog))["version"] == 6
