"""LLOKI-FP of a slice that is larger than the memory it may use.

    python -m tests.benchmarks.out_of_core [--cells 500000] [--genes 100] [--limit-mb 1536] [--chain] [--json]

A seeded slice is written and ingested by one process; another runs every task up to the 512-d embedding's first tile,
one after the other, under a limit of the data it may hold (RLIMIT_DATA) above what its imports and compiled kernels
take. Printed for each task: seconds, peak above the baseline, and what the plan had projected. `--chain` runs large
slices as the chain of small tasks instead of one. `--linear 10000 50000 200000` fits the exponent of the peak over
cells instead.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SLICE = "large"


def status(name: str) -> int:
    """Bytes of one line of this process's status."""
    return int(re.search(name + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def make_counts(n_cells: int, n_genes: int, *, kinds: int, density: float, seed: int) -> Any:
    """Poisson counts of cells of `kinds` types as CSR, with about `density` of the entries not zero."""
    from scipy.sparse import csr_matrix, vstack

    draws = np.random.default_rng(seed)
    means = draws.gamma(0.6, 1.0, size=(kinds, n_genes))
    means *= density / np.mean(1 - np.exp(-means))
    parts = []
    for start in range(0, n_cells, 20_000):
        size = min(20_000, n_cells - start)
        depth = draws.lognormal(0.0, 0.4, size=(size, 1))
        parts.append(csr_matrix(draws.poisson(means[draws.integers(0, kinds, size)] * depth).astype(np.float32)))
    return vstack(parts, format="csr")


def prepare(folder: Path, n_cells: int, n_genes: int, chain: bool) -> None:
    """Make a catalog with one slice, and the list of its tasks."""
    import pandas as pd
    from anndata import AnnData

    from lloki_atlas.config import AtlasConfig, PropagationConfig, TileConfig
    from lloki_atlas.engine.plan import run_task
    from lloki_atlas.stages.create import create_catalog
    from lloki_atlas.stages.ingest import ingest
    from lloki_atlas.stages.pipeline import plan

    genes = pd.DataFrame(index=[f"GENE{gene}" for gene in range(n_genes)])
    reference = AnnData(make_counts(3000, n_genes, kinds=12, density=0.4, seed=2), var=genes)
    tiles = TileConfig(slice_memory_mb=0, search_cells=65_536 if chain else n_cells)
    config = AtlasConfig(tile=tiles, propagation=PropagationConfig())
    catalog = create_catalog(folder / "atlas", reference=reference, organism="human", config=config)
    for slice_id, cells in (("tiny", 3000), (SLICE, n_cells)):
        counts = make_counts(cells, n_genes, kinds=12, density=0.2, seed=1)
        places = np.random.default_rng(3).random((cells, 2)) * np.sqrt(cells * 100.0)
        adata = AnnData(counts, var=genes, obsm={"spatial": places.astype(np.float32)})
        catalog = ingest(
            catalog, adata, slice_id=slice_id, technology="simulated", organism="human",
            coordinate_unit="micrometer", empty_cells="keep",
        )  # fmt: skip
    tasks = []
    for task in plan(catalog, until="embed").tasks:
        if task.stage == "reference":
            run_task(task)
        elif task.stage != "embed" or 0 in task.output.tiles:
            tasks.append(task)
    import pickle

    # the tiny slice first: it loads and compiles all code
    tasks.sort(key=lambda task: task.slice_id == SLICE)
    (folder / "tasks.pickle").write_bytes(pickle.dumps(tasks))


def measure(folder: Path, limit_mb: int) -> None:
    """Run the tasks and print one JSON line each."""
    import gc
    import pickle

    from lloki_atlas.engine.plan import run_task

    tasks = pickle.loads((folder / "tasks.pickle").read_bytes())
    baseline = None
    for task in tasks:
        if task.slice_id == SLICE and baseline is None:
            gc.collect()
            baseline, data = status("VmRSS"), status("VmData")
            if limit_mb:
                resource.setrlimit(resource.RLIMIT_DATA, (data + limit_mb * 2**20,) * 2)
        Path("/proc/self/clear_refs").write_text("5")
        started = time.perf_counter()
        run_task(task)
        if baseline is not None:
            seconds, peak = time.perf_counter() - started, status("VmHWM") - baseline
            report = {
                "task": task.name,
                "seconds": round(seconds, 1),
                "peak_mb": round(peak / 2**20),
                "projected_mb": round(task.projected_memory / 2**20),
            }
            print(json.dumps(report), flush=True)


def run(n_cells: int, n_genes: int, limit_mb: int, chain: bool) -> list[dict[str, Any]]:
    """Measure one slice in fresh processes."""
    with tempfile.TemporaryDirectory() as name:
        me = [sys.executable, "-m", "tests.benchmarks.out_of_core", "--cells", str(n_cells), "--genes", str(n_genes)]
        me += ["--limit-mb", str(limit_mb), *(["--chain"] if chain else [])]
        subprocess.run([*me, "--prepare", name], check=True)
        done = subprocess.run([*me, "--measure", name], check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=500_000)
    parser.add_argument("--genes", type=int, default=100)
    parser.add_argument("--limit-mb", type=int, default=1536, help="0: no limit")
    parser.add_argument("--chain", action="store_true")
    parser.add_argument("--linear", type=int, nargs="+", metavar="CELLS")
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.prepare:
        return prepare(Path(given.prepare), given.cells, given.genes, given.chain)
    if given.measure:
        return measure(Path(given.measure), given.limit_mb)
    sizes = given.linear or [given.cells]
    reports, peaks = [], []
    for n_cells in sizes:
        rows = run(n_cells, given.genes, given.limit_mb, given.chain)
        peaks.append(max(row["peak_mb"] for row in rows if row["task"].startswith("propagate")))
        for row in rows:
            over = "  MORE THAN PROJECTED" if row["peak_mb"] > row["projected_mb"] else ""
            print(
                f"{n_cells:>9,} cells  {row['task']:<32} {row['seconds']:>8.1f} s  peak {row['peak_mb']:>6} MiB  "
                f"projected {row['projected_mb']:>6} MiB{over}"
            )
        print(f"{n_cells:>9,} cells  propagate: {peaks[-1] * 2**20 / n_cells / 1000:.2f} kB per cell")
        reports.append({"cells": n_cells, "genes": given.genes, "tasks": rows, "peak_mb": peaks[-1]})
    if len(sizes) > 1:
        exponent = float(np.polyfit(np.log(sizes), np.log(peaks), 1)[0])
        print(f"peak grows as cells ^ {exponent:.3f}")
    if given.json:
        print(json.dumps(reports))
    return None


if __name__ == "__main__":
    main()
