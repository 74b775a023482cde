"""The frozen encoder beside its three matrix products alone, and a slice from the store to its stored latents.

    python -m tests.benchmarks.encoding [--cells 400000] [--threads 2] [--json]

Random unit vectors in float16, as embeddings are stored, and random weights in the published shapes. Cells per second,
best of several rounds in which all take their turn: `encode` in memory; `gemm`, the three products alone on the same
cells as float32, as torch multiplies whole batches on so many threads or as single-threaded blocks on as many,
whichever is faster; `share`, the first of the second; `encode` in bfloat16, and the smallest cosine between its latents
and those in float32; `store_to_store`, the tasks of one slice in so many processes, until its latents are published;
`cluster`, the same as a local cluster of so many workers runs them. Of the last two, what they are of `encode`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from lloki_atlas.config import AutoencoderConfig
from lloki_atlas.engine.cluster import WORKER_ENVIRONMENT, local_client
from lloki_atlas.engine.plan import Plan, run_task
from lloki_atlas.models.autoencoder import ConditionalAutoencoder
from lloki_atlas.models.autoencoder_files import save_checkpoint
from lloki_atlas.models.encoder import BLOCK_ROWS, FrozenEncoder
from lloki_atlas.models.threads import torch_threads
from lloki_atlas.models.workers import Workers
from lloki_atlas.stages import integrate
from lloki_atlas.store.arrays import ArraySpec, create_arrays, write_rows
from lloki_atlas.store.records import SliceRecord
from tests.support.stores import tiny_catalog, tiny_slice, write_slice

TILE_CELLS = 4096
# short and many rounds: on a machine with other work the best of them is the one that was let alone
ROUNDS = 20
ROUND_CELLS = 65_536
STORED_ROUNDS = 4
PLATFORMS = ("MERFISH|a", "Xenium|b", "CosMx|c")
# on a processor without instructions for it bfloat16 takes several times as long
BFLOAT16_CELLS = 16_384


def unit_vectors(n_cells: int) -> np.ndarray:
    """(n_cells, 512) float16 rows of length 1."""
    rows = np.empty((n_cells, 512), np.float16)
    generator = np.random.default_rng(0)
    for start in range(0, n_cells, TILE_CELLS):
        values = generator.standard_normal((min(TILE_CELLS, n_cells - start), 512), dtype=np.float32)
        rows[start : start + len(values)] = values / np.linalg.norm(values, axis=1, keepdims=True)
    return rows


def random_model() -> ConditionalAutoencoder:
    """Random weights under which cells differ from layer to layer as much as in the embedding."""
    model = ConditionalAutoencoder(PLATFORMS, random_state=1)
    with torch.no_grad():
        for number, layer in enumerate(model.encoder):
            layer.weight.mul_(6**0.5 * (1 if number else 512**0.5))
    return model


def best(contenders: dict[str, Callable[[], Any]], *, rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds of the fastest run of each, taking turns."""
    seconds = dict.fromkeys(contenders, np.inf)
    for _ in range(rounds):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds


