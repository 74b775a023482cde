"""Cells per second of scGPT's embedding: ours beside the `scgpt` package, on the same weights, cells and device.

    python -m tests.benchmarks.scgpt [--lengths 100 300 600 1200] [--device auto] [--checkpoint DIR] [--json]

Cells are seeded, with 80 to 120 % of the length as non-zero genes, all values distinct, so that both sides make the
same tokens. Contenders: `scgpt` (`embed_data` as it is shipped, 64 cells a batch), `scgpt-best` (its fastest batch
size at --choose-at), `scgpt-plain` (the same without torch's fused layers), `float32`, `bfloat16` and `float16` (ours).
Every time is of one call from the checkpoint folder to the embedding, loading included, the best of --repeats calls
that take turns. Weights are random in the shapes of the published model unless --checkpoint says otherwise.

`share_of_peak`: the operations of what is computed (of the last layer, `<cls>` alone), against a 4,096 x 4,096 product
in the same type on as many threads. On a GPU also the peak of the memory that torch has allocated. The last line of
--json has at least `speedup_fp32` and `speedup_bf16` (against `scgpt`), the same with `_best_batch` (against
`scgpt-best`), `cells_per_s` and `share_of_peak` (of the faster of our precisions), all at the length nearest 300 on a
CPU, 600 on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lloki_atlas.models.scgpt import ScGPT, load_scgpt
from tests.support.checkpoints import write_checkpoint
from tests.support.scgpt_oracle import import_scgpt

OURS = ("float32", "bfloat16", "float16")
N_GENES = 1500
CPU_CELLS = {100: 256, 300: 192, 600: 64, 1200: 24}
SHIPPED_BATCH = 64
GPU_CELLS = 4000


def make_cells(n_cells: int, length: int) -> np.ndarray:
    """Distinct values in 80 to 120 % of `length` genes a cell, at most 1,199, (n_cells, N_GENES) float32."""
    generator = np.random.default_rng(length)
    rows = np.zeros((n_cells, N_GENES), dtype=np.float32)
    for row in rows:
        size = min(1199, int(generator.integers(int(0.8 * length), int(1.2 * length) + 1)))
        row[generator.permutation(N_GENES)[:size]] = generator.permutation(size) + generator.uniform(1.1, 1.9, size)
    return rows


def embed_with_package(
    scgpt: types.ModuleType,
    folder: Path,
    rows: np.ndarray,
    genes: list[str],
    *,
    batch_size: int,
    device: str,
    fused: bool,
) -> np.ndarray:
    """`scgpt.tasks.embed_data`, (n_cells, embsize) float32."""
    import anndata

    table = anndata.AnnData(rows)
    table.var["feature_name"] = genes
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        with _silent():
            embedded = scgpt.tasks.embed_data(
                table, folder, batch_size=batch_size, device=device, use_fast_transformer=device != "cpu"
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    return np.asarray(embedded.obsm["X_scGPT"])


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    logging.getLogger("scGPT").setLevel(logging.ERROR)
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        contextlib.redirect_stdout(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def operations(model: ScGPT, rows: np.ndarray) -> float:
    """Multiplications and additions of the products that are computed for these cells, padding left out."""
    lengths = np.count_nonzero(rows, axis=1) + 1.0
    width, hidden, inner = model.settings.embsize, model.settings.d_hid, model.settings.nlayers - 1
    layer = lengths * (8 * width**2 + 4 * width * hidden) + 4 * lengths**2 * width
    last = 4 * model.settings.nheads * width * lengths + 8 * width**2 + 4 * width * hidden
    return float((inner * layer + last).sum())


def product_rate(dtype: torch.dtype, device: str, n_threads: int) -> float:
    """Operations per second of a 4,096 x 4,096 product."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    size = 4096 if device == "cpu" else 8192
    left = torch.randn(size, size).to(device, dtype)
    seconds = []
    for _ in range(4):
        _wait(device)
        started = time.perf_counter()
        left @ left
        _wait(device)
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(before)
    return 2 * size**3 / min(seconds)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def contenders(
    folder: Path, rows: np.ndarray, genes: list[str], *, device: str, n_threads: int, batch_size: int, wanted: list[str]
) -> dict[str, Callable[[], np.ndarray]]:
    """Each contender as a call from the folder to the embedding."""
    scgpt = import_scgpt() if any(name.startswith("scgpt") for name in wanted) else None

    def package(size: int, fused: bool = True) -> np.ndarray:
        assert scgpt is not None
        return embed_with_package(scgpt, folder, rows, genes, batch_size=size, device=device, fused=fused)

    def ours(precision: str) -> np.ndarray:
        return load_scgpt(folder, device=device, precision=precision).embed(rows, genes, n_threads=n_threads)

    calls: dict[str, Callable[[], np.ndarray]] = {
        "scgpt": lambda: package(SHIPPED_BATCH),
        "scgpt-best": lambda: package(batch_size),
        "scgpt-plain": lambda: package(batch_size, fused=False),
        **{precision: (lambda precision=precision: ours(precision)) for precision in OURS},
    }
    return {name: calls[name] for name in wanted}


