"""The whole pipeline in a bucket: the same objects as in a folder, asked, adapted and resumed the same way."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from pathlib import Path

import pytest
from support.atlases import CONFIG, add_slice, all_bytes, new_catalog, run_here, with_settings
from support.folders import folder_digest
from support.s3 import Bucket

import lloki_atlas
from lloki_atlas.config import TileConfig
from lloki_atlas.errors import FormatError, InputError, StorageError
from lloki_atlas.stages.adapt import adapt_autoencoder
from lloki_atlas.stages.pipeline import plan
from lloki_atlas.store import buckets
from lloki_atlas.store.catalog import open_catalog, verify
from lloki_atlas.store.local import local_folder
from lloki_atlas.store.objects import read_receipt
from lloki_atlas.store.places import ObjectPlace, place
from lloki_atlas.store.records import split_name

# small slices are one task, and a chain of tasks that hand steps on
CHAINED = dataclasses.replace(CONFIG, tile=TileConfig(tile_cells=32, slice_memory_mb=0))


@pytest.fixture(scope="module")
def bucket(s3_endpoint, tmp_path_factory):
    """One bucket for all tests of this module."""
    made = Bucket(s3_endpoint)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.environment.items():
            patch.setenv(name, value)
        patch.setenv("LLOKI_ATLAS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield made


@pytest.fixture(autouse=True)
def no_faults(bucket):
    bucket.faults()


@pytest.fixture(scope="module")
def expected(sources, tmp_path_factory):
    """An atlas in a folder that ran to the end."""
    return run_here(plan(new_catalog(tmp_path_factory.mktemp("local") / "atlas", sources)))


@pytest.fixture(scope="module")
def stored(bucket, sources):
    """The same atlas in the bucket; tests that change something put it back."""
    return run_here(plan(new_catalog(f"{bucket}/team/atlas", sources)))


def left(catalog):
    """Names of everything in the staging area."""
    folder = catalog.path("staging", "x").parent
    return sorted(folder.files()) if isinstance(folder, ObjectPlace) else sorted(map(str, folder.rglob("*")))


def all_rows(catalog):
    return lloki_atlas.select_cells(catalog).to_anndata().obsm["X_lloki"]


def test_a_catalog_in_a_bucket_holds_what_one_in_a_folder_holds(stored, expected, bucket):
    assert str(stored.root) == f"{bucket}/team/atlas"
    assert stored.state.objects == expected.state.objects
    assert all_bytes(stored) == all_bytes(expected)
    assert verify(stored) == []
    assert left(stored) == []


def test_a_run_that_has_nothing_to_do_makes_no_version(stored):
    assert run_here(plan(stored)).version == stored.version


def test_questions_have_the_same_answers(stored, expected):
    answers = [
        lloki_atlas.nearest_cells(catalog, all_rows(catalog)[:2], n_neighbors=3).to_dataframe()
        for catalog in (stored, expected)
    ]
    assert answers[0].equals(answers[1])


def test_a_damaged_object_is_named(stored):
    key = stored.slice("simmap_1").objects["integrate"]
    file = stored.path("embeddings", key) / "X_lloki" / "c" / "0" / "0"
    whole = file.read_bytes()
    altered = bytearray(whole)
    altered[100] ^= 1
    try:
        file.write_bytes(bytes(altered))
        (problem,) = verify(stored)
        assert key in problem
        assert "X_lloki/c/0/0 was altered" in problem
        file.write_bytes(whole[:-1])
        with pytest.raises(FormatError, match="damaged"):
            lloki_atlas.select_cells(stored, slices=["simmap_1"]).to_anndata()
    finally:
        file.write_bytes(whole)
    assert verify(stored) == []


def test_a_model_is_fetched_once_and_checked(stored, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("LLOKI_ATLAS_CACHE", str(tmp_path / "cache"))
    model = stored.path("models", stored.state.models["autoencoder"])
    folder = local_folder(model)
    assert folder.is_relative_to(tmp_path / "cache")
    before = folder_digest(folder)
    bucket.faults()
    assert local_folder(str(model)) == folder
    assert bucket.requests() == []
    whole = (model / "autoencoder.json").read_bytes()
    try:
        (model / "autoencoder.json").write_bytes(b"{}")
        assert folder_digest(local_folder(model)) == before
        shutil.rmtree(tmp_path / "cache")
        with pytest.raises(FormatError, match="was altered"):
            local_folder(model)
        assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
    finally:
        (model / "autoencoder.json").write_bytes(whole)


@pytest.mark.slow
def test_a_platform_is_adapted_to(stored, sources, client):
    before = {name: read_receipt(stored.path(*split_name(name))).digest for name in stored.state.objects}
    catalog = add_slice(open_catalog(str(stored.root), version=stored.version, mode="r+"), sources, "simish_1")
    adapted = adapt_autoencoder(catalog, technology="SimISH", client=client, progress=False)
    assert "integrate" in adapted.slice("simish_1").objects
    assert {name: read_receipt(adapted.path(*split_name(name))).digest for name in before} == before
    assert verify(adapted) == []


def test_other_settings_run_again_only_what_follows(stored):
    changed = with_settings(stored, "propagation", alpha=0.7)
    stages = {task.stage for task in plan(changed).tasks}
    assert stages >= {"embed", "train", "integrate"}
    assert not stages & {"tile", "reference", "propagate"}
    assert set(open_catalog(str(stored.root), version=stored.version).state.objects) == set(stored.state.objects)


@pytest.mark.slow
def test_a_slice_that_is_a_chain_of_tasks_has_the_same_objects(bucket, sources, tmp_path):
    local = run_here(plan(new_catalog(tmp_path / "atlas", sources, config=CHAINED)))
    catalog = run_here(plan(new_catalog(f"{bucket}/chained", sources, config=CHAINED)))
    assert catalog.state.objects == local.state.objects
    assert left(catalog) == []


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, CHAINED], ids=["in memory", "chained"])
def test_a_run_that_the_storage_broke_off_goes_on_with_the_same_bytes(config, bucket, sources, tmp_path, monkeypatch):
    expected = run_here(plan(new_catalog(tmp_path / "atlas", sources, config=config)))
    monkeypatch.setenv("LLOKI_ATLAS_STORAGE_RETRIES", "0")
    buckets.client.cache_clear()
    catalog = new_catalog(f"{bucket}/broken-{len(list(place(str(bucket)).iterdir()))}", sources, config=config)
    broken = 0
    for skipped in (3, 10, 25, 60, 120):
        # the first puts go through, then one is lost
        bucket.faults(
            {"kind": "", "method": "PUT", "match": "/broken", "times": skipped},
            {"kind": "fail", "method": "PUT", "match": "/broken", "times": 1},
        )
        try:
            run_here(plan(open_catalog(str(catalog.root), mode="r+")))
        except StorageError:
            broken += 1
        assert verify(open_catalog(str(catalog.root))) == []
    bucket.faults()
    done = run_here(plan(open_catalog(str(catalog.root), mode="r+")))
    buckets.client.cache_clear()
    assert broken >= 2
    assert done.state.objects == expected.state.objects
    assert verify(done) == []


def test_credentials_are_neither_stored_nor_sent(stored, bucket):
    secrets = [bucket.environment[name].encode() for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    tasks = pickle.dumps(plan(stored, slices=None).tasks)
    found = [tasks, *((stored.root / name).read_bytes() for name in stored.root.files())]
    assert len(found) > 50
    assert not any(secret in content for secret in secrets for content in found)


def test_a_place_that_is_taken_is_refused(bucket, sources):
    place(f"{bucket}/taken/notes.txt").write_bytes(b"mine")
    with pytest.raises(InputError, match="exists already and is not empty"):
        new_catalog(f"{bucket}/taken", sources, slices=())
    assert sorted(place(f"{bucket}/taken").files()) == ["notes.txt"]


def test_catalogs_whose_names_begin_alike_are_strangers(bucket, sources):
    first, second = (new_catalog(f"{bucket}/{name}", sources, slices=()) for name in ("twin", "twin2"))
    add_slice(first, sources, "simfish_1")
    assert open_catalog(str(second.root)).version == 1
    assert list(open_catalog(str(second.root)).state.slices) == []


def test_paths_of_a_bucket_are_no_folders(tmp_path, bucket, sources, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new_catalog(f"{bucket}/elsewhere", sources, slices=())
    assert [path for path in Path().rglob("*") if "s3:" in str(path)] == []
