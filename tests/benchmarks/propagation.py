"""LLOKI-FP of one slice (statistics, graph, budget, propagation, second graph, diffusion) beside rivals.

    python -m tests.benchmarks.propagation --cells 2000 8000 [--transform counts log1p] [--checkout DIR] [--json]
    python -m tests.benchmarks.propagation --slice SLICE.h5ad --reference REFERENCE.h5ad [--checkout DIR]
    python -m tests.benchmarks.propagation --linear 10000 50000 200000 --genes 50

Each contender (see `tests.benchmarks.rivals`; `authors` is the published code in --checkout) runs in a process of its
own, one after the other: seconds are the best of --repeat with warm kernels (of the authors' one run), the warm-up is
listed apart. Peaks are VmHWM of the first run above what the process held after imports and warm-up, so with its input,
and above what it held with the input loaded; for the authors' code, measured above the latter, the first is that and
the size of the slice's arrays. Limits of the machine (float32 GEMM, copy) and single kernels are measured in the same
run, in this process. --linear fits the exponent of our peak memory by cells, in the default space.
With --json there is one JSON object a case on stdout, and the tables go to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lloki_atlas.config import PropagationConfig
from lloki_atlas.kernels.graph import build_graph
from lloki_atlas.kernels.hashing import text_key
from lloki_atlas.kernels.neighbors import nearest_neighbors
from lloki_atlas.kernels.propagation import propagate_blocks
from lloki_atlas.kernels.transport import assigned_targets, imputation_budget, sparsity_histogram, target_nonzeros
from lloki_atlas.stages import tile
from tests.benchmarks.rivals import OURS, K, agreement, best_of, load, machine_limits, make_case, target_correlation

ROOT = Path(__file__).parents[2]
RIVALS = (*OURS, "authors", "scipy")
MB = 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[2000, 8000])
    parser.add_argument("--genes", type=int, default=500)
    parser.add_argument("--transform", choices=["counts", "log1p"], nargs="+", default=["counts"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--slice", help="a slice (.h5ad) in place of made ones; all of its cells are taken as one slice"
    )
    parser.add_argument("--reference", help="its scRNA-seq reference (.h5ad)")
    parser.add_argument("--checkout", type=Path, help="folder with the authors' code")
    parser.add_argument("--tools", type=Path, default=ROOT / "../shared/tools", help="make_slice.py, reference_fp.py")
    parser.add_argument("--rivals", choices=RIVALS, nargs="+", default=list(RIVALS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--limit-mb", type=int, default=0, help="fail ours if it needs more above its imports")
    parser.add_argument("--linear", type=int, nargs="+", metavar="CELLS", help="fit the growth of our memory instead")
    parser.add_argument("--cold", action="store_true", help="compile kernels anew: the warm-up is then the compilation")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if bool(given.slice) != bool(given.reference):
        parser.error("--slice and --reference go together")
    given.checkout = given.checkout and given.checkout.resolve()
    given.tools = given.tools.resolve()
    if given.linear:
        return linear(given)
    if "authors" in given.rivals:
        missing = "no --checkout" if not given.checkout else ""
        if not (given.tools / "reference_fp.py").exists():
            missing = f"no reference_fp.py in {given.tools}; slices come from a generator of the benchmark's own"
        if missing:
            say(given, f"the authors' code is not run: {missing}")
            given.rivals = [name for name in given.rivals if name != "authors"]
    sizes = [(0, "as given")] if given.slice else [(n, transform) for transform in given.transform for n in given.cells]
    for cells, transform in sizes:
        with tempfile.TemporaryDirectory() as folder:
            report = measure_case(given, Path(folder), cells, transform)
        show(given, report)
        if given.json:
            print(json.dumps(report), flush=True)
    return None


def say(given: argparse.Namespace, text: str) -> None:
    """Print for people."""
    print(text, file=sys.stderr if given.json else sys.stdout, flush=True)


def measure_case(given: argparse.Namespace, folder: Path, cells: int, transform: str) -> dict[str, Any]:
    """All contenders and kernels on one slice."""
    own = (given.slice, given.reference) if given.slice else None
    case = make_case(
        folder, cells=cells, genes=given.genes, seed=given.seed, transform=transform, tools=given.tools, own=own
    )
    report: dict[str, Any] = {**case, "transform": transform, "threads": given.threads, "seed": given.seed}
    report["load_average"] = os.getloadavg()[0]
    report["machine"] = machine_limits(case["shared_genes"], given.threads)
    rows: dict[str, dict[str, Any]] = {}
    for name in sorted(given.rivals, key=RIVALS.index):
        iterations = rows.get("ours", {}).get("iterations", 40)
        row = authors(given, folder) if name == "authors" else contender(name, given, folder, iterations=iterations)
        row["load_average"] = os.getloadavg()[0]  # of the last minute: above the threads, others were at work
        rows[name] = row if "error" in row else _with_memory(name, row, case, given.threads)
    ours = rows.get("ours", {}).get("seconds")
    for row in rows.values():
        if ours and "seconds" in row:
            row["ratio_to_ours"] = row["seconds"] / ours
    report["contenders"] = rows
    for name in ("ours-40", "ours-fast", "scipy"):
        if (folder / "ours.npz").exists() and (folder / f"{name}.npz").exists():
            rows[name].update(agreement(folder / "ours.npz", folder / f"{name}.npz"))
    report["kernels"] = kernels(given, folder, report["machine"])
    product = 2 * case["cells"] ** 2 * case["shared_genes"] / report["machine"]["gemm_gflops"] / 1e9
    report["half_gemm_seconds"] = product
    report["stage_over_gemm"] = ours / product if ours else None
    return _rounded(report)


def contender(
    name: str, given: argparse.Namespace, folder: Path, *, iterations: int = 40, keep: bool = True
) -> dict[str, Any]:
    """What a fresh process says of one contender."""
    out = folder / f"{name}.json"
    command = [sys.executable, "-m", "tests.benchmarks.rivals", name, "--folder", str(folder), "--out", str(out)]
    command += ["--threads", str(given.threads), "--seed", str(given.seed), "--repeat", str(given.repeat)]
    command += ["--iterations", str(iterations), "--limit-mb", str(given.limit_mb)]
    command += ["--keep", str(folder / f"{name}.npz")] if keep else []
    return _run(command, out, given)


def authors(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The authors' code, once, and how its targets fit (they follow from the slice)."""
    out = folder / "authors.json"
    command = [sys.executable, str(given.tools / "reference_fp.py"), "--reference", str(given.checkout)]
    command += ["--slice", str(folder / "slice.h5ad"), "--reference-h5ad", str(folder / "reference.h5ad")]
    command += ["--out", str(out), "--threads", str(given.threads), "--seed", str(given.seed)]
    found = _run(command, out, given)
    if "error" in found:
        return found
    nonzeros = np.load(folder / "reference.npz")
    own, n_shared = nonzeros["own_nonzeros"], int(nonzeros["n_shared"])
    targets = assigned_targets(
        own,
        nonzeros["nonzeros_all"],
        n_genes=n_shared,
        n_reference_genes=len(nonzeros["symbols"]),
        cdf="linspace",
        match="argsort",
    )
    return {
        "seconds": found["wall_s"],
        "peak": found["peak_rss_bytes"],
        "rss_loaded": found["rss_before_bytes"],
        "cpu_seconds": found["cpu_s"],
        "iterations": found["iterations_run"],
        "budget_mean": found["budget_mean"],
        "phases": {phase: round(sum(seconds), 4) for phase, seconds in found["stages_s"].items()},
        "target_correlation": target_correlation(targets, own, nonzeros["nonzeros"], n_shared),
    }


