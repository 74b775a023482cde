"""Tiles streamed through a device: the same bytes in any grouping, encoded on the way or later, killed or not."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import anndata
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from support.atlases import (
    CONFIG,
    N_CELLS,
    SLICES,
    add_slice,
    all_bytes,
    copied,
    embedding,
    new_catalog,
    run_here,
    stages,
    with_settings,
)
from support.checkpoints import write_checkpoint
from support.devices import FAKE_GPU, local_client_with_gpu
from support.folders import folder_digest
from support.tasks import notes

from lloki_atlas.config import EmbedderConfig, TileConfig
from lloki_atlas.engine.devices import HOST_THREADS
from lloki_atlas.engine.plan import Plan, run_task
from lloki_atlas.models.autoencoder_files import save_token
from lloki_atlas.models.embedders import EMBEDDING_SIZE, embedder_factory
from lloki_atlas.models.platform_token import Token
from lloki_atlas.stages import embed, embed_tasks, streaming
from lloki_atlas.stages.lineage import atlas_config, expected_objects
from lloki_atlas.stages.pipeline import plan, run, train_autoencoder
from lloki_atlas.store.catalog import open_catalog, verify
from lloki_atlas.store.objects import is_complete

TILE_CELLS = 16
STARTS = (0, 16, 32, 48)
NEW = "simfish_2"  # has the panel of simfish_1
EMPTY = [1, 20, 41]  # its cells without counts


class Halves:
    """An embedder of two steps, which count their calls."""

    def __init__(self):
        self.prepared, self.finished = [], []

    def prepare(self, rows):
        self.prepared.append(len(rows))
        return {"rows": rows * 2}

    def finish(self, prepared):
        self.finished.append(len(prepared["rows"]))
        return np.resize(prepared["rows"], (len(prepared["rows"]), EMBEDDING_SIZE)).astype(np.float32)

    def embed(self, rows):
        return self.finish(self.prepare(rows))


class Whole:
    """An embedder of one step."""

    def embed(self, rows):
        return Halves().embed(rows)


class Encoder:
    """Twice the first numbers of the embedding."""

    def encode(self, embeddings, platform):
        assert platform == "the platform"
        return np.asarray(embeddings)[:, :128] * np.float32(2)


ROWS = np.random.default_rng(0).random((5, 3), dtype=np.float32)


@pytest.mark.parametrize("embedder", [Halves(), Whole()], ids=["two steps", "one step"])
def test_preparing_and_finishing_is_embedding(embedder):
    made = streaming.finish_rows(embedder, streaming.prepare_rows(embedder, ROWS))
    assert made.tobytes() == Whole().embed(ROWS).tobytes()


@pytest.mark.parametrize("embedder", [Halves(), Whole()], ids=["two steps", "one step"])
def test_latents_are_those_of_the_embedding_as_it_is_stored(embedder):
    prepared = streaming.prepare_rows(embedder, ROWS)
    embedding, latents = streaming.finish_encoded(embedder, prepared, Encoder(), "the platform")
    assert embedding.tobytes() == Whole().embed(ROWS).tobytes()
    assert latents.tobytes() == (embedding.astype(np.float16)[:, :128].astype(np.float32) * np.float32(2)).tobytes()
    assert latents.tobytes() != (embedding[:, :128] * np.float32(2)).tobytes()


def test_an_embedder_may_encode_by_itself():
    embedder = SimpleNamespace(finish_encoded=lambda prepared, encoder, platform: (prepared, encoder, platform))
    assert streaming.finish_encoded(embedder, 1, 2, "three") == (1, 2, "three")


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (SimpleNamespace(), False),
        (SimpleNamespace(uses_device=lambda config: config.device != "cpu"), True),
        (SimpleNamespace(uses_device=lambda config: config.device == "cpu"), False),
    ],
    ids=["does not say", "says so", "says not"],
)
def test_an_embedder_uses_a_device_when_it_says_so(monkeypatch, factory, expected):
    monkeypatch.setattr(streaming, "embedder_factory", lambda name: factory)
    assert streaming.uses_device(EmbedderConfig()) is expected


@given(st.integers(0, 2**34), st.integers(1, 100))
def test_tiles_in_memory_are_bounded_by_bytes_but_never_fewer_than_three(tile_bytes, n_tiles):
    depth = streaming.queue_depth(tile_bytes)
    assert 1 <= depth <= streaming.MAX_DEPTH
    taken = streaming.queue_bytes(n_tiles, tile_bytes)
    assert taken <= max(streaming.QUEUE_BYTES, 3 * tile_bytes)
    assert taken == min(n_tiles, depth + 2) * tile_bytes


@pytest.mark.parametrize(("depth", "n_threads"), itertools.product((1, 2, 8), (1, 3)))
def test_no_more_tiles_are_between_reading_and_writing_than_projected(monkeypatch, depth, n_threads):
    monkeypatch.setenv(HOST_THREADS, str(n_threads))
    lock, begun, most = threading.Lock(), set(), []

    def prepare(start):
        with lock:
            begun.add(start)
            most.append(len(begun))
        return start

    def finish(start):
        # what is finished is 512 numbers a cell: its rows are let go
        with lock:
            begun.discard(start)
        return start

    assert list(streaming.stream(range(40), prepare, finish, depth=depth)) == list(range(40))
    assert max(most) <= depth + 2


def test_two_streams_of_a_process_take_turns_on_its_device():
    inside = threading.Lock()

    def finish(tile):
        assert inside.acquire(blocking=False), "the device is in use"
        threading.Event().wait(0.001)
        inside.release()
        return tile

    streams = [streaming.stream(range(20), abs, finish, depth=2) for _ in range(2)]
    for pair in zip(*streams, strict=True):
        assert pair[0] == pair[1]


@pytest.fixture(scope="module")
def scgpt_root(sources, profile, tmp_path_factory):
    """Two slices in four tiles each, ingested, to be embedded by a tiny scGPT; nothing was run."""
    folder = tmp_path_factory.mktemp("scgpt")
    checkpoint = write_checkpoint(folder / "checkpoint", genes=profile.symbols)
    config = dataclasses.replace(
        CONFIG,
        tile=TileConfig(tile_cells=TILE_CELLS),
        embedder=EmbedderConfig(name="scgpt", checkpoint=str(checkpoint)),
    )
    new_catalog(folder / "atlas", sources, config=config)
    return folder / "atlas"


@contextmanager
def without_device():
    """Plan as for an embedder that uses none: one tile a task, nothing encoded on the way."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(streaming, "uses_device", lambda config: False)
        yield


