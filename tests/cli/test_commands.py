"""Every command: what its help mentions, what it prints for people and for machines, and what it leaves behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import anndata
import numpy as np
import pytest
import typer
import xarray
from support.commands import run_main, run_process
from support.folders import folder_digest
from support.queries import GAPPY, IDS, N_CELLS, inner_client, source_of
from support.slices import make_adata, write_h5ad

import lloki_atlas
from lloki_atlas.cli.main import app
from lloki_atlas.query import nearest_cells, select_cells
from lloki_atlas.store.catalog import open_catalog

STAGES = ["ingest", "tile", "reference", "propagate", "embed", "integrate"]
OPTIONS = {
    "demo": ["--cells", "--workers", "--quiet"],
    "simulate": ["--cells", "--slices", "--seed", "--json"],
    "build": ["--root", "--workers", "--cluster", "--quiet", "--json"],
    "create": ["--reference", "--organism", "--embedder", "--label-key", "--settings", "--json"],
    "ingest": [
        *("--technology", "--organism", "--unit", "--um-per-unit", "--slice-id", "--slice-key", "--label-key"),
        *("--layer", "--table", "--spatial-key", "--keep-empty-cells", "--accept-normalized", "--gene-map", "--json"),
        *("--replace", "--all-or-nothing", "--workers", "--cluster", "--quiet"),
    ],
    "configure": ["--set", "--json"],
    "plan": ["--until", "--json"],
    "run": ["--until", "--slices", "--workers", "--gpus", "--device-memory", "--cluster", "--quiet", "--json"],
    "train": [
        "--slices",
        "--label-key",
        "--seed",
        "--search",
        "--workers",
        "--gpus",
        "--device-memory",
        "--cluster",
        "--quiet",
        "--json",
    ],
    "adapt": [
        *("--technology", "--slices", "--seed", "--workers", "--gpus", "--device-memory", "--cluster", "--quiet"),
        "--json",
    ],
    "pretrain": [
        "--organism",
        "--panels",
        "--layers",
        "--width",
        "--minutes",
        "--threads",
        "--device",
        "--quiet",
        "--json",
    ],
    "status": ["--version", "--json"],
    "log": ["--json"],
    "verify": ["--deep", "--version", "--json"],
    "remove": ["--json"],
    "rollback": ["--to", "--json"],
    "gc": ["--keep-versions", "--grace-hours", "--dry-run", "--json"],
    "export-version": ["--version", "--json"],
    "import-version": ["--slices", "--version", "--json"],
    "query": [
        *("--slice", "--cell", "--n-neighbors", "-k", "--where", "--exclude-own-slice", "--embedding"),
        *("--version", "--json"),
    ],
    "export": ["--where", "--version"],
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_mentions_every_option(monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "200")
    result = run_main(command, "--help")
    assert (result.code, result.err) == (0, "")
    for option in OPTIONS[command]:
        assert option in result.out


def test_help_lists_every_command(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = run_main("--help")
    assert result.code == 0
    for command in OPTIONS:
        assert f" {command} " in result.out


def test_without_a_command_there_is_help():
    result = run_main()
    assert "query" in result.out + result.err
    assert "Traceback" not in result.err


def test_the_version_is_that_of_the_package():
    result = run_main("--version")
    assert (result.code, result.out, result.err) == (0, f"{lloki_atlas.__version__}\n", "")


# from nothing to an atlas, by commands alone


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    """Results of the commands that make an atlas of two slices, by name; and its folder, `root`."""
    folder = tmp_path_factory.mktemp("journey")
    sources, root = folder / "sources", folder / "atlas"
    settings = folder / "settings.toml"
    settings.write_text("[autoencoder]\nn_epochs = 1\nchunk_cells = 128\n[tile]\ntile_cells = 32\n")
    organism, reference = ["--organism", "mouse"], ["--reference", sources / "reference.h5ad"]
    options = [*organism, "--unit", "micrometer", "--label-key", "cell_type_coarse", "--json"]
    steps = {
        "simulate": ["simulate", sources, "--cells", 80, "--slices", 2, "--seed", 3, "--json"],
        "create": ["create", root, *reference, *organism, "--settings", settings, "--json"],
        "ingest": ["ingest", root, sources / "simfish_1.h5ad", "--technology", "SimFISH", *options],
        "ingest another": ["ingest", root, sources / "simmap_1.h5ad", "--technology", "SimMAP", *options],
        "ingest it again": ["ingest", root, sources / "simmap_1.h5ad", "--technology", "SimMAP", *options],
        "plan": ["plan", root, "--json"],
        "plan until tile": ["plan", root, "--until", "tile", "--json"],
    }
    results = {name: run_main(*arguments) for name, arguments in steps.items()}
    with inner_client() as client:
        address = client.scheduler.address
        results["run"] = run_main("run", root, "--cluster", address, "--quiet", "--json")
        results["train"] = run_main("train", root, "--seed", 5, "--cluster", address, "--quiet", "--json")
    results["plan again"] = run_main("plan", root, "--json")
    results["run again"] = run_main("run", root, "--quiet", "--json")
    results["status"] = run_main("status", root, "--json")
    return results, root


@pytest.mark.parametrize(
    "step",
    [
        *("simulate", "create", "ingest", "ingest another", "ingest it again", "plan", "plan until tile", "run"),
        *("train", "plan again", "run again", "status"),
    ],
)
def test_a_step_ends_well_and_prints_one_document(journey, step):
    result = journey[0][step]
    assert result.err == ""
    assert result.code == 0
    assert isinstance(result.json, dict)


def test_simulate_says_where_the_manifest_is(journey):
    manifest = Path(journey[0]["simulate"].json["manifest"])
    assert manifest.name == "atlas.toml"
    assert manifest.is_file()


def test_create_says_where_the_catalog_is(journey):
    assert journey[0]["create"].json == {"root": str(journey[1]), "version": 1}


def test_ingest_says_version_and_slices(journey):
    assert journey[0]["ingest"].json == {"version": 2, "slices": ["simfish_1"]}
    assert journey[0]["ingest another"].json == {"version": 3, "slices": ["simmap_1"]}


def test_ingesting_again_makes_no_version(journey):
    assert journey[0]["ingest it again"].json == {"version": 3, "slices": ["simmap_1"]}


def test_plan_says_tasks_cells_and_memory_of_each_stage(journey):
    summary = journey[0]["plan"].json
    assert set(summary) == {"tasks", "projected_memory", "writes", "stages"}
    assert set(summary["stages"]) == {"tile", "reference", "propagate", "embed", "train", "integrate"}
    for part in summary["stages"].values():
        assert set(part) == {"tasks", "cells", "projected_memory", "writes"}
        assert part["tasks"] > 0
    assert summary["tasks"] == sum(part["tasks"] for part in summary["stages"].values())
    assert summary["stages"]["integrate"]["cells"] == 80


def test_plan_stops_at_a_stage(journey):
    assert set(journey[0]["plan until tile"].json["stages"]) == {"tile"}


def test_run_says_the_version_with_the_results(journey):
    assert journey[0]["run"].json == {"version": 4}


def test_train_makes_another_model(journey):
    version = journey[0]["train"].json["version"]
    before, after = (open_catalog(journey[1], version=number) for number in (4, version))
    assert version > 4
    assert before.state.models["autoencoder"] != after.state.models["autoencoder"]
    assert after.state.config["autoencoder"]["random_state"] == 5


def test_after_a_run_there_is_nothing_to_plan(journey):
    assert journey[0]["plan again"].json == {
        "tasks": 0,
        "projected_memory": 0,
        "writes": 0,
        "stages": {},
    }


def test_running_again_makes_no_version(journey):
    assert journey[0]["run again"].json == journey[0]["train"].json


def test_after_a_run_every_stage_is_done(journey):
    for part in journey[0]["status"].json["slices"]:
        assert part["stages"] == dict.fromkeys(STAGES, "done")


def test_build_goes_from_a_manifest_to_an_atlas(tmp_path):
    manifest = tmp_path / "atlas.toml"
    settings = "[settings.autoencoder]\nn_epochs = 1\nchunk_cells = 128\n"
    manifest.write_text(f'[atlas]\nname = "made"\n[simulate]\nn_cells = 100\nn_slices = 2\n{settings}')
    root = tmp_path / "made.atlas"
    with inner_client() as client:
        command = ["build", manifest, "--root", root, "--cluster", client.scheduler.address, "--quiet", "--json"]
        first = run_main(*command)
    again = run_main("build", manifest, "--root", root, "--quiet")
    assert (first.code, first.err) == (0, "")
    assert first.json["root"] == str(root)
    assert first.json["n_cells"] == 100
    assert [part["slice_id"] for part in first.json["slices"]] == ["simfish_1", "simmap_1"]
    assert (again.code, again.out) == (0, f"{root}: version {first.json['version']}, 100 cells in 2 slices\n")


INGEST = ["--organism", "mouse", "--unit", "um", "--quiet", "--json"]


@pytest.fixture
def address():
    """Of a scheduler in this process."""
    with inner_client() as client:
        yield client.scheduler.address


def test_ingest_takes_several_sources_in_one_version(root, tmp_path, address):
    catalog = run_main_create(tmp_path, root)
    sources = [root.parent / "sources" / f"{slice_id}.h5ad" for slice_id in ("simfish_1", "simmap_1")]
    result = run_main("ingest", catalog, *sources, "--technology", "SimFISH", *INGEST, "--cluster", address)
    assert (result.code, result.err) == (0, "")
    names = ["simfish_1", "simmap_1"]
    expected = {"version": 2, "slices": names, "added": names, "replaced": [], "unchanged": [], "refused": {}}
    assert result.json == expected


def test_ingest_lists_bad_sources_and_keeps_the_good_ones(root, tmp_path, address):
    catalog = run_main_create(tmp_path, root)
    folder = tmp_path / "sources"
    folder.mkdir()
    shutil.copy(root.parent / "sources" / "simfish_1.h5ad", folder)
    (folder / "bad.h5ad").write_text("no HDF5")
    command = ["ingest", catalog, folder, "--technology", "SimFISH", *INGEST, "--cluster", address]
    result = run_main(*command)
    assert result.code == 3
    (line,) = result.err.splitlines()
    assert line.startswith("error: bad: ")
    assert "bad.h5ad cannot be read" in line
    assert (result.json["slices"], list(result.json["refused"])) == (["simfish_1"], ["bad"])
    whole = run_main(*command, "--all-or-nothing")
    assert (whole.code, whole.out) == (3, "")
    assert whole.err.startswith("error: nothing was ingested, 'bad' cannot be: ")
    assert list(open_catalog(catalog).state.slices) == ["simfish_1"]


def test_ingest_takes_a_sheet(root, tmp_path):
    catalog = run_main_create(tmp_path, root)
    sheet = tmp_path / "sheet.csv"
    sheet.write_text(f"source,slice_id,technology\n{root.parent / 'sources' / 'simfish_1.h5ad'},first,SimFISH\n")
    result = run_main("ingest", catalog, sheet, *INGEST)
    assert (result.code, result.err) == (0, "")
    assert open_catalog(catalog).slice("first").technology == "SimFISH"


def test_ingest_replaces_a_slice_when_it_is_told(root, tmp_path):
    catalog = Path(shutil.copytree(root, tmp_path / "atlas"))
    source = write_h5ad(tmp_path / "new.h5ad", make_adata())
    command = ["ingest", catalog, source, "--technology", "MERFISH", *INGEST, "--slice-id", "simmap_1"]
    assert run_main(*command).code == 3
    assert run_main(*command, "--no-replace").code == 3
    result = run_main(*command, "--replace")
    assert (result.code, result.err) == (0, "")
    (part,) = (part for part in run_main("status", catalog, "--json").json["slices"] if part["slice_id"] == "simmap_1")
    assert (part["n_cells"], part["stages"]["embed"], part["reasons"]["embed"]) == (30, "missing", "not run yet")


def test_ingest_makes_a_slice_of_each_value_of_a_column(root, tmp_path, address):
    catalog = run_main_create(tmp_path, root)
    source = write_h5ad(tmp_path / "sections.h5ad", make_adata())
    options = ["--technology", "MERFISH", *INGEST, "--slice-key", "section", "--cluster", address]
    result = run_main("ingest", catalog, source, *options, "--slice-id", "part")
    assert (result.code, result.err) == (0, "")
    assert result.json["slices"] == ["part_one", "part_two"]
    assert [record.n_cells for record in open_catalog(catalog).state.slices.values()] == [15, 15]


def test_configure_says_the_version_and_status_says_why(root, tmp_path):
    catalog = Path(shutil.copytree(root, tmp_path / "atlas"))
    result = run_main("configure", catalog, "--set", "propagation.alpha=0.5", "--json")
    assert (result.code, result.err, result.json) == (0, "", {"version": 7})
    reasons = run_main("status", catalog, "--json").json["slices"][0]["reasons"]
    assert reasons["embed"] == "propagation.alpha changed from 1.0 to 0.5"
    assert {"embed", "integrate"} <= set(run_main("plan", catalog, "--json").json["stages"])
    assert "propagate" not in run_main("plan", catalog, "--json").json["stages"]


def test_configure_refuses_what_cannot_change(root):
    result = run_main("configure", root, "--set", "tile.tile_cells=7")
    assert (result.code, result.out) == (3, "")
    assert "tile.tile_cells of" in result.err


def run_main_create(folder, root):
    catalog, reference = folder / "new.atlas", root.parent / "sources" / "reference.h5ad"
    assert run_main("create", catalog, "--reference", reference, "--organism", "mouse").code == 0
    return catalog


# what is there


def test_status_says_what_the_catalog_holds(root):
    state = run_main("status", root, "--json").json
    models = {"autoencoder", "autoencoder_status", "autoencoder_reason", "tokens"}
    assert set(state) == {"version", "n_cells", "slices", *models}
    assert (state["version"], state["n_cells"]) == (6, 4 * N_CELLS)
    assert [part["slice_id"] for part in state["slices"]] == list(IDS)
    for part in state["slices"]:
        assert {"slice_id", "technology", "n_cells", "n_genes", "stages", "autoencoder", "token"} <= set(part)
        assert list(part["stages"]) == STAGES
        assert set(part["reasons"]) == {stage for stage, found in part["stages"].items() if found != "done"}
        assert part["n_cells"] == N_CELLS


def test_status_of_an_earlier_version(root):
    state = run_main("status", root, "--version", 3, "--json").json
    assert [part["slice_id"] for part in state["slices"]] == list(IDS[:2])
    assert state["slices"][0]["stages"] == {"ingest": "done", **dict.fromkeys(STAGES[1:], "missing")}


def test_status_shows_people_a_line_a_slice(root):
    lines = run_main("status", root).out.splitlines()
    assert lines[0] == "version 6, 300 cells"
    assert lines[1].split()[:4] == ["slice", "technology", "cells", "genes"]
    assert [line.split()[0] for line in lines[2:]] == list(IDS)


def test_log_lists_versions_newest_first(root):
    versions = run_main("log", root, "--json").json
    assert [entry["version"] for entry in versions] == [6, 5, 4, 3, 2, 1]
    assert all(set(entry) >= {"version", "time", "message", "slices", "code_version"} for entry in versions)
    assert versions[-2]["slices"] == ["simfish_1"]
    assert versions[-1]["message"] == "create"


def test_log_shows_people_a_line_a_version(root):
    lines = run_main("log", root).out.splitlines()
    assert len(lines) == 7
    assert lines[1].startswith("6 ")


def test_verify_finds_no_problem_in_a_whole_catalog(root):
    result = run_main("verify", root, "--json")
    assert (result.code, result.err) == (0, "")
    assert result.json == {"version": 6, "problems": []}


def test_verify_tells_people_that_all_is_well(root):
    result = run_main("verify", root, "--version", 2, "--deep")
    assert (result.code, result.out) == (0, "version 2 is whole\n")


def test_plan_of_a_finished_atlas_is_nothing_to_do(root):
    assert run_main("plan", root).out == "nothing to do\n"


def test_looking_changes_nothing(root):
    before = folder_digest(root)
    for command in ("status", "log", "verify", "plan"):
        run_main(command, root)
    assert folder_digest(root) == before


# query

CELL, OTHER = f"{GAPPY}_0000001", f"{GAPPY}_0000002"


def ask(root, *options):
    result = run_main("query", root, "--slice", GAPPY, *options, "--json")
    assert (result.code, result.err) == (0, "")
    return result.json["query"]


def test_query_says_the_neighbours_of_a_cell(root):
    (part,) = ask(root, "--cell", CELL)
    assert (part["slice_id"], part["cell"]) == (GAPPY, CELL)
    assert len(part["neighbors"]) == 15
    for neighbor in part["neighbors"]:
        assert {"slice_id", "cell", "technology", "distance", "x", "y", "cell_type_coarse"} <= set(neighbor)


def test_query_tells_what_the_library_tells(root):
    catalog = open_catalog(root)
    (part,) = ask(root, "--cell", CELL, "-k", 7)
    query = select_cells(catalog, slices=[GAPPY], where=f"cell == '{CELL}'")
    pairs = nearest_cells(catalog, query, n_neighbors=7).to_dataframe()
    assert [neighbor["cell"] for neighbor in part["neighbors"]] == pairs["cell"].tolist()
    assert np.allclose([neighbor["distance"] for neighbor in part["neighbors"]], pairs["distance"])


def test_query_keeps_several_cells_apart(root):
    together = ask(root, "--cell", OTHER, "--cell", CELL)
    alone = [ask(root, "--cell", part["cell"])[0] for part in together]
    assert {part["cell"] for part in together} == {CELL, OTHER}
    assert together == alone


def test_query_leaves_out_its_own_slice(root):
    (part,) = ask(root, "--cell", CELL, "--exclude-own-slice", "-k", 400)
    assert {neighbor["slice_id"] for neighbor in part["neighbors"]} == set(IDS) - {GAPPY}


def test_query_takes_a_filter(root):
    (part,) = ask(root, "--cell", CELL, "--where", "technology == 'SimMAP' and x < 50", "-k", 4)
    assert {neighbor["technology"] for neighbor in part["neighbors"]} == {"SimMAP"}
    assert all(neighbor["x"] < 50 for neighbor in part["neighbors"])


def test_query_takes_the_other_embedding(root):
    distances = [
        [neighbor["distance"] for neighbor in ask(root, "--cell", CELL, "--embedding", name)[0]["neighbors"]]
        for name in ("X_lloki", "X_fp")
    ]
    assert distances[0] != distances[1]


def test_query_writes_missing_labels_as_null(root):
    (part,) = ask(root, "--cell", CELL, "-k", 400)
    assert {neighbor["depth"] is None for neighbor in part["neighbors"] if neighbor["slice_id"] == GAPPY} == {True}
    assert {type(neighbor["age"]) for neighbor in part["neighbors"]} == {int, type(None)}
    assert {neighbor["kept"] for neighbor in part["neighbors"]} == {True, False, None}


def test_query_shows_people_a_table(root):
    lines = run_main("query", root, "--slice", GAPPY, "--cell", CELL, "-k", 3).out.splitlines()
    assert lines[0] == f"{GAPPY} {CELL}"
    assert lines[1].split()[:4] == ["slice_id", "cell", "technology", "distance"]
    assert len(lines) == 5


def test_query_takes_names_with_quotes_and_backslashes(root, tmp_path):
    name = 'it\'s "a" \\cell'
    copy = Path(shutil.copytree(root, tmp_path / "atlas"))
    adata = source_of(root, "simfish_1")
    adata.obs_names = [name, *adata.obs_names[1:]]
    adata.write_h5ad(tmp_path / "named.h5ad")
    options = ["--technology", "SimFISH", "--organism", "mouse", "--unit", "um"]
    assert run_main("ingest", copy, tmp_path / "named.h5ad", *options).code == 0
    result = run_main("query", copy, "--slice", "named", "--cell", name)
    assert "have no embedding" in result.err  # the cell was found


# export


@pytest.fixture(scope="module")
def exported(root, tmp_path_factory):
    """Results of exporting a slice in both formats, by a process of its own for `.zarr`; and the files."""
    folder = tmp_path_factory.mktemp("exported")
    files = [folder / "cells.h5ad", folder / "cells.zarr"]
    runs = zip((run_main, run_process), files, strict=True)
    return [run("export", root, GAPPY, file, "--where", "x > 20") for run, file in runs], files


@pytest.mark.parametrize("position", [0, 1], ids=["h5ad", "zarr"])
def test_export_says_how_many_cells_it_wrote(root, exported, position):
    result, file = exported[0][position], exported[1][position]
    n_cells = select_cells(open_catalog(root), slices=[GAPPY], where="x > 20").n_cells
    assert (result.code, result.err, result.out) == (0, "", f"{file}: {n_cells} cells\n")


def test_export_writes_anndata_with_counts_and_embeddings(root, exported):
    adata = anndata.read_h5ad(exported[1][0])
    expected = select_cells(open_catalog(root), slices=[GAPPY], where="x > 20").to_anndata(counts=True)
    assert (adata.X != expected.X).nnz == 0
    assert list(adata.var_names) == list(expected.var_names)
    assert set(adata.obsm) == {"X_fp", "X_lloki", "spatial"}
    for name in adata.obsm:
        assert np.array_equal(adata.obsm[name], expected.obsm[name], equal_nan=True)
    assert adata.obs["cell"].tolist() == expected.obs["cell"].tolist()


def test_export_writes_an_xarray_dataset(root, exported):
    data = xarray.open_zarr(exported[1][1], consolidated=False).load()
    xarray.testing.assert_equal(data, select_cells(open_catalog(root), slices=[GAPPY], where="x > 20").to_xarray())


def test_export_of_an_earlier_version_has_no_embedding(root, tmp_path):
    result = run_main("export", root, GAPPY, tmp_path / "early.h5ad", "--version", 5)
    assert (result.code, result.err) == (0, "")
    assert np.isnan(anndata.read_h5ad(tmp_path / "early.h5ad").obsm["X_lloki"]).all()


# the tour


@pytest.fixture
def demo(root, tmp_path, monkeypatch):
    """Result of the demo, with an atlas that is built already."""
    monkeypatch.setattr("lloki_atlas.stages.build.build", lambda manifest, **_: open_catalog(root))
    return run_main("demo", tmp_path / "demo", "--cells", 40, "--quiet")


def test_the_demo_simulates_and_asks(root, demo, tmp_path):
    assert demo.code == 0
    assert (tmp_path / "demo" / "sources" / "atlas.toml").is_file()
    assert "300 cells in 4 slices" in demo.out
    assert f"catalog: {root}" in demo.out


def test_the_demo_names_a_command_that_works(demo):
    (line,) = [line for line in demo.out.splitlines() if line.startswith("ask it more: lloki-atlas ")]
    result = run_main(*line.removeprefix("ask it more: lloki-atlas ").split(), "--json")
    assert result.code == 0
    assert len(result.json["query"][0]["neighbors"]) == 15


def test_no_help_text_loses_what_is_in_brackets():
    # the help is markup: a word in square brackets would not be shown
    command = typer.main.get_command(app)
    texts = {
        f"{name} {parameter.name}": parameter.help
        for name, part in command.commands.items()
        for parameter in part.params
        if getattr(parameter, "help", None)
    }
    assert len(texts) > 50
    assert [place for place, text in texts.items() if "[" in text] == []
