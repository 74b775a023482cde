"""Training of LLOKI-CAE: ours beside the authors' code, on the same cells, chunks, weights and threads.

    python -m tests.benchmarks.cae --checkout DIR [--cells 20000] [--epochs 3] [--threads 2] [--repeats 2] [--json]

Cells are seeded: unit rows of 512 numbers, 20 types that each of five batches shows, shifted by the batch. Contenders
(`tests.benchmarks.cae_rivals`), each in a process of its own after a warm-up on 600 cells, in turns: `authors`, their
training loop as it is, checkpoints and figures left out; `ours`, the preset `reference` on the same chunks from the
same weights; `default`, our default settings, with new chunks in every epoch. Losses are those that the authors report,
the triplet loss weighted and the conservation loss not. Negatives are drawn at random by both programs, so `authors`
and `ours` differ by the draw; with the same negatives they are equal (tests/parity/test_published_autoencoder.py).

Seconds are of the best repeat, from the arrays to the last update, the search of the conserved neighbours included;
`cpu_s` are those of all threads together, waiting for each other included, which on a busy machine is a lot. Peaks are
VmHWM of the process, and above what it held with the sample loaded. The last line of --json has at least `speedup`
(authors' seconds by ours), `loss_difference` (largest relative difference of an epoch's total), `default_s_per_epoch`
and, where tests.benchmarks.encoding is there, `encode_cells_per_s`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.cae_rivals import CONTENDERS, LOSSES, make_sample

ROOT = Path(__file__).parents[2]
ENCODING = "tests.benchmarks.encoding"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, help="folder with the authors' code")
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--chunk-cells", type=int, default=4000)
    parser.add_argument("--neighbors", type=int, default=40, help="mutual neighbours of authors and ours")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--encode-cells", type=int, default=400_000, help="cells of the encoder's rates; 0 leaves them out"
    )
    parser.add_argument("--contenders", choices=CONTENDERS, nargs="+", default=list(CONTENDERS))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if not given.checkout:
        print("the authors' code is not run: no --checkout", file=sys.stderr)
        given.contenders = [name for name in given.contenders if name != "authors"]
    with tempfile.TemporaryDirectory() as scratch:
        sample = Path(scratch) / "sample.npz"
        np.savez(sample, **make_sample(given.cells, given.seed))
        found: dict[str, dict[str, Any]] = {}
        for _ in range(given.repeats):
            for name in given.contenders:
                result = run(name, sample, given)
                print(line(name, result), file=sys.stderr, flush=True)
                if name not in found or result["seconds"] < found[name]["seconds"]:
                    found[name] = result
    report = summary(found) | encoding(given.encode_cells, given.threads)
    report |= {"cells": given.cells, "threads": given.threads, "chunk_cells": given.chunk_cells, "contenders": found}
    print(json.dumps(report) if given.json else table(found) + "\n\n" + epochs_table(found) + "\n\n" + figures(report))


def run(name: str, sample: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One contender in a process of its own."""
    out = sample.with_name(f"{name}.json")
    command = [sys.executable, "-m", "tests.benchmarks.cae_rivals", name, "--sample", str(sample), "--out", str(out)]
    command += ["--epochs", str(given.epochs), "--chunk-cells", str(given.chunk_cells)]
    command += ["--neighbors", str(given.neighbors), "--threads", str(given.threads)]
    if given.checkout:
        command += ["--checkout", str(given.checkout.resolve())]
    limits = dict.fromkeys(THREADS, str(given.threads))
    subprocess.run(command, cwd=ROOT, env={**os.environ, **limits}, check=True, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text())


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures of the last line."""
    report: dict[str, Any] = {}
    if "default" in found:
        report["default_s_per_epoch"] = min(epoch["seconds"] for epoch in found["default"]["epochs"])
    if not {"authors", "ours"} <= set(found):
        return report
    theirs, ours = found["authors"], found["ours"]
    report["speedup"] = theirs["seconds"] / ours["seconds"]
    report["speedup_cpu"] = theirs["cpu_s"] / ours["cpu_s"]
    pairs = list(zip(theirs["epochs"], ours["epochs"], strict=True))
    report["speedup_last_epoch"] = pairs[-1][0]["seconds"] / pairs[-1][1]["seconds"]
    report["loss_difference"] = max(abs(b["total"] - a["total"]) / a["total"] for a, b in pairs)
    report["memory_ratio"] = theirs["above_sample_mb"] / ours["above_sample_mb"]
    return report


def encoding(n_cells: int, n_threads: int) -> dict[str, Any]:
    """`encode_cells_per_s` and what else the benchmark of the encoder reports."""
    if not n_cells or importlib.util.find_spec(ENCODING) is None:
        return {}
    return dict(importlib.import_module(ENCODING).measure(n_cells, n_threads))


COLUMNS = ("seconds", "cpu_s", "s_per_epoch", "warm_up_s", "peak_mb", "above_sample_mb")


def line(name: str, result: dict[str, Any]) -> str:
    """One run as text."""
    losses = " ".join(f"{epoch['total']:.4f}" for epoch in result["epochs"])
    return f"{name}  {result['seconds']:.2f} s  total losses {losses}  peak {result['peak_mb']:.0f} MB"


def table(found: dict[str, dict[str, Any]]) -> str:
    """Times and memory as a Markdown table."""
    lines = ["| contender | " + " | ".join(COLUMNS) + " |", "|" + " --- |" * (len(COLUMNS) + 1)]
    for name, result in found.items():
        row = {**result, "s_per_epoch": result["seconds"] / len(result["epochs"])}
        lines.append(f"| {name} | " + " | ".join(f"{row[column]:.4g}" for column in COLUMNS) + " |")
    return "\n".join(lines)


def epochs_table(found: dict[str, dict[str, Any]]) -> str:
    """Losses and seconds of every epoch as a Markdown table."""
    columns = (*LOSSES, "seconds")
    lines = ["| contender | epoch | " + " | ".join(columns) + " |", "|" + " --- |" * (len(columns) + 2)]
    for name, result in found.items():
        for number, epoch in enumerate(result["epochs"], 1):
            lines.append(f"| {name} | {number} | " + " | ".join(f"{epoch[column]:.5g}" for column in columns) + " |")
    return "\n".join(lines)


def figures(report: dict[str, Any]) -> str:
    """The numbers of the report, one a line."""
    return "\n".join(f"{name}: {value:.4g}" for name, value in report.items() if isinstance(value, int | float))


if __name__ == "__main__":
    main()