@pytest.mark.parametrize(("device", "expected"), [("auto", True), ("cuda", True), ("cuda:1", True), ("cpu", False)])
def test_scgpt_uses_a_device_unless_it_is_told_to_stay_on_the_cpu(device, expected):
    assert streaming.uses_device(EmbedderConfig(name="scgpt", checkpoint="somewhere", device=device)) is expected


def test_the_closed_form_embedder_uses_none():
    assert not streaming.uses_device(EmbedderConfig())


@pytest.fixture(scope="module")
def trained(scgpt_root, tmp_path_factory):
    """The same after a run of one tile a task to the end."""
    root = tmp_path_factory.mktemp("trained") / "atlas"
    with without_device():
        run_here(plan(copied(scgpt_root, root)))
    return root


@pytest.fixture(scope="module")
def grown(trained, sources, tmp_path_factory):
    """The trained atlas with a slice that was not run yet and has a few cells without counts."""
    root = tmp_path_factory.mktemp("grown") / "atlas"
    adata = anndata.read_h5ad(sources / f"{NEW}.h5ad")
    counts = adata.X.toarray()
    counts[EMPTY] = 0
    adata.X = csr_matrix(counts)
    add_slice(copied(trained, root), adata, NEW, empty_cells="keep")
    return root


@pytest.fixture(scope="module")
def separately(grown, tmp_path_factory):
    """The new slice embedded tile by tile, and encoded afterwards."""
    root = tmp_path_factory.mktemp("separately") / "atlas"
    with without_device():
        return run_here(plan(copied(grown, root)))


def tasks_of_embed(made):
    return [task for task in made.tasks if task.stage == "embed" and task.function]


