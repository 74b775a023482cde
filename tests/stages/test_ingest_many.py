"""Ingest of many sources: one commit a batch, bad ones listed, nothing twice, changed ones replaced."""

from __future__ import annotations

import json
import shutil

import anndata
import numpy as np
import pytest
from support.atlases import N_CELLS, TECHNOLOGIES, add_slice, all_bytes, copied, new_catalog
from support.folders import folder_digest
from support.tasks import lose_workers

from lloki_atlas.errors import ConflictError, InputError
from lloki_atlas.stages import ingest as single
from lloki_atlas.stages import ingest_many as module
from lloki_atlas.stages.ingest import ingest
from lloki_atlas.stages.ingest_many import ingest_many
from lloki_atlas.stages.manifest import SliceSource
from lloki_atlas.stages.pipeline import plan
from lloki_atlas.stages.status import status
from lloki_atlas.store.catalog import history, open_catalog, verify

NAMES = ["simfish_1", "simish_1", "simmap_1"]
OPTIONS = {"technology": "Sim", "organism": "mouse", "coordinate_unit": "micrometer", "label_key": "cell_type_coarse"}


@pytest.fixture
def empty(sources, tmp_path):
    """A catalog with a reference and no slice."""
    return new_catalog(tmp_path / "atlas", sources, slices=())


@pytest.fixture
def folder(sources, tmp_path):
    """A folder with three sources and nothing else."""
    own = tmp_path / "sources"
    own.mkdir()
    for name in NAMES:
        shutil.copy(sources / f"{name}.h5ad", own)
    return own


@pytest.fixture
def put(client):
    """Ingest many with what is the same in all tests."""
    return lambda catalog, given, **options: ingest_many(
        catalog, given, client=client, progress=False, **{**OPTIONS, **options}
    )


def change(path):
    """Another count in an h5ad file."""
    adata = anndata.read_h5ad(path)
    adata.X.data[0] += 1
    adata.write_h5ad(path)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:1000])


def test_a_folder_is_one_version(empty, folder, put):
    done = put(empty, folder)
    assert (done.added, done.refused) == (tuple(NAMES), {})
    assert done.catalog.version == empty.version + 1
    assert sorted(open_catalog(empty.root).state.slices) == NAMES
    assert history(done.catalog)[-1].message == "ingest 3 slices"
    assert verify(done.catalog) == []


def test_slices_are_those_that_are_ingested_one_by_one(empty, folder, put, tmp_path, sources):
    together = put(empty, folder).catalog
    apart = new_catalog(tmp_path / "other", sources, slices=())
    for name in NAMES:
        apart = ingest(apart, folder / f"{name}.h5ad", slice_id=name, **OPTIONS)
    assert together.state.slices == apart.state.slices
    assert together.state.objects == apart.state.objects


def test_nothing_is_left_in_staging(empty, folder, put):
    cut_short(folder / "simish_1.h5ad")
    done = put(empty, folder)
    assert list((done.catalog.root / "staging").iterdir()) == []


def test_batches_make_few_versions(empty, folder, put):
    done = put(empty, folder, batch=2)
    assert [record.message for record in history(done.catalog)][1:] == ["ingest 2 slices", "ingest simmap_1"]


def test_a_batch_that_was_committed_survives_a_crash_in_the_next(empty, folder, put, monkeypatch):
    run = module._run

    def crash(tasks, *parts, **options):
        if tasks[0].slice_id == NAMES[2]:
            raise KeyboardInterrupt
        return run(tasks, *parts, **options)

    monkeypatch.setattr(module, "_run", crash)
    with pytest.raises(KeyboardInterrupt):
        put(empty, folder, batch=2)
    monkeypatch.undo()
    kept = open_catalog(empty.root, mode="r+")
    assert sorted(kept.state.slices) == NAMES[:2]
    assert put(kept, folder).added == tuple(NAMES[2:])


def test_the_same_sources_again_are_nothing_and_are_not_parsed(empty, folder, put, monkeypatch):
    first = put(empty, folder).catalog
    before = folder_digest(first.root / "versions"), folder_digest(first.root / "slices")
    monkeypatch.setattr(single, "open_source", None)
    done = put(first, folder)
    assert (done.unchanged, done.added, done.refused) == (tuple(NAMES), (), {})
    assert done.catalog is first
    assert (folder_digest(first.root / "versions"), folder_digest(first.root / "slices")) == before


