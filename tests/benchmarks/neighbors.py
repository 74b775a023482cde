"""The exact neighbour search beside scikit-learn's brute force and the machine's matrix product.

    python -m tests.benchmarks.neighbors [--cells 10000] [--dimensions 500] [--threads 2] [--json]

Seeded clusters of non-negative float32 rows. Printed: seconds of each (best of three, kernels warm), their ratio, and
the half-matrix rate (n² d operations) as a share of float32 GEMM on as many threads in the same run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from lloki_atlas.kernels.neighbors import nearest_neighbors


def best_of_three(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of three runs."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--dimensions", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--n-neighbors", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(30, given.dimensions))
    noise = generator.normal(size=(given.cells, given.dimensions))
    rows = np.abs(centres[generator.integers(0, 30, given.cells)] + noise).astype(np.float32)
    nearest_neighbors(rows[:600], n_neighbors=given.n_neighbors, n_threads=given.threads)  # compile

    def brute() -> None:
        model = NearestNeighbors(n_neighbors=given.n_neighbors + 1, metric="cosine", algorithm="brute")
        model.fit(rows).kneighbors(rows)

    left, right = rows[:4096].copy(), rows[:4096].copy()
    with threadpool_limits(given.threads):
        product = best_of_three(lambda: left @ right.T)
        theirs = best_of_three(brute)
    ours = best_of_three(lambda: nearest_neighbors(rows, n_neighbors=given.n_neighbors, n_threads=given.threads))
    gemm_rate = 2 * len(left) ** 2 * given.dimensions / product / 1e9
    rate = given.cells**2 * given.dimensions / ours / 1e9
    report = {
        "cells": given.cells,
        "dimensions": given.dimensions,
        "threads": given.threads,
        "seconds": round(ours, 3),
        "sklearn_seconds": round(theirs, 3),
        "speedup": round(theirs / ours, 2),
        "gflops": round(rate, 1),
        "gemm_gflops": round(gemm_rate, 1),
        "share_of_gemm": round(rate / gemm_rate, 3),
    }
    for key, value in report.items():
        print(f"{key}: {value}")
    if given.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