def test_a_slice_is_one_device_task_of_all_its_tiles(scgpt_root):
    tasks = tasks_of_embed(plan(open_catalog(scgpt_root)))
    assert [(task.slice_id, task.output.tiles) for task in tasks] == [(name, STARTS) for name in sorted(SLICES)]
    assert all(task.device and task.streams and task.n_cells == N_CELLS for task in tasks)


def test_a_large_slice_is_several_device_tasks(scgpt_root, monkeypatch):
    monkeypatch.setattr(streaming, "TILES_PER_TASK", 3)
    tasks = tasks_of_embed(plan(open_catalog(scgpt_root), slices=["simfish_1"]))
    assert [(task.output.tiles, task.n_cells) for task in tasks] == [(STARTS[:3], 48), (STARTS[3:], N_CELLS - 48)]


def test_an_embedder_without_a_device_has_one_task_a_tile(scgpt_root):
    with without_device():
        tasks = tasks_of_embed(plan(open_catalog(scgpt_root), slices=["simfish_1"]))
    assert [task.output.tiles for task in tasks] == [(start,) for start in STARTS]
    assert not any(task.device or task.streams for task in tasks)


def test_only_tasks_that_embed_want_a_device(scgpt_root):
    made = plan(open_catalog(scgpt_root))
    assert {task.stage for task in made.tasks if task.device} == {"embed"}


def test_an_embedding_that_is_diffused_itself_is_streamed_to_the_same_bytes(scgpt_root, tmp_path):
    catalogs = []
    for device in ("auto", "cpu"):
        catalog = with_settings(copied(scgpt_root, tmp_path / device), "propagation", diffuse="embedding")
        catalog = with_settings(catalog, "embedder", device=device)
        wanted = [task.name for task in plan(catalog).tasks if task.device]
        assert all("/plain/" in name for name in wanted)
        assert bool(wanted) == (device == "auto")
        catalogs.append(run_here(plan(catalog)))
    assert all_bytes(catalogs[0]) == all_bytes(catalogs[1])
    assert not list((catalogs[0].root / "staging").glob("*"))


@pytest.mark.parametrize("n_tiles", [1, 3, 16])
def test_tasks_of_several_tiles_change_no_byte(scgpt_root, trained, monkeypatch, tmp_path, n_tiles):
    monkeypatch.setattr(streaming, "TILES_PER_TASK", n_tiles)
    catalog = run_here(plan(copied(scgpt_root, tmp_path / "atlas")))
    assert all_bytes(catalog) == all_bytes(open_catalog(trained))
    assert catalog.state.objects == open_catalog(trained).state.objects


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("depth", [1, 8])
@pytest.mark.parametrize("in_memory", [False, True])
def test_how_a_stream_is_run_changes_no_byte(separately, monkeypatch, in_memory, depth, n_threads):
    monkeypatch.setenv(HOST_THREADS, str(n_threads))
    task = task_of(separately)
    arguments = {**task.arguments, "in_memory": in_memory, "depth": depth}
    starts = [STARTS[3], STARTS[1]]
    made = dict(embed.compute_tiles(starts=starts, **arguments))
    expected = all_bytes(separately)[NEW, "X_fp"]
    stored = np.frombuffer(expected, np.float16).reshape(N_CELLS, EMBEDDING_SIZE)
    assert list(made) == starts
    for start in starts:
        assert made[start]["X_fp"].tobytes() == stored[start : start + TILE_CELLS].tobytes()


def task_of(catalog):
    """The task that would embed the new slice, whether or not it is embedded."""
    record = catalog.slice(NEW)
    digest = embedder_factory("scgpt").digest(atlas_config(catalog).embedder)
    return embed_tasks.plan_stage(catalog, record, expected_objects(catalog, record), embedder_digest=digest)[0]


def test_counts_are_held_in_memory_up_to_the_slice_memory(grown, tmp_path):
    catalog = copied(grown, tmp_path / "atlas")
    held, streamed = task_of(catalog), task_of(with_settings(catalog, "tile", slice_memory_mb=0))
    assert (held.arguments["in_memory"], streamed.arguments["in_memory"]) == (True, False)