def _run(command: list[str], out: Path, given: argparse.Namespace) -> dict[str, Any]:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(given.threads))}
    with tempfile.TemporaryDirectory() as cache:
        if given.cold:
            environment["NUMBA_CACHE_DIR"] = cache
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if ended.returncode or not out.exists():
        lines = ended.stderr.strip().splitlines() or [f"ended with {ended.returncode}"]
        return {"error": lines[-1][:300]}
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def _with_memory(name: str, row: dict[str, Any], case: dict[str, Any], n_threads: int) -> dict[str, Any]:
    loaded = row["peak"] - row["rss_loaded"]
    above = row["peak"] - row["rss_imports"] if "rss_imports" in row else loaded + case["input_bytes"]
    row |= {"mb_above_imports": above / MB, "mb_above_input": loaded / MB, "kb_per_cell": above / 1e3 / case["cells"]}
    if name in OURS:
        projected = _projected(case, PropagationConfig(**OURS[name]), n_threads)
        row["mb_projected"] = projected / MB if projected else None
    return row


def _projected(case: dict[str, Any], settings: PropagationConfig, n_threads: int) -> int | None:
    """Bytes that the engine states before it runs, by whatever name it does."""
    size = (case["cells"], case["genes"], case["counts"], settings)
    for module, name in (("propagate", "projected_memory_of"), ("memory", "slice_memory")):
        try:
            function = getattr(importlib.import_module(f"lloki_atlas.stages.{module}"), name)
        except (ImportError, AttributeError):
            continue
        threads = {"n_threads": n_threads} if "n_threads" in inspect.signature(function).parameters else {}
        return int(function(*size, **threads))
    return None


