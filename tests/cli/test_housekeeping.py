"""The commands that look after a catalog: verify, remove, rollback, gc, export-version, import-version."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.commands import run_main
from support.folders import folder_digest
from support.housekeeping import grow_old, quick_disk
from support.queries import IDS
from support.stores import publish_object

from lloki_atlas.query import select_cells
from lloki_atlas.store.catalog import open_catalog
from lloki_atlas.store.leases import writing
from lloki_atlas.store.verification import verify_deep

__all__ = ["quick_disk"]
pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture
def atlas(root, tmp_path):
    """A copy of the small atlas, two days old: version 6 holds four slices with their embeddings."""
    copy = Path(shutil.copytree(root, tmp_path / "atlas"))
    grow_old(copy)
    return copy


def done(*arguments):
    result = run_main(*arguments, "--json")
    assert (result.code, result.err) == (0, "")
    return result.json


def refused(*arguments, code=3):
    result = run_main(*arguments)
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    return result.err


def test_remove_makes_a_version_without_the_slices(atlas):
    assert done("remove", atlas, IDS[0], IDS[2]) == {"version": 7, "removed": [IDS[0], IDS[2]], "n_slices": 2}
    assert sorted(open_catalog(atlas).state.slices) == sorted({IDS[1], IDS[3]})
    assert run_main("remove", atlas, IDS[1]).out == f"version 8: without {IDS[1]}; 1 slices left\n"
    assert select_cells(open_catalog(atlas)).n_cells > 0


def test_remove_names_the_nearest_slice(atlas):
    before = folder_digest(atlas)
    assert IDS[0] in refused("remove", atlas, IDS[0] + "x")
    assert folder_digest(atlas) == before


def test_rollback_makes_a_version_that_says_what_an_earlier_one_said(atlas):
    assert done("rollback", atlas, "--to", 2) == {"version": 7, "to": 2}
    assert open_catalog(atlas).state == open_catalog(atlas, version=2).state
    assert run_main("rollback", atlas, "--to", 6).out == "version 8 says what version 6 said\n"
    assert run_main("rollback", atlas, "--to", 8).out == "version 8 says that already\n"
    assert open_catalog(atlas).state == open_catalog(atlas, version=6).state
    assert "version 99" in refused("rollback", atlas, "--to", 99)


def test_gc_removes_what_nobody_reaches(atlas):
    publish_object(open_catalog(atlas, mode="r+"), "graphs", "garbage")
    grow_old(atlas)
    before = folder_digest(atlas)
    said = done("gc", atlas, "--dry-run")
    assert (len(said["objects"]), said["dry_run"], said["versions"]) == (1, True, [])
    assert folder_digest(atlas) == before
    assert run_main("gc", atlas, "--dry-run").out.startswith("would remove 1 objects, 0 leftovers, 0.0 MB")
    assert run_main("gc", atlas).out.startswith("removed 1 objects, 0 leftovers")
    assert done("gc", atlas)["objects"] == []
    assert verify_deep(atlas) == []


def test_gc_gives_up_old_versions_and_log_and_status_say_so(atlas):
    done("remove", atlas, IDS[0])
    collected = done("gc", atlas, "--keep-versions", 1)
    assert collected["versions"] == [1, 2, 3, 4, 5, 6]
    assert len(collected["objects"]) >= 5
    assert [entry["retained"] for entry in done("log", atlas)] == [True, True, *[False] * 6]
    assert run_main("log", atlas).out.count("(given up)") == 6
    error = refused("status", atlas, "--version", 3)
    assert "given up" in error
    assert "choose from 7 to 8" in error
    assert "are gone" in refused("rollback", atlas, "--to", 6)
    assert done("status", atlas)["version"] == 8
    assert done("verify", atlas, "--deep") == {"version": 8, "problems": []}


def test_gc_says_what_is_too_young(atlas):
    publish_object(open_catalog(atlas, mode="r+"), "graphs", "garbage")
    assert run_main("gc", atlas).out.endswith(", 1 too young to go\n")
    assert len(done("gc", atlas, "--grace-hours", 0)["objects"]) == 1


def test_gc_refuses_while_somebody_writes(atlas):
    with writing(atlas, "a long run"):
        assert "a long run" in refused("gc", atlas, code=4)
    assert "keep at least one" in refused("gc", atlas, "--keep-versions", 0)


def test_an_exported_version_is_an_atlas(atlas, tmp_path):
    exported = done("export-version", atlas, tmp_path / "out", "--version", 6)
    assert (exported["version"], exported["n_slices"], exported["root"]) == (6, 4, str(tmp_path / "out"))
    shutil.rmtree(atlas)
    assert done("status", tmp_path / "out")["version"] == 1
    assert select_cells(open_catalog(tmp_path / "out")).to_anndata().obsm["X_lloki"].shape[1] == 128
    assert done("verify", tmp_path / "out", "--deep") == {"version": 1, "problems": []}
    assert "nothing is overwritten" in refused("export-version", tmp_path / "out", tmp_path / "out")


def test_a_removed_slice_comes_back_from_an_exported_folder(atlas, tmp_path):
    run_main("export-version", atlas, tmp_path / "out")
    done("remove", atlas, *IDS)
    assert done("import-version", atlas, tmp_path / "out", "--slices", IDS[1]) == {"version": 8, "slices": [IDS[1]]}
    text = run_main("import-version", atlas, tmp_path / "out").out
    assert text == f"version 9: took {', '.join(sorted({*IDS} - {IDS[1]}))}\n"
    assert run_main("import-version", atlas, tmp_path / "out").out == "nothing to take\n"
    assert open_catalog(atlas).state.slices == open_catalog(atlas, version=6).state.slices
    assert verify_deep(atlas) == []


def test_import_names_the_slice_that_conflicts(atlas, tmp_path):
    run_main("export-version", atlas, tmp_path / "out", "--version", 3)
    assert IDS[0] in refused("import-version", atlas, tmp_path / "out")


def _victim(atlas, pattern):
    victims = [path for path in atlas.glob(pattern) if path.is_file()]
    return max(victims, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    "pattern",
    ["slices/**/*", "embeddings/*.zarr/**/*", "embeddings/*.json", "models/*/*", "models/*.json", "versions/*",
     "catalog.json"],
)  # fmt: skip
def test_verify_deep_finds_a_flipped_byte(atlas, pattern):
    victim = _victim(atlas, pattern)
    data = bytearray(victim.read_bytes())
    data[len(data) // 3] ^= 0x10
    victim.write_bytes(data)
    result = run_main("verify", atlas, "--deep", "--json")
    assert (result.code, result.err) == (4, "")
    assert result.json["version"] is None
    assert victim.name in result.json["problems"][0]


def test_verify_without_deep_compares_sizes_and_says_so(atlas):
    assert run_main("verify", atlas).out == "version 6 is whole, as far as sizes tell: --deep reads every byte\n"
    victim = _victim(atlas, "slices/*/**/*")
    victim.write_bytes(victim.read_bytes()[:-1])
    result = run_main("verify", atlas)
    assert result.code == 4
    assert victim.name in result.out
    assert "bytes where" in result.out


def test_verify_deep_tells_people_that_all_is_well(atlas):
    assert run_main("verify", atlas, "--deep").out == "every version that is retained is whole\n"
    assert "no catalog" in refused("verify", atlas.parent, "--deep")