def test_a_task_of_more_tiles_is_projected_to_need_more_up_to_its_queue(grown, monkeypatch):
    needs = []
    for n_tiles in (1, 2, 4):
        monkeypatch.setattr(streaming, "TILES_PER_TASK", n_tiles)
        needs.append(task_of(open_catalog(grown)).projected_memory)
    assert needs[0] < needs[1] < needs[2]
    monkeypatch.setattr(streaming, "QUEUE_BYTES", 0)
    assert needs[1] < task_of(open_catalog(grown)).projected_memory < needs[2]


def test_a_new_slice_is_encoded_by_the_tasks_that_embed_it(grown):
    made = plan(open_catalog(grown))
    (task,) = tasks_of_embed(made)
    assert [output.tiles for output in task.outputs] == [STARTS, STARTS]
    (publish,) = (task for task in made.tasks if task.stage == "integrate")
    assert (publish.function, publish.requires, publish.n_cells) == ("", (task.name,), N_CELLS)
    assert publish.output.path == task.also[0].path


def test_encoding_on_the_way_changes_no_byte(grown, separately, tmp_path):
    catalog = run_here(plan(copied(grown, tmp_path / "atlas")))
    assert all_bytes(catalog) == all_bytes(separately)
    assert catalog.state.objects == separately.state.objects
    assert verify(catalog) == []
    assert plan(catalog).tasks == ()
    assert not list((catalog.root / "staging").glob("*"))


@pytest.mark.parametrize("name", ["X_fp", "X_lloki"])
def test_exactly_cells_without_counts_have_no_vector(grown, tmp_path, name):
    rows = embedding(run_here(plan(copied(grown, tmp_path / "atlas"))), NEW, name)
    assert np.isnan(rows).all(axis=1).sum() == len(EMPTY)
    assert np.isnan(rows).any(axis=1).sum() == len(EMPTY)


@pytest.mark.parametrize("done", [1, 3])
def test_an_interrupted_task_goes_on_with_the_same_bytes(grown, separately, tmp_path, done):
    catalog = copied(grown, tmp_path / "atlas")
    made = plan(catalog)
    for task in made.tasks:
        if task.device:
            only = {"tiles": STARTS[:done]}
            task = dataclasses.replace(
                task,
                output=dataclasses.replace(task.output, **only),
                also=tuple(dataclasses.replace(output, **only) for output in task.also),
            )
            run_task(task)
            break
        run_task(task)
    (left,) = tasks_of_embed(plan(catalog))
    assert [output.missing() for output in left.outputs] == [STARTS[done:]] * 2
    assert all_bytes(run_here(plan(catalog))) == all_bytes(separately)


def test_a_slice_that_is_embedded_already_is_encoded_by_tasks_of_their_own(grown, separately, tmp_path):
    catalog = run_here(plan(copied(grown, tmp_path / "atlas"), until="embed"))
    made = plan(catalog)
    assert stages(made) == {"integrate": 2}
    assert all_bytes(run_here(made)) == all_bytes(separately)


def test_a_first_run_encodes_after_the_training(scgpt_root):
    made = plan(open_catalog(scgpt_root))
    assert not any(task.also for task in made.tasks)
    assert stages(made)["integrate"] == 2 * 2


def test_training_anew_encodes_after_it(grown):
    made = plan(open_catalog(grown), train_on=[*SLICES, NEW])
    assert not any(task.also for task in made.tasks)


def test_a_run_until_the_embedding_encodes_nothing(grown):
    made = plan(open_catalog(grown), until="embed")
    assert not any(task.also for task in made.tasks)


def test_device_memory_of_a_run_reaches_its_tasks_and_no_key(grown):
    catalog = open_catalog(grown)
    usual, small = (tasks_of_embed(plan(catalog, device_memory_mb=mb))[0] for mb in (None, 77))
    assert usual.arguments["embedder"]["device_memory_mb"] == EmbedderConfig().device_memory_mb
    assert small.arguments["embedder"]["device_memory_mb"] == 77
    assert [output.path for output in small.outputs] == [output.path for output in usual.outputs]