def products(rows: torch.Tensor, threads: int) -> dict[str, Callable[[], Any]]:
    """The three products alone: batches that torch cuts among its threads, and blocks on threads of one each."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((512, 256), (256, 175), (175, 128))
    weights = [torch.randn(size, generator=generator) * size[0] ** -0.5 for size in sizes]

    def multiply(parts: tuple[torch.Tensor, ...]) -> None:
        with torch.inference_mode():
            buffers = [torch.empty((len(parts[0]), size[1])) for size in sizes]
            for part in parts:
                values = part
                for weight, out in zip(weights, buffers, strict=True):
                    values = torch.mm(values, weight, out=out[: len(part)])

    def batches() -> None:
        with torch_threads(threads):
            multiply(rows.split(TILE_CELLS))

    def blocks() -> None:
        with Workers(threads) as workers:
            workers.each(lambda part: multiply(part.split(BLOCK_ROWS)), rows.split(TILE_CELLS))

    return {"batches": batches, "blocks": blocks}


def slice_plans(folder: Path, embeddings: np.ndarray, model: ConditionalAutoencoder) -> Iterator[Plan]:
    """Plans that encode a stored slice, each into an object of its own, which is removed when the next is asked for."""
    n_cells = len(embeddings)
    catalog = tiny_catalog(folder / "atlas")
    write_slice(catalog.path("slices", "cells"), tiny_slice(), tile_cells=TILE_CELLS)
    save_checkpoint(catalog.path("models", "model"), model, config=AutoencoderConfig(), history=[], lineage={})
    spec = ArraySpec((n_cells, 512), "float16", min(TILE_CELLS, n_cells), ("cell", "X_fp_dimension"))
    create_arrays(catalog.path("embeddings", "embedding"), {"X_fp": spec})
    write_rows(catalog.path("embeddings", "embedding"), "X_fp", 0, embeddings)
    technology, panel = PLATFORMS[0].split("|")
    record = SliceRecord("slice", technology, "mouse", panel, n_cells, 11, (), {"ingest": "cells"})
    for number in count():
        keys = {"embed": "embedding", "integrate": f"latents-{number}"}
        tasks = integrate.plan_stage(catalog, record, keys, model_key="model")
        yield Plan(tuple(tasks), lambda outcome: None)
        shutil.rmtree(catalog.path("embeddings", keys["integrate"]))


def store_to_store(plans: Iterator[Plan], processes: int) -> float:
    """Seconds of the tasks of one slice in single-threaded processes that have loaded what they need."""
    with (
        patch.dict(os.environ, {name: str(value) for name, value in WORKER_ENVIRONMENT.items()}),
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
    ):

        def run() -> None:
            *tiles, publish = next(plans).tasks
            list(pool.map(run_task, tiles))
            pool.submit(run_task, publish).result()

        run()
        return best({"slice": run}, rounds=STORED_ROUNDS)["slice"]


def on_cluster(plans: Iterator[Plan], workers: int) -> float:
    """Seconds of the same on a local cluster that is there already."""
    with local_client(workers, 0) as client:

        def run() -> None:
            next(plans).run(client, progress=False)

        run()
        return best({"slice": run}, rounds=STORED_ROUNDS)["slice"]


def measure(cells: int, threads: int) -> dict[str, float]:
    """Rates and what they are a share of.

    Parameters
    ----------
    cells
        Of the slice.
    threads
        In memory, and processes from store to store.

    Returns
    -------
    dict
        `encode_cells_per_s`, `gemm_cells_per_s`, `share`, `bfloat16_cells_per_s`, `bfloat16_min_cosine`,
        `store_to_store_cells_per_s`, `store_to_store_share`, `cluster_cells_per_s`, `cluster_share`.
    """
    model, embeddings = random_model(), unit_vectors(cells)
    encoder, some = FrozenEncoder(model), embeddings[:ROUND_CELLS]
    found = best(
        {
            "encode": lambda: encoder.encode(some, 0, n_threads=threads),
            **products(torch.from_numpy(some.astype(np.float32)), threads),
        }
    )
    few, rounded = embeddings[:BFLOAT16_CELLS], FrozenEncoder(model, precision="bfloat16")
    seconds = best({"bfloat16": lambda: rounded.encode(few, 0, n_threads=threads)}, rounds=3)["bfloat16"]
    one, other = (part.encode(few, 0, n_threads=threads).astype(np.float64) for part in (encoder, rounded))
    cosine = (one * other).sum(axis=1) / (np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1))
    with tempfile.TemporaryDirectory() as folder:
        plans = slice_plans(Path(folder), embeddings, model)
        stored, clustered = cells / store_to_store(plans, threads), cells / on_cluster(plans, threads)
    rate, gemm = len(some) / found["encode"], len(some) / min(found["batches"], found["blocks"])
    return {
        "encode_cells_per_s": rate,
        "gemm_cells_per_s": gemm,
        "share": rate / gemm,
        "bfloat16_cells_per_s": len(few) / seconds,
        "bfloat16_min_cosine": float(cosine.min()),
        "store_to_store_cells_per_s": stored,
        "store_to_store_share": stored / rate,
        "cluster_cells_per_s": clustered,
        "cluster_share": clustered / rate,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=400_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    report = measure(given.cells, given.threads)
    for key, value in report.items():
        print(f"{key}: {value:,.0f}" if key.endswith("_per_s") else f"{key}: {value:.5f}")
    if given.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
