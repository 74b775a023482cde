"""Vectors follow from cells alone: not from tiles, workers, kills in mid-run, or the order of cells in a source."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import anndata
import numpy as np
import pytest
from support.atlases import (
    CONFIG,
    SLICES,
    all_bytes,
    by_cell,
    copied,
    new_catalog,
    run_here,
    settings_text,
    write_manifest,
)

from lloki_atlas.config import TileConfig
from lloki_atlas.simulation import simulate
from lloki_atlas.stages.build import build
from lloki_atlas.stages.pipeline import plan, run
from lloki_atlas.store.arrays import read_arrays
from lloki_atlas.store.catalog import open_catalog, verify
from lloki_atlas.store.objects import is_complete

N_CELLS = 100
IN_TILES = dataclasses.replace(CONFIG, tile=TileConfig(tile_cells=64))
IN_ONE_TILE = dataclasses.replace(CONFIG, tile=TileConfig(tile_cells=100_000))
BUILD = "import sys, lloki_atlas; lloki_atlas.build(sys.argv[1], root=sys.argv[2], progress=False, n_workers=1)"


@cache
def make_large_sources(folder):
    """Two slices, and the same with their cells in another order in `shuffled`."""
    simulate(folder, n_cells=2 * N_CELLS, n_slices=2)
    (folder / "shuffled").mkdir()
    for seed, slice_id in enumerate(SLICES):
        table = anndata.read_h5ad(folder / f"{slice_id}.h5ad")
        order = np.random.default_rng(seed).permutation(table.n_obs)
        table[order].write_h5ad(folder / "shuffled" / f"{slice_id}.h5ad")
    (folder / "shuffled" / "reference.h5ad").write_bytes((folder / "reference.h5ad").read_bytes())
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return make_large_sources(tmp_path_factory.getbasetemp() / "large")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, large):
    """One tile a slice, one task after the other in this process."""
    root = tmp_path_factory.mktemp("undisturbed") / "atlas"
    return run_here(plan(new_catalog(root, large, config=IN_ONE_TILE)))


@pytest.fixture(scope="module")
def tiled(tmp_path_factory, large):
    """Slices ingested in tiles of 64 cells; nothing was run. Copy it."""
    root = tmp_path_factory.mktemp("tiled") / "atlas"
    new_catalog(root, large, config=IN_TILES)
    return root


@pytest.fixture(scope="module")
def in_tiles(tiled, tmp_path_factory):
    return run_here(plan(copied(tiled, tmp_path_factory.mktemp("in_tiles") / "atlas")))


@pytest.fixture(scope="module")
def on_two_workers(tiled, tmp_path_factory):
    catalog = copied(tiled, tmp_path_factory.mktemp("two") / "atlas")
    return run(catalog, progress=False, n_workers=2)


@pytest.fixture(scope="module")
def in_another_order(tmp_path_factory, large):
    root = tmp_path_factory.mktemp("shuffled") / "atlas"
    return run_here(plan(new_catalog(root, large / "shuffled", config=IN_TILES)))


def test_tiles_do_not_change_a_byte_of_a_vector(in_tiles, undisturbed):
    assert all_bytes(in_tiles) == all_bytes(undisturbed)


def test_tiles_really_are_several(in_tiles):
    key = in_tiles.slice("simfish_1").objects["embed"]
    assert len(list((in_tiles.path("embeddings", key) / "X_fp" / "c").glob("*/*"))) == 2


@pytest.mark.parametrize("stage", ["tile", "propagate"])
def test_tiles_do_not_change_a_byte_of_what_vectors_are_made_of(in_tiles, undisturbed, stage):
    kind = {"tile": "statistics", "propagate": "graphs"}[stage]
    for slice_id in SLICES:
        one, other = (
            read_arrays(catalog.path(kind, catalog.slice(slice_id).objects[stage]))
            for catalog in (in_tiles, undisturbed)
        )
        assert {name: values.tobytes() for name, values in one.items()} == {
            name: values.tobytes() for name, values in other.items()
        }


def test_two_worker_processes_do_not_change_a_byte_of_a_vector(on_two_workers, undisturbed):
    assert all_bytes(on_two_workers) == all_bytes(undisturbed)


def test_two_worker_processes_leave_every_object_whole(on_two_workers):
    assert verify(on_two_workers) == []
    assert plan(on_two_workers).tasks == ()


def test_two_worker_processes_write_the_same_receipts_as_one(on_two_workers, in_tiles):
    assert on_two_workers.state.objects == in_tiles.state.objects


@pytest.mark.parametrize("name", ["X_fp", "X_lloki"])
@pytest.mark.parametrize("slice_id", SLICES)
def test_the_order_of_cells_in_a_source_does_not_change_their_vectors(in_another_order, in_tiles, slice_id, name):
    assert by_cell(in_another_order, slice_id, name) == by_cell(in_tiles, slice_id, name)


def test_the_other_order_really_is_another(large):
    one, other = (anndata.read_h5ad(folder / "simfish_1.h5ad") for folder in (large, large / "shuffled"))
    assert list(one.obs_names) != list(other.obs_names)


def staged(root):
    """Something is being written."""
    return any((root / "staging").glob("*/*"))


def embedded(root):
    """The first embedding is published."""
    return any((root / "embeddings").glob("*.json"))


@pytest.fixture(scope="module", params=[staged, embedded], ids=["first file staged", "first embedding published"])
def killed(request, tmp_path_factory, large, tiled, client):
    """A build that is killed at that moment, what it left, and the atlas after the same build again."""
    folder = tmp_path_factory.mktemp("killed")
    manifest, root = write_manifest(folder / "atlas.toml", large, settings=settings_text(IN_TILES)), folder / "atlas"
    if request.param is embedded:
        copied(tiled, root)
    kill_when(request.param, manifest, root)
    left = sorted(path.name for path in root.glob("embeddings/*.json"))
    return left, build(manifest, root=root, client=client, progress=False)


def kill_when(condition, manifest: Path, root: Path, *, patience=120.0):
    process = subprocess.Popen([sys.executable, "-c", BUILD, str(manifest), str(root)], start_new_session=True)
    end = time.monotonic() + patience
    while not condition(root):
        assert process.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() < end, "the build never came to where it was to be killed"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_a_killed_build_was_really_in_the_middle(killed):
    left, catalog = killed
    assert len(left) < len(list(catalog.root.glob("embeddings/*.json")))


def test_a_build_after_a_kill_does_not_change_a_byte_of_a_vector(killed, undisturbed):
    assert all_bytes(killed[1]) == all_bytes(undisturbed)


def test_a_build_after_a_kill_keeps_what_was_finished(killed, in_tiles):
    left, catalog = killed
    kept = {catalog.slice(slice_id).objects[stage] for slice_id in SLICES for stage in ("embed", "integrate")}
    assert {name.removesuffix(".zarr.json") for name in left} <= kept


def test_a_build_after_a_kill_has_the_objects_of_one_without(killed, in_tiles):
    assert killed[1].state.objects == in_tiles.state.objects


def test_a_build_after_a_kill_is_whole(killed):
    catalog = open_catalog(killed[1].root)
    assert verify(catalog) == []
    assert plan(catalog).tasks == ()
    assert all(is_complete(catalog.path(*name.split("/"))) for name in catalog.state.objects)