@pytest.mark.parametrize("verb", [run, train_autoencoder])
def test_device_memory_and_gpu_workers_are_handed_on(grown, monkeypatch, tmp_path, verb):
    seen = {}

    def note(made, client, **options):
        seen.update(options, tasks=made.tasks)
        return "committed"

    monkeypatch.setattr(Plan, "run", note)
    assert verb(copied(grown, tmp_path / "atlas"), n_gpus=3, n_workers=5, device_memory_mb=77) == "committed"
    assert (seen["n_gpus"], seen["n_workers"]) == (3, 5)
    found = {task.arguments["embedder"]["device_memory_mb"] for task in seen["tasks"] if task.device}
    assert found == {77}


def test_an_encoder_is_loaded_once_and_again_when_its_file_changes(trained, tmp_path):
    catalog = open_catalog(trained)
    folder = tmp_path / "model"
    shutil.copytree(catalog.path("models", catalog.state.models["autoencoder"]), folder)
    first = streaming.frozen_encoder(str(folder))
    assert streaming.frozen_encoder(str(folder)) is first
    weights = folder / "weights.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(data)
    os.utime(weights, ns=(1, 1))
    assert streaming.frozen_encoder(str(folder)) is not first


@pytest.mark.parametrize("changed", ["token.safetensors", "../base/weights.safetensors"])
def test_the_encoder_of_a_token_is_loaded_again_when_either_of_its_files_changes(trained, tmp_path, changed):
    catalog = open_catalog(trained)
    base = shutil.copytree(catalog.path("models", catalog.state.models["autoencoder"]), tmp_path / "base")
    numbers = np.ones(10, np.float32)
    save_token(
        tmp_path / "token",
        Token("new", numbers, -numbers),
        model=base,
        settings={},
        history=[],
        evidence={},
        lineage={},
    )
    first = streaming.frozen_encoder(str(tmp_path / "token"))
    assert first.platforms[-1] == "new"
    assert streaming.frozen_encoder(str(tmp_path / "token")) is first
    # encoders of several platforms take turns in a worker
    streaming.frozen_encoder(str(base))
    assert streaming.frozen_encoder(str(tmp_path / "token")) is first
    os.utime(tmp_path / "token" / changed, ns=(1, 1))
    assert streaming.frozen_encoder(str(tmp_path / "token")) is not first


@pytest.fixture(scope="module")
def killed(grown, tmp_path_factory):
    """The new slice on two worker processes, the GPU worker killed when two of four tiles are written."""
    folder = tmp_path_factory.mktemp("killed")
    catalog = run_here(plan(copied(grown, folder / "atlas"), until="propagate"))
    made = plan(catalog)
    tasks = tuple(_killed_once(task, folder / "log") if task.device else task for task in made.tasks)
    with local_client_with_gpu(2) as client:
        done = dataclasses.replace(made, tasks=tasks).run(client, progress=False)
    return SimpleNamespace(catalog=done, log=notes(folder / "log"))


def _killed_once(task, log):
    arguments = {**task.arguments, "log": str(log), "name": task.name, "function": task.function, "after": 2}
    return dataclasses.replace(task, function="support.devices:killed_once", arguments=arguments)


def test_the_gpu_worker_was_killed_between_its_tiles(killed):
    name = f"embed/{NEW}/0"
    assert killed.log == [f"{name} {list(STARTS)} on {FAKE_GPU}", f"{name} {list(STARTS[2:])} on {FAKE_GPU}"]


def test_a_killed_gpu_worker_changes_no_byte(killed, separately):
    assert all_bytes(killed.catalog) == all_bytes(separately)
    assert killed.catalog.state.objects == separately.state.objects


def test_a_run_with_a_killed_gpu_worker_ends_whole(killed):
    assert verify(killed.catalog) == []
    assert all(is_complete(killed.catalog.path(*name.split("/"))) for name in killed.catalog.state.objects)
    assert plan(killed.catalog).tasks == ()


def test_a_run_without_a_gpu_worker_changes_no_byte(grown, separately, client, tmp_path):
    made = plan(copied(grown, tmp_path / "atlas"))
    assert any(task.device for task in made.tasks)
    done = made.run(client, progress=False)
    assert all_bytes(done) == all_bytes(separately)


def test_a_plan_of_device_tasks_writes_nothing(grown):
    before = folder_digest(grown)
    plan(open_catalog(grown))
    assert folder_digest(grown) == before