def measure(calls: dict[str, Callable[[], np.ndarray]], *, repeats: int, device: str) -> dict[str, dict[str, Any]]:
    """Best seconds of each, their embeddings' agreement with the first, and the peak of a GPU's memory."""
    found: dict[str, dict[str, Any]] = {name: {"seconds": np.inf} for name in calls}
    first = None
    for _ in range(repeats):
        for name, call in calls.items():
            if device != "cpu":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            embedding = call()
            seconds = time.perf_counter() - started
            first = embedding if first is None else first
            row = found[name]
            row["seconds"] = min(row["seconds"], seconds)
            row["min_cosine"] = float((embedding * first).sum(axis=1).min())
            row["max_difference"] = float(np.abs(embedding - first).max())
            if device != "cpu":
                row["device_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def best_batch(folder: Path, genes: list[str], *, length: int, sizes: list[int], device: str) -> int:
    """The package's fastest batch size, on a few cells."""
    scgpt, rows, seconds = import_scgpt(), make_cells(64 if device == "cpu" else 1000, length), {}
    for size in sizes:
        started = time.perf_counter()
        embed_with_package(scgpt, folder, rows, genes, batch_size=size, device=device, fused=True)
        seconds[size] = time.perf_counter() - started
    return min(seconds, key=lambda size: seconds[size])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 300, 600, 1200])
    parser.add_argument("--cells", type=int, help="cells of every length [default: by length and device]")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 16, 4])
    parser.add_argument("--choose-at", type=int, default=300)
    parser.add_argument("--contenders", nargs="+", default=["scgpt", "scgpt-best", "float32", "bfloat16"])
    parser.add_argument("--checkpoint", type=Path, help="a folder with GENE0 ... in its vocabulary")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if given.device == "auto" else given.device
    genes = [f"GENE{i}" for i in range(N_GENES)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.checkpoint or write_checkpoint(
            Path(scratch), genes=genes, embsize=512, nheads=8, d_hid=512, nlayers=12
        )
        model = load_scgpt(folder, device="cpu")
        size = SHIPPED_BATCH
        if {"scgpt-best", "scgpt-plain"} & set(given.contenders):
            size = best_batch(folder, genes, length=given.choose_at, sizes=given.batch_sizes, device=device)
        rates = {
            precision: product_rate(load_scgpt(folder, device=device, precision=precision).dtype, device, given.threads)
            for precision in OURS
            if precision in given.contenders
        }
        results = []
        for length in given.lengths:
            n_cells = given.cells or (CPU_CELLS.get(length, 32) if device == "cpu" else GPU_CELLS)
            rows = make_cells(n_cells, length)
            calls = contenders(
                folder, rows, genes, device=device, n_threads=given.threads, batch_size=size, wanted=given.contenders
            )
            found = measure(calls, repeats=given.repeats, device=device)
            n_tokens, n_operations = int(np.count_nonzero(rows)) + n_cells, operations(model, rows)
            for name, row in found.items():
                row.update(length=length, contender=name, cells_per_s=n_cells / row["seconds"])
                row["tokens_per_s"] = n_tokens / row["seconds"]
                if name in rates:
                    row["share_of_peak"] = n_operations / row["seconds"] / rates[name]
                for rival, column in (("scgpt", "speedup"), ("scgpt-best", "speedup_best_batch")):
                    if rival in found:
                        row[column] = found[rival]["seconds"] / row["seconds"]
                results.append(row)
                print(line(row), file=sys.stderr, flush=True)
    report = summary(results, near=300 if device == "cpu" else 600)
    report |= {"device": device, "threads": given.threads, "scgpt_batch": size, "rows": results}
    report["peak_gflops"] = {name: rate / 1e9 for name, rate in rates.items()}
    print(json.dumps(report) if given.json else table(results))


def summary(results: list[dict[str, Any]], *, near: int) -> dict[str, Any]:
    """The figures at the length nearest to `near`."""
    length = min({row["length"] for row in results}, key=lambda length: abs(length - near))
    rows = {row["contender"]: row for row in results if row["length"] == length}
    best = max((rows[name] for name in OURS if name in rows), key=lambda row: row["cells_per_s"], default={})
    return {
        "length": length,
        "speedup_fp32": rows.get("float32", {}).get("speedup"),
        "speedup_bf16": rows.get("bfloat16", {}).get("speedup"),
        "speedup_fp32_best_batch": rows.get("float32", {}).get("speedup_best_batch"),
        "speedup_bf16_best_batch": rows.get("bfloat16", {}).get("speedup_best_batch"),
        "cells_per_s": best.get("cells_per_s"),
        "share_of_peak": best.get("share_of_peak"),
    }


COLUMNS = (
    "length",
    "contender",
    "cells_per_s",
    "tokens_per_s",
    "speedup",
    "speedup_best_batch",
    "share_of_peak",
    "min_cosine",
    "max_difference",
    "device_mb",
)


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    return "  ".join(f"{name} {row[name]:.5g}" if name != "contender" else row[name] for name in COLUMNS if name in row)


def table(results: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    columns = [name for name in COLUMNS if any(name in row for row in results)]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in results:
        cells = (row.get(name, "") for name in columns)
        lines.append(
            "| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