def kernels(given: argparse.Namespace, folder: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """The exact search on counts and one iteration of propagation, alone."""
    panel, xy, reference = load(folder)
    counts, key, threads = panel.shared_counts, text_key(f"benchmark/{given.seed}"), given.threads
    n, n_genes = counts.shape
    rows = np.asarray(counts.toarray(), dtype=np.float32)
    nearest_neighbors(rows[:600], n_neighbors=K, n_threads=threads)  # compile
    seconds = best_of(given.repeat, lambda: nearest_neighbors(rows, n_neighbors=K, n_threads=threads))
    rate = n**2 * n_genes / seconds / 1e9
    found = {"search_s": seconds, "search_gflops": rate, "search_share_of_gemm": rate / machine["gemm_gflops"]}
    neighbors = nearest_neighbors(rows, n_neighbors=K, n_threads=threads)
    statistics = tile.run_slice(panel, xy, settings=PropagationConfig(graph_space="counts"), key=key)
    graph = build_graph(neighbors, xy, bandwidth_um=float(statistics["bandwidth_um"][0]))
    targets = target_nonzeros(statistics["histogram"], sparsity_histogram(reference, n_genes))
    budget = imputation_budget(statistics["nonzeros"], targets)
    found["edges_per_cell"] = len(graph.indices) / n
    if not budget.any() or "storage" not in inspect.signature(propagate_blocks).parameters:
        return found
    for storage, size in (("float32", 4), ("float16", 2)):

        def run(iterations: int, storage: Any = storage) -> None:
            propagate_blocks(
                graph,
                counts,
                budget,
                key=key,
                max_iterations=iterations,
                tolerance=1e-30,
                storage=storage,
                n_threads=threads,
            )

        run(1)  # compile
        one, eleven = (best_of(given.repeat, lambda times=times: run(times)) for times in (1, 11))
        iteration = max(eleven - one, 1e-9) / 10
        gather = len(graph.indices) * n_genes * size / iteration / 1e9
        found[f"iteration_{storage}"] = {
            "seconds": iteration,
            "us_per_cell": iteration / n * 1e6,
            "gather_gb_s": gather,
            "gather_over_copy": gather / machine["copy_gb_s"],
        }
    return found


def linear(given: argparse.Namespace) -> None:
    """Fit the exponent of our peak memory above the imports, by cells, in the default space."""
    given.repeat = 1
    rows: list[dict[str, Any]] = []
    for cells in given.linear:
        with tempfile.TemporaryDirectory() as folder:
            case = make_case(
                Path(folder),
                cells=cells,
                genes=given.genes,
                seed=given.seed,
                transform=given.transform[0],
                tools=given.tools,
                own=None,
            )
            row = contender("ours-scaled", given, Path(folder), keep=False)
        row = {
            "cells": cells,
            "genes": given.genes,
            **(row if "error" in row else _with_memory("ours-scaled", row, case, given.threads)),
        }
        rows.append(row)
        say(given, _table({f"{cells:,} cells": row}, header=len(rows) == 1))
        if given.json:
            print(json.dumps(_rounded(row)), flush=True)
    measured = [row for row in rows if "error" not in row]
    if len(measured) > 1:
        sizes = np.log([row["cells"] for row in measured])
        exponent = float(np.polyfit(sizes, np.log([row["mb_above_imports"] for row in measured]), 1)[0])
        say(given, f"peak memory grows as cells^{exponent:.3f}")
        if given.json:
            print(json.dumps({"memory_exponent": round(exponent, 4)}))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


COLUMNS = {
    "seconds": ("seconds", "{:.3f}"),
    "ratio_to_ours": ("x ours", "{:.2f}"),
    "iterations": ("iterations", "{:d}"),
    "load_average": ("load", "{:.1f}"),
    "warm_up_s": ("warm-up s", "{:.2f}"),
    "mb_above_imports": ("MB > imports", "{:.1f}"),
    "mb_above_input": ("MB > input", "{:.1f}"),
    "kb_per_cell": ("kB a cell", "{:.1f}"),
    "mb_projected": ("projected MB", "{:.0f}"),
    "target_correlation": ("r(target)", "{:.3f}"),
    "row_correlation_mean": ("r(ours)", "{:.5f}"),
    "row_correlation_min": ("least r", "{:.4f}"),
    "same_edges": ("same edges", "{:.4f}"),
}


def _table(rows: dict[str, dict[str, Any]], *, header: bool = True) -> str:
    shown = {
        name: {
            title: form.format(row[key]) if row.get(key) is not None else "-" for key, (title, form) in COLUMNS.items()
        }
        for name, row in rows.items()
    }
    frame = pd.DataFrame(shown).T
    lines = frame.to_string(header=header)
    for name, row in rows.items():
        if "error" in row:
            lines += f"\n{name} FAILED: {row['error']}"
        if row.get("mb_projected") and row["mb_above_imports"] > row["mb_projected"]:
            lines += (
                f"\nWARNING: {name} took {row['mb_above_imports']:.0f} MB, {row['mb_projected']:.0f} were projected"
            )
    return lines


def show(given: argparse.Namespace, report: dict[str, Any]) -> None:
    """Print a case for people."""
    machine, kernel = report["machine"], report["kernels"]
    limit = f", ours within {given.limit_mb} MB above its imports" if given.limit_mb else ""
    say(
        given,
        f"\n{report['cells']:,} cells × {report['shared_genes']} shared genes, {report['transform']}, "
        f"{report['zeros']:.1%} zeros ({report['source']}); {report['threads']} threads, seed {report['seed']}, "
        f"load {report['load_average']:.1f}{limit}\n"
        f"machine: GEMM {machine['gemm_gflops']:.0f} GFLOP/s ({machine['gemm_of']}), "
        f"copy {machine['copy_gb_s']:.1f} GB/s",
    )
    say(given, _table(report["contenders"]))
    if (
        max([report["load_average"], *(row["load_average"] for row in report["contenders"].values())])
        > given.threads + 0.5
    ):
        say(given, "WARNING: others were at work on this machine, times and ratios do not hold: measure again")
    for name, row in report["contenders"].items():
        if "phases" in row and len(row["phases"]) > 1:
            say(given, f"{name}: " + ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in row["phases"].items()))
    stage = report["stage_over_gemm"]
    say(
        given,
        f"search: {kernel['search_s']:.3f} s, {kernel['search_gflops']:.0f} GFLOP/s, "
        f"{kernel['search_share_of_gemm']:.0%} of GEMM; {kernel['edges_per_cell']:.1f} edges a cell; two half products "
        f"{report['half_gemm_seconds']:.3f} s" + (f", ours takes {stage:.2f} times that" if stage else ""),
    )
    for storage in ("float32", "float16"):
        step = kernel.get(f"iteration_{storage}")
        if step:
            say(
                given,
                f"iteration {storage}: {step['seconds'] * 1e3:.2f} ms, {step['us_per_cell']:.2f} us a cell, gather "
                f"{step['gather_gb_s']:.1f} GB/s, {step['gather_over_copy']:.2f} of copy",
            )


if __name__ == "__main__":
    main()
