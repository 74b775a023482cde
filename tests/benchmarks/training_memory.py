"""Memory of training the autoencoder on atlases of different sizes.

    python -m tests.benchmarks.training_memory [--cells 20000 2000000] [--epochs 2] [--labels] [--json]

For each size simulated embeddings of five platforms in several slices are written to a temporary folder (1 kB a cell),
and a process of its own trains on them. Printed: peak of its resident memory, the part above what its imports take,
what the plan projects for that part, seconds an epoch, and bytes read.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PLATFORMS = 5
SLICES = 2  # of each platform
TILE_CELLS = 4096


def status(path: str, name: str) -> int:
    """A number that the kernel tells of this process."""
    return int(re.search(name + r":\s+(\d+)", Path(path).read_text())[1])  # type: ignore[index]


def simulated(n_cells: int, *, platform: int, seed: int) -> Iterator[np.ndarray]:
    """Unit vectors (n, 512) float16, a tile at a time: types that all platforms share, an offset, and noise."""
    centers = np.random.default_rng(0).normal(size=(12, 512)).astype(np.float32)
    shift = np.random.default_rng([1, platform]).normal(size=512).astype(np.float32)
    for start in range(0, n_cells, TILE_CELLS):
        rng = np.random.default_rng([2, platform, seed, start])
        size = min(TILE_CELLS, n_cells - start)
        rows = centers[rng.integers(0, 12, size)] + 0.7 * shift + rng.standard_normal((size, 512), dtype=np.float32)
        yield (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def write_atlas(folder: Path, n_cells: int) -> list[dict[str, Any]]:
    """Write the embeddings; what the training task is told of each slice."""
    from lloki_atlas.store.arrays import ArraySpec, create_arrays, write_rows

    n_slices, samples = PLATFORMS * SLICES, []
    for number in range(n_slices):
        platform, size = number % PLATFORMS, n_cells * (number + 1) // n_slices - n_cells * number // n_slices
        path = folder / f"slice_{number}.zarr"
        create_arrays(path, {"X_fp": ArraySpec((size, 512), "float16", TILE_CELLS, ("cell", "dimension"))})
        for tile, rows in enumerate(simulated(size, platform=platform, seed=number)):
            write_rows(path, "X_fp", tile * TILE_CELLS, rows)
        sample = {"slice_id": f"slice_{number}", "platform": f"platform {platform}", "token": f"platform {platform}"}
        samples.append({**sample, "n_cells": size, "embedding_key": "", "embedding_path": str(path), "slice_path": ""})
    return samples


def measure(folder: Path, samples: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, float]:
    """Train in this process."""
    from lloki_atlas.config import AutoencoderConfig
    from lloki_atlas.stages.train import train
    from lloki_atlas.stages.train_cells import most_cells
    from lloki_atlas.stages.train_memory import training_memory

    config = AutoencoderConfig(**settings)
    warm = [sample | {"n_cells": min(100, sample["n_cells"])} for sample in samples[: 2 * PLATFORMS]]
    # loads and compiles all code
    train(str(folder / "warm"), warm, {**settings, "n_epochs": 1, "chunk_cells": 200}, None)
    before, read, started = status("/proc/self/status", "VmRSS") * 1024, status("/proc/self/io", "rchar"), time.time()
    # the peak so far is that of compiling
    Path("/proc/self/clear_refs").write_text("5")
    train(str(folder / "model"), samples, settings, None)
    peak = status("/proc/self/status", "VmHWM") * 1024
    n_cells = sum(sample["n_cells"] for sample in samples)
    token_cells = [cells for _, cells in most_cells(samples, config.max_cells_per_technology)]
    return {
        "peak": peak,
        "growth": peak - before,
        "projected": training_memory(token_cells, n_cells, config, labelled=False),
        "seconds_per_epoch": (time.time() - started) / config.n_epochs,
        "bytes_read": status("/proc/self/io", "rchar") - read,
    }


def run(n_cells: int, **settings: Any) -> dict[str, float]:
    """Write an atlas, and train on it in a fresh process."""
    with tempfile.TemporaryDirectory() as name:
        given = {"folder": name, "samples": write_atlas(Path(name), n_cells), "settings": settings}
        command = [sys.executable, __file__, "--measure"]
        done = subprocess.run(command, input=json.dumps(given), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[20_000, 2_000_000])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--chunk-cells", type=int, default=4000)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.measure:
        given = json.load(sys.stdin)
        print(json.dumps(measure(Path(given["folder"]), given["samples"], given["settings"])))
        return
    reports = []
    for n_cells in arguments.cells:
        report = {"cells": n_cells, **run(n_cells, n_epochs=arguments.epochs, chunk_cells=arguments.chunk_cells)}
        reports.append(report)
        print(
            f"{n_cells:>10,} cells  peak {report['peak'] / 2**20:6.0f} MiB  above imports "
            f"{report['growth'] / 2**20:6.0f} MiB  projected {report['projected'] / 2**20:6.0f} MiB  "
            f"{report['seconds_per_epoch']:6.2f} s an epoch  read {report['bytes_read'] / 2**20:8.0f} MiB",
            flush=True,
        )
    if len(reports) > 1:
        ratio = max(report["peak"] for report in reports) / min(report["peak"] for report in reports)
        print(f"largest over smallest peak: {ratio:.3f}")
    if arguments.json:
        print(json.dumps(reports))


if __name__ == "__main__":
    main()
