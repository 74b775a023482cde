"""All benchmarks on one atlas: build time and memory, votes across technologies, coverage.

    python -m tests.benchmarks [MANIFEST] [--workers N] [--json]

Without a manifest: the real slices of catalogs/mouse-cortex.toml where their folder is there, else simulated ones.
With --json the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from lloki_atlas import open_catalog
from lloki_atlas.errors import InputError
from lloki_atlas.stages.manifest import read_manifest
from tests.benchmarks.votes import votes_in, votes_of_shared_genes


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", nargs="?")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--label-key", default="cell_type_coarse")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    manifest = arguments.manifest or _default_manifest()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "atlas"
        command = [sys.executable, "-m", "lloki_atlas.cli", "build", manifest, "--root", str(root), "--quiet"]
        command += ["--workers", str(arguments.workers)]
        report: dict[str, Any] = {
            "manifest": manifest,
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB",
            "workers": arguments.workers,
            **measure(command),
        }
        catalog = open_catalog(root)
        report["cells"] = sum(record.n_cells for record in catalog.state.slices.values())
        report["votes"] = {
            "shared genes": votes_of_shared_genes(catalog, arguments.label_key),
            "X_fp": votes_in(catalog, "X_fp", arguments.label_key),
            "X_lloki": votes_in(catalog, "X_lloki", arguments.label_key),
        }
    for key in ("manifest", "date", "machine", "workers", "cells", "seconds", "peak_memory_mb"):
        print(f"{key}: {report[key]}")
    print(pd.DataFrame(report["votes"]).T.round(3).to_string())
    if arguments.json:
        print(json.dumps(report))


def measure(command: list[str]) -> dict[str, float]:
    """Run a command; seconds, and the peak of the proportional set size of all its processes, in MB."""
    started, peak, over = time.perf_counter(), 0, threading.Event()
    process = subprocess.Popen(command)
    watched = psutil.Process(process.pid)
    while not over.wait(0.25):
        peak = max(peak, _set_size(watched))
        if process.poll() is not None:
            over.set()
    if process.returncode:
        sys.exit(process.returncode)
    return {"seconds": round(time.perf_counter() - started, 1), "peak_memory_mb": round(peak / 2**20)}


def _set_size(process: psutil.Process) -> int:
    total = 0
    try:
        for part in [process, *process.children(recursive=True)]:
            total += part.memory_full_info().pss
    except psutil.Error:
        pass  # a process that ends while it is looked at counts as nothing
    return total


def _default_manifest() -> str:
    real, simulated = "catalogs/mouse-cortex.toml", "catalogs/simulated.toml"
    try:
        return real if (read_manifest(real).data / "ref_mop_10x_biccn.h5ad").exists() else simulated
    except InputError:
        return simulated


if __name__ == "__main__":
    main()