def test_another_option_is_parsed_again_and_may_come_to_the_same(empty, folder, put):
    first = put(empty, folder).catalog
    done = put(first, folder, empty_cells="keep")
    assert (done.unchanged, done.catalog.version) == (tuple(NAMES), first.version)


def test_a_source_that_changed_where_it_was_is_a_new_version_of_its_slice(empty, folder, put):
    first = put(empty, folder).catalog
    change(folder / "simish_1.h5ad")
    done = put(first, folder)
    assert (done.replaced, done.added, len(done.unchanged)) == (("simish_1",), (), 2)
    assert done.catalog.version == first.version + 1
    now, before = (part.slice("simish_1").objects["ingest"] for part in (done.catalog, first))
    assert now != before
    assert open_catalog(first.root, version=first.version).slice("simish_1").objects["ingest"] == before
    assert verify(open_catalog(first.root, version=first.version)) == []


def test_another_file_of_a_known_id_is_refused_unless_it_is_said_to_replace(empty, folder, put):
    first = put(empty, folder / "simish_1.h5ad").catalog
    other = folder / "elsewhere"
    other.mkdir()
    shutil.copy(folder / "simish_1.h5ad", other)
    assert put(first, other).unchanged == ("simish_1",)
    change(other / "simish_1.h5ad")
    refused = put(first, other)
    assert "already with other content: choose another id" in refused.refused["simish_1"]
    assert refused.catalog.version == first.version
    assert put(first, other, replace=True).replaced == ("simish_1",)


def test_a_changed_source_is_refused_when_nothing_is_to_be_replaced(empty, folder, put):
    first = put(empty, folder).catalog
    change(folder / "simish_1.h5ad")
    done = put(first, folder, replace=False)
    assert list(done.refused) == ["simish_1"]
    assert done.catalog is first


def test_later_stages_of_a_replaced_slice_are_missing_and_of_others_done(built, sources, tmp_path, put):
    catalog = copied(built, tmp_path / "atlas")
    before = all_bytes(catalog)
    own = tmp_path / "simmap_1.h5ad"
    shutil.copy(sources / "simmap_1.h5ad", own)
    change(own)
    done = put(catalog, own, technology="SimMAP", replace=True)
    assert done.replaced == ("simmap_1",)
    stages = {part["slice_id"]: part["stages"] for part in status(done.catalog)["slices"]}
    assert set(stages["simfish_1"].values()) == {"done"}
    assert set(list(stages["simmap_1"].values())[1:]) == {"missing"}
    assert {task.slice_id for task in plan(done.catalog, until="embed").tasks} == {"simmap_1"}
    assert all_bytes(open_catalog(catalog.root, version=catalog.version)) == before


BAD = {"cut short": cut_short, "no file of its kind": lambda path: path.write_text("no HDF5")}


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
def test_a_bad_source_sinks_no_other(empty, folder, put, spoil):
    spoil(folder / "simish_1.h5ad")
    done = put(empty, folder)
    assert done.added == tuple(name for name in NAMES if name != "simish_1")
    assert list(done.refused) == ["simish_1"]
    assert "cannot be read" in done.refused["simish_1"]
    assert "\n" not in done.refused["simish_1"]


def test_bad_sources_alone_make_no_version(empty, folder, put):
    cut_short(folder / "simish_1.h5ad")
    done = put(empty, [folder / "simish_1.h5ad", folder / "gone.h5ad"])
    assert set(done.refused) == {"simish_1", "gone"}
    assert "does not exist" in done.refused["gone"]
    assert done.catalog is empty


def test_all_or_nothing_takes_all_or_nothing(empty, folder, put):
    good = (folder / "simish_1.h5ad").read_bytes()
    cut_short(folder / "simish_1.h5ad")
    with pytest.raises(InputError, match=r"nothing was ingested, 'simish_1' cannot be: .*cannot be read"):
        put(empty, folder, all_or_nothing=True)
    assert open_catalog(empty.root).version == empty.version
    (folder / "simish_1.h5ad").write_bytes(good)
    done = put(empty, folder, all_or_nothing=True, batch=2)
    assert (done.added, done.catalog.version) == (tuple(NAMES), empty.version + 1)


def test_ids_that_clash_are_refused_before_anything_runs(empty, folder, put, monkeypatch):
    (folder / "more").mkdir()
    shutil.copy(folder / "simish_1.h5ad", folder / "more")
    monkeypatch.setattr(module, "_run", None)
    with pytest.raises(InputError, match=r"two slices are called 'simish_1', of .*: give each its own id in a sheet"):
        put(empty, [folder, folder / "more"])


