"""Memory that tasks really take, against what the plan says they take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.atlases import TECHNOLOGIES, add_slice, copied
from support.checkpoints import write_checkpoint

from lloki_atlas.config import AtlasConfig, EmbedderConfig, TileConfig
from lloki_atlas.engine.devices import HOST_THREADS
from lloki_atlas.engine.plan import run_task
from lloki_atlas.simulation import simulate
from lloki_atlas.stages.create import create_catalog
from lloki_atlas.stages.pipeline import plan

AS_ONE_TASK = AtlasConfig(tile=TileConfig(search_cells=1_000_000))
STAGES = ("tile", "reference", "propagate", "embed")
# runs every task once on a tiny slice, so that code is loaded, then on the large one; peaks are the kernel's own
MEASURE = """
import gc, json, re, sys
from importlib import import_module

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def compute(task):
    module, _, name = task["function"].partition(":")
    made = getattr(import_module(module), name)(**task["arguments"])
    if "starts" not in task["arguments"]:
        return made
    for tile in made:  # as they are written, nothing of one is kept
        pass

tasks = json.load(sys.stdin)
for task in tasks["tiny"]:
    compute(task)
growth = {}
for task in tasks["large"]:
    gc.collect()
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as handle:
        handle.write("5")
    result = compute(task)
    growth[task["stage"]] = status("VmHWM") - before
    del result
print(json.dumps(growth))
"""


def first_of_each_stage(catalog):
    """Tasks of one slice up to the first tile of its embedding; all that they read is on disk afterwards."""
    chosen = {}
    for task in plan(catalog, until="embed").tasks:
        chosen.setdefault(task.stage, task)
    for stage in STAGES[:-1]:
        run_task(chosen[stage])
    return [chosen[stage] for stage in STAGES]


def plain(task):
    starts = {"starts": list(task.output.tiles)} if task.streams else {}
    return {"stage": task.stage, "function": task.function, "arguments": {**task.arguments, **starts}}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("simfish_plus_1", 6_000), id="255 genes"),
        pytest.param(("simfish_1", 40_000), id="33 dense genes", marks=pytest.mark.slow),
        pytest.param(("simfish_plus_1", 50_000), id="255 genes of many cells", marks=pytest.mark.slow),
    ],
)
def measured(request, tmp_path_factory, ingested, profile):
    """By stage: bytes by which the process grew, and bytes projected."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells the peak of a moment")
    slice_id, n_cells = request.param
    folder = tmp_path_factory.mktemp("memory")
    n_slices = list(TECHNOLOGIES).index(slice_id) + 1
    simulate(folder / "sources", n_cells=n_cells * n_slices, n_slices=n_slices)
    catalog = create_catalog(folder / "atlas", reference=profile, config=AS_ONE_TASK)
    large = first_of_each_stage(add_slice(catalog, folder / "sources", slice_id))
    tiny = first_of_each_stage(copied(ingested, folder / "tiny"))
    growth = measure({"tiny": tiny, "large": large})
    return {task.stage: (growth[task.stage], task.projected_memory) for task in large}


def measure(tasks, environment=None):
    """Bytes by which a process of its own grows, by stage."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        input=json.dumps({name: list(map(plain, part)) for name, part in tasks.items()}),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("stage", STAGES)
def test_a_task_takes_no_more_memory_than_projected(measured, stage):
    growth, projected = measured[stage]
    assert growth <= projected


@pytest.mark.parametrize("stage", ["propagate"])  # what comes later grows into memory that this one gave back
def test_a_projection_is_not_so_large_that_it_says_nothing(measured, stage):
    growth, projected = measured[stage]
    assert projected <= 8 * growth + 64 * 2**20


@pytest.mark.parametrize(
    "slice_memory_mb",
    [pytest.param(0, id="counts from disk"), pytest.param(1024, id="counts in memory", marks=pytest.mark.slow)],
)
def test_tiles_that_stream_through_a_device_take_no_more_memory_than_projected(
    tmp_path, sources, profile, slice_memory_mb
):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells the peak of a moment")
    checkpoint = write_checkpoint(tmp_path / "checkpoint", genes=profile.symbols, embsize=8, nlayers=1, nheads=1)
    embedder = EmbedderConfig(name="scgpt", checkpoint=str(checkpoint), device="cpu:0")
    tasks = {}
    for name, n_cells in (("tiny", 60), ("large", 3_000)):
        folder = tmp_path / name
        simulate(folder / "sources", n_cells=3 * n_cells, n_slices=3)
        config = AtlasConfig(tile=TileConfig(256, slice_memory_mb), embedder=embedder)
        catalog = create_catalog(folder / "atlas", reference=profile, config=config)
        tasks[name] = first_of_each_stage(add_slice(catalog, folder / "sources", "simfish_plus_1"))[-1:]
    (task,) = tasks["large"]
    assert (len(task.output.tiles), task.arguments["in_memory"]) == (12, slice_memory_mb > 0)
    growth = measure(tasks, environment={HOST_THREADS: "4"})
    assert growth["embed"] <= task.projected_memory
