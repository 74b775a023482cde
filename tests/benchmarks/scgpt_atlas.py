"""From a stored slice to its committed 128-d embedding through scGPT and the frozen encoder, on a local cluster.

    python -m tests.benchmarks.scgpt_atlas [--cells 50000] [--genes 600] [--precision bfloat16] [--gpus N] [--json]

A catalog with seeded counts of --genes genes, embedded by scGPT with random weights in the shapes of the published
model (--layers, --width for a quick look). A small slice comes first: it trains the encoder, compiles what there is to
compile and leaves the model on the workers. Then the large slice is ingested, and timed are a run up to the graph
(`propagate_seconds`) and the run from there to the commit of the 128-d embedding (`seconds`). Diffused cells have
nearly every gene: `tokens_per_cell` is measured on the first tile.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from lloki_atlas.config import AtlasConfig, AutoencoderConfig, EmbedderConfig
from lloki_atlas.engine.cluster import local_client
from lloki_atlas.kernels.diffusion import diffuse
from lloki_atlas.kernels.graph import Graph
from lloki_atlas.stages.create import create_catalog
from lloki_atlas.stages.ingest import ingest
from lloki_atlas.stages.panels import panel_counts, reference_symbols
from lloki_atlas.stages.pipeline import run
from lloki_atlas.store.arrays import read_arrays
from lloki_atlas.store.catalog import Catalog
from lloki_atlas.store.slices import SliceStore
from tests.benchmarks.out_of_core import make_counts
from tests.support.checkpoints import write_checkpoint

SMALL = 1500


def make_catalog(folder: Path, given: argparse.Namespace, names: list[str]) -> Catalog:
    """A catalog without slices, and the checkpoint of its embedder."""
    checkpoint = write_checkpoint(
        folder / "checkpoint", genes=names, embsize=given.width, nheads=8, d_hid=given.width, nlayers=given.layers
    )
    reference = AnnData(make_counts(3000, len(names), kinds=12, density=0.4, seed=2), var=pd.DataFrame(index=names))
    config = AtlasConfig(
        embedder=EmbedderConfig(
            name="scgpt",
            checkpoint=str(checkpoint),
            precision=given.precision,
            device_memory_mb=given.device_memory,
        ),
        autoencoder=AutoencoderConfig(n_epochs=2),
    )
    return create_catalog(folder / "atlas", reference=reference, organism="human", config=config)


def add_slice(catalog: Catalog, slice_id: str, n_cells: int, names: list[str]) -> Catalog:
    """Ingest seeded counts at random places."""
    counts = make_counts(n_cells, len(names), kinds=12, density=0.3, seed=1)
    places = np.random.default_rng(3).random((n_cells, 2)) * np.sqrt(n_cells * 100.0)
    adata = AnnData(counts, var=pd.DataFrame(index=names), obsm={"spatial": places.astype(np.float32)})
    return ingest(
        catalog, adata, slice_id=slice_id, technology="simulated", organism="human", coordinate_unit="micrometer",
        empty_cells="keep",
    )  # fmt: skip


def tokens_per_cell(catalog: Catalog, slice_id: str) -> float:
    """Mean non-zero genes of the first cells after diffusion, and `<cls>`."""
    objects = catalog.slice(slice_id).objects
    reference = catalog.path("references", str(catalog.state.reference))
    panel = panel_counts(SliceStore(catalog.path("slices", objects["ingest"])), reference_symbols(str(reference)))
    arrays = read_arrays(str(catalog.path("graphs", objects["propagate"])), ["indptr", "indices", "weights"])
    rows = diffuse(Graph(**arrays), panel.shared_counts, start=0, stop=min(1000, panel.shared_counts.shape[0]))
    return float(np.count_nonzero(rows, axis=1).mean() + 1)


def timed(catalog: Catalog, client: Any, until: str) -> tuple[Catalog, float]:
    """Run up to a stage; seconds from the plan to the commit."""
    started = time.perf_counter()
    catalog = run(catalog, client=client, progress=False, until=until)
    return catalog, time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=50_000)
    parser.add_argument("--genes", type=int, default=600)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--device-memory", type=int, default=2048, help="in 2^20 bytes")
    parser.add_argument("--gpus", type=int, help="[default: those of the machine]")
    parser.add_argument("--workers", type=int, help="[default: one a core]")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    names = [f"GENE{gene}" for gene in range(given.genes)]
    with tempfile.TemporaryDirectory() as name, local_client(given.workers, given.gpus) as client:
        catalog = add_slice(make_catalog(Path(name), given, names), "small", SMALL, names)
        catalog, _ = timed(catalog, client, "integrate")
        catalog = add_slice(catalog, "large", given.cells, names)
        catalog, propagated = timed(catalog, client, "propagate")
        catalog, seconds = timed(catalog, client, "integrate")
        report = {
            "cells": given.cells,
            "tokens_per_cell": round(tokens_per_cell(catalog, "large"), 1),
            "precision": given.precision,
            "gpus": sum("GPU" in worker["resources"] for worker in client.scheduler_info()["workers"].values()),
            "propagate_seconds": round(propagated, 2),
            "seconds": round(seconds, 2),
            "cells_per_s": round(given.cells / seconds, 1),
        }
    for key, value in report.items():
        print(f"{key}: {value}")
    if given.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