def test_a_sheet_says_what_differs(empty, folder, put):
    lines = [f"{name}.h5ad,{name}_x,{TECHNOLOGIES[name]}" for name in NAMES]
    (folder / "sheet.csv").write_text("\n".join(["source,slice_id,technology", *lines]))
    done = put(empty, folder / "sheet.csv")
    assert {record.slice_id: record.technology for record in done.catalog.state.slices.values()} == {
        f"{name}_x": TECHNOLOGIES[name] for name in NAMES
    }


def test_sections_of_a_file_are_slices(empty, folder, put):
    adata = anndata.read_h5ad(folder / "simish_1.h5ad")
    adata.obs["section"] = np.array(["left", "right"])[np.arange(adata.n_obs) % 2]
    adata.write_h5ad(folder / "simish_1.h5ad")
    entry = SliceSource(str(folder / "simish_1.h5ad"), "Sim", "mouse", "um", slice_key="section")
    assert put(empty, entry).added == ("left", "right")
    assert [record.n_cells for record in open_catalog(empty.root).state.slices.values()] == [N_CELLS // 2] * 2


def test_a_source_that_does_not_fit_a_worker_is_refused_and_the_others_are_not(empty, folder, put, monkeypatch):
    size = module.source_size

    def large(source, **options):
        return size(source, **options)._replace(n_entries=2**50 if "simish_1" in source else 0)

    monkeypatch.setattr(module, "source_size", large)
    monkeypatch.setattr("lloki_atlas.engine.cluster.memory_per_task", lambda client, **_: 2**40)
    done = put(empty, folder)
    assert list(done.refused) == ["simish_1"]
    assert "simish_1.h5ad is projected to need" in done.refused["simish_1"]
    assert len(done.added) == 2
    with pytest.raises(InputError, match="nothing was ingested"):
        put(done.catalog, folder, all_or_nothing=True)


def test_another_writer_of_one_slice_refuses_that_slice_alone(empty, folder, put, sources):
    add_slice(empty, sources, "simish_1")
    done = put(empty, folder)
    assert done.refused == {"simish_1": "another writer changed this slice meanwhile: ingest it again"}
    assert sorted(done.catalog.state.slices) == NAMES
    assert done.catalog.slice("simish_1").technology == "SimISH"


def test_a_conflict_about_something_else_is_not_taken_for_one_of_a_slice(empty, folder, put, monkeypatch):
    def conflict(*_, **__):
        raise ConflictError("something else")

    monkeypatch.setattr(module, "commit", conflict)
    with pytest.raises(ConflictError, match="something else"):
        put(empty, folder)


def test_a_source_that_kills_its_workers_is_refused(empty, folder, put, monkeypatch):
    make = module.make_slice

    def kill(catalog, source, **options):
        return lose_workers(str(folder / "log"), "x") if "simish_1" in source else make(catalog, source, **options)

    monkeypatch.setattr(module, "make_slice", kill)
    done = put(empty, folder)
    assert "killed its workers again and again" in done.refused["simish_1"]
    assert len(done.added) == 2


def test_a_defect_is_raised_after_what_was_made_is_committed(empty, folder, put, monkeypatch):
    make = module.make_slice

    def fail(catalog, source, **options):
        return 1 / 0 if "simish_1" in source else make(catalog, source, **options)

    monkeypatch.setattr(module, "make_slice", fail)
    with pytest.raises(ZeroDivisionError):
        put(empty, folder)
    assert len(open_catalog(empty.root).state.slices) == 2


def test_a_disk_that_fails_is_no_fault_of_a_source(empty, folder, put, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(single, "publish", full)
    with pytest.raises(OSError, match="No space left"):
        put(empty, folder)
    assert open_catalog(empty.root).version == empty.version


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"technology": None}, "lacks 'technology'"),
        ({"batch": 0}, "batch is 0: it has to be at least 1"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_refused(empty, folder, put, options, message):
    with pytest.raises(InputError, match=message):
        put(empty, folder, **options)


def test_a_catalog_that_is_open_for_reading_is_refused(ingested, folder):
    with pytest.raises(InputError, match=r"open it with mode='r\+' to ingest"):
        ingest_many(open_catalog(ingested), folder)


def test_tasks_hold_plain_values_and_state_their_memory(empty, folder):
    entries = module.find_sources(folder, **OPTIONS)
    for task in module._plan_tasks(empty, entries, replace=None):
        assert json.loads(json.dumps(task.arguments)) == task.arguments
        assert task.projected_memory > 2**27
        assert task.n_cells == N_CELLS
