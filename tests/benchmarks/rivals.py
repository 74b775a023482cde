"""The slices of `tests.benchmarks.propagation`, and one contender on one of them in a process of its own.

    python -m tests.benchmarks.rivals NAME --folder CASE --out RESULT.json   (what the benchmark calls)

Contenders: `ours` (exact float32, neighbours among counts as published), `ours-40` (the same, but always 40
iterations), `ours-fast` (float16 values), `ours-scaled` (default settings), `scipy` (scikit-learn's brute
force, scipy's products, vectorised numpy).
A case is a folder with slice.h5ad, reference.h5ad and what is needed of the reference in reference.npz.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import inspect
import json
import resource
import runpy
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, diags
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from lloki_atlas.config import PropagationConfig
from lloki_atlas.kernels.diffusion import diffuse
from lloki_atlas.kernels.hashing import text_key
from lloki_atlas.kernels.transport import sparsity_histogram
from lloki_atlas.stages import propagate, tile
from lloki_atlas.stages.panels import PanelCounts, select_panel

OURS: dict[str, dict[str, Any]] = {
    "ours": {"graph_space": "counts"},
    "ours-40": {"graph_space": "counts", "tolerance": 1e-30},
    "ours-fast": {"graph_space": "counts", "storage": "float16"},
    "ours-scaled": {},
}
K = 40


def make_case(
    folder: Path, *, cells: int, genes: int, seed: int, transform: str, tools: Path, own: tuple[str, str] | None
) -> dict[str, Any]:
    """Write the slice and the reference to `folder`; say what they are. `own`: paths of a real slice and reference."""
    script = tools / "make_slice.py"
    if own:
        source = " beside ".join(Path(path).name for path in own)
        slice_, reference = (ad.read_h5ad(path) for path in own)
    else:
        if script.exists():
            source = "make_slice.py"
            made = runpy.run_path(str(script))["make_arrays"](cells, genes, seed, transform=transform)
        else:
            source = "negative-binomial generator"
            made = simulated_arrays(cells, genes, seed, transform)
        slice_ = _as_anndata(made["x"], made["genes"])
        slice_.obsm["spatial"] = made["xy"]
        reference = _as_anndata(made["ref_x"], made["ref_genes"])
    slice_.X, reference.X = _counts(slice_.X), _counts(reference.X)
    slice_.write_h5ad(folder / "slice.h5ad")
    reference.write_h5ad(folder / "reference.h5ad")
    shared = reference.var_names.isin(slice_.var_names)
    nonzeros = np.diff(slice_.X[:, slice_.var_names.isin(reference.var_names)].indptr)
    np.savez(
        folder / "reference.npz",
        symbols=np.array(reference.var_names, dtype=str),
        nonzeros=np.diff(reference.X[:, shared].indptr),
        nonzeros_all=np.diff(reference.X.indptr),
        own_nonzeros=nonzeros,
        n_shared=int(shared.sum()),
    )
    matrix = slice_.X
    return {
        "source": source,
        "cells": slice_.n_obs,
        "genes": slice_.n_vars,
        "shared_genes": int(shared.sum()),
        "counts": int(matrix.nnz),
        "zeros": round(1 - matrix.nnz / matrix.shape[0] / matrix.shape[1], 3),
        "input_bytes": int(matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes + 8 * slice_.n_obs),
    }


def _as_anndata(matrix: csr_matrix, genes: list[str]) -> ad.AnnData:
    names = [f"cell{i}" for i in range(matrix.shape[0])]
    return ad.AnnData(X=matrix, obs=pd.DataFrame(index=names), var=pd.DataFrame(index=genes))


def _counts(matrix: Any) -> csr_matrix:
    counts = csr_matrix(matrix, dtype=np.float32)
    counts.eliminate_zeros()
    counts.sort_indices()
    return counts


def simulated_arrays(cells: int, genes: int, seed: int, transform: str) -> dict[str, Any]:
    """Types in bands across the slice, negative-binomial counts, about 80 % zeros; the reference is deeper."""
    generator = np.random.default_rng(seed)
    profiles = generator.lognormal(-2.2, 1.4, size=(12, genes))
    xy = (generator.random((cells, 2)) * np.sqrt(cells * 100.0)).astype(np.float32)
    place = xy[:, 0] / np.sqrt(cells * 100.0) * 12 + generator.normal(0, 1, cells)

    def sample(kinds: np.ndarray, depth: float) -> csr_matrix:
        mean = profiles[kinds] * depth * generator.lognormal(0, 0.45, size=(len(kinds), 1))
        counts = generator.poisson(generator.standard_gamma(2.0, mean.shape) * mean / 2.0).astype(np.float32)
        counts[counts.sum(axis=1) == 0, 0] = 1
        if transform == "log1p":
            counts = np.log1p(counts / counts.sum(axis=1, keepdims=True) * np.float32(genes / 2))
        return csr_matrix(counts)

    names = [f"GENE{gene}" for gene in range(genes)]
    slice_ = sample(np.clip(place, 0, 11).astype(int), 1.0)
    return {
        "x": slice_,
        "xy": xy,
        "genes": names,
        "ref_x": sample(generator.integers(0, 12, 3000), 4.0),
        "ref_genes": names,
    }


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def target_correlation(targets: np.ndarray, own: np.ndarray, reference: np.ndarray, n_genes: int) -> float:
    """Pearson's r of target sparsities and the reference's quantiles at the cells' mid-ranks."""
    ranks = (pd.Series(-own).rank().to_numpy() - 0.5) / len(own)
    quantiles = np.quantile(1 - reference / n_genes, ranks)
    if not (np.ptp(targets) and np.ptp(quantiles)):
        return float("nan")
    return float(np.corrcoef(1 - targets / n_genes, quantiles)[0, 1])


def agreement(exact: Path, other: Path) -> dict[str, float]:
    """Row correlations of the denoised counts, and the share of the exact second graph's edges that are found."""
    a, b = np.load(exact), np.load(other)
    rows = [part["denoised"].astype(np.float64) for part in (a, b)]
    rows = [part - part.mean(axis=1, keepdims=True) for part in rows]
    norms = np.linalg.norm(rows[0], axis=1) * np.linalg.norm(rows[1], axis=1)
    correlation = ((rows[0] * rows[1]).sum(axis=1) / np.where(norms > 0, norms, 1))[norms > 0]
    edges = []
    for part in (a, b):
        n = len(part["indptr"]) - 1
        left = np.repeat(np.arange(n), np.diff(part["indptr"]))
        edges.append((left * n + part["indices"])[left != part["indices"]])
    return {
        "row_correlation_mean": float(correlation.mean()),
        "row_correlation_min": float(correlation.min()),
        "same_edges": float(np.isin(edges[0], edges[1]).mean()),
    }


def best_of(n: int, run: Callable[[], Any]) -> float:
    """Seconds of the fastest of n runs."""
    seconds = []
    for _ in range(n):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def machine_limits(genes: int, n_threads: int) -> dict[str, Any]:
    """float32 GEMM of 4096 × genes × 4096 and copying 400 MB arrays, on as many threads."""
    left, right = (np.random.default_rng(0).random((4096, genes), dtype=np.float32) for _ in range(2))
    operations = 2 * 4096**2 * genes / 1e9
    with threadpool_limits(n_threads):
        rates = {"numpy": operations / best_of(5, lambda: left @ right.T)}
    try:
        import torch

        torch.set_num_threads(n_threads)
        tensors = torch.from_numpy(left), torch.from_numpy(right)
        rates["torch"] = operations / best_of(5, lambda: tensors[0] @ tensors[1].T)
    except ImportError:
        pass
    size = 100_000_000
    source, target = np.ones(size, dtype=np.float32), np.zeros(size, dtype=np.float32)
    parts = [slice(size * t // n_threads, size * (t + 1) // n_threads) for t in range(n_threads)]
    with ThreadPoolExecutor(n_threads) as pool:
        copy = best_of(5, lambda: list(pool.map(lambda part: np.copyto(target[part], source[part]), parts)))
    faster = max(rates, key=lambda name: rates[name])
    return {"gemm_gflops": rates[faster], "gemm_of": faster, "copy_gb_s": 2 * source.nbytes / copy / 1e9}


class Contest:
    """A panel, its coordinates, and what a contender makes of them."""

    def __init__(self, panel: PanelCounts, xy: np.ndarray, reference_nonzeros: np.ndarray, given: Any) -> None:
        self.panel, self.xy, self.reference_nonzeros, self.given = panel, xy, reference_nonzeros, given
        self.key = text_key(f"benchmark/{given.seed}")
        self.n_genes = len(panel.symbols)

    def run(self, name: str) -> dict[str, Any]:
        """Run the whole stage: phases in seconds, targets, graph, denoised counts."""
        with threadpool_limits(self.given.threads):
            return self._ours(PropagationConfig(**OURS[name])) if name in OURS else self._scipy()

    def _ours(self, settings: PropagationConfig) -> dict[str, Any]:
        panel, xy = self.panel, self.xy
        started = time.perf_counter()
        statistics = tile.run_slice(panel, xy, settings=settings, key=self.key)
        counted = time.perf_counter()
        result = propagate.run_slice(
            panel,
            xy,
            own_histogram=statistics["histogram"],
            reference_histogram=sparsity_histogram(self.reference_nonzeros, self.n_genes),
            bandwidth_um=float(statistics["bandwidth_um"][0]),
            settings=settings,
            key=self.key,
            **_threads(propagate.run_slice, self.given.threads),
        )
        propagated = time.perf_counter()
        filled = getattr(result, "filled", result)
        out = {
            "targets": filled.target_nonzeros,
            "budget": filled.budget,
            "iterations": filled.n_iterations,
            "relative_change": filled.relative_change,
            "recall": getattr(result, "recall", None),
            "graph": result.graph,
        }
        del result, filled  # propagated values are not needed any more
        out["denoised"] = diffuse(
            out["graph"],
            panel.shared_counts,
            start=0,
            stop=panel.n_cells,
            alpha=1.0,
            **_threads(diffuse, self.given.threads),
        )
        ended = time.perf_counter()
        out["phases"] = {
            "statistics": counted - started,
            "propagate": propagated - counted,
            "diffuse": ended - propagated,
        }
        return out

    def _scipy(self) -> dict[str, Any]:
        started = time.perf_counter()
        generator = np.random.default_rng(self.given.seed)
        first = np.asarray(self.panel.shared_counts.toarray(), dtype=np.float32)
        n, n_genes = first.shape
        observed = first != 0
        own = observed.sum(axis=1)
        ranks = (pd.Series(-own).rank().to_numpy() - 0.5) / n
        sparsity = np.quantile(1 - self.reference_nonzeros / n_genes, ranks)
        targets = np.round((1 - sparsity) * n_genes).astype(np.int64)
        budget = np.maximum(targets - own, 0)
        pairs = generator.integers(0, n, size=(2, 100_000))
        sigma = float(np.linalg.norm(self.xy[pairs[0]] - self.xy[pairs[1]], axis=1).mean())
        graph = _union_graph(first, self.xy, sigma)
        values, open_ = first, ~observed  # entries that may still be filled in
        frozen = np.zeros(n, dtype=bool)
        for _ in range(self.given.iterations):
            values = graph @ values
            values[observed] = first[observed]
            values[~(open_ | observed)] = 0
            full = np.flatnonzero(~frozen & (((values != 0) & open_).sum(axis=1) > budget))
            if len(full):
                filled = (values[full] != 0) & open_[full]
                order = np.argsort(np.where(filled, generator.random(filled.shape, dtype=np.float32), 2), axis=1)
                kept = np.zeros_like(filled)
                np.put_along_axis(kept, order, np.arange(n_genes) < budget[full, None], axis=1)
                open_[full], frozen[full] = kept, True
                values[full] *= kept | observed[full]
        second = _union_graph(values, self.xy, sigma)
        del values, open_
        denoised = second @ first
        return {
            "targets": targets,
            "budget": budget,
            "iterations": self.given.iterations,
            "graph": second,
            "denoised": denoised,
            "phases": {"all": time.perf_counter() - started},
        }


def _threads(function: Callable[..., Any], n_threads: int) -> dict[str, int]:
    return {"n_threads": n_threads} if "n_threads" in inspect.signature(function).parameters else {}


def _union_graph(values: np.ndarray, xy: np.ndarray, sigma: float) -> csr_matrix:
    model = NearestNeighbors(n_neighbors=min(K + 1, len(values)), metric="cosine", algorithm="brute").fit(values)
    joined = model.kneighbors_graph(values, mode="connectivity")
    joined.setdiag(1)
    joined = (joined + joined.T).tocoo()
    squares = ((xy[joined.row] - xy[joined.col]) ** 2).sum(axis=1)
    weights = csr_matrix((np.exp(-squares / (2 * sigma**2)).astype(np.float32), (joined.row, joined.col)))
    scale = diags((1 / np.sqrt(np.asarray(weights.sum(axis=1)).ravel())).astype(np.float32))
    return csr_matrix(scale @ weights @ scale)


def load(folder: Path) -> tuple[PanelCounts, np.ndarray, np.ndarray]:
    """Panel, coordinates and the reference's numbers of non-zero shared genes."""
    slice_ = ad.read_h5ad(folder / "slice.h5ad")
    reference = np.load(folder / "reference.npz")
    symbols = [str(name) for name in slice_.var_names]
    panel = select_panel(slice_.X, symbols, ["exact"] * len(symbols), tuple(reference["symbols"].tolist()))
    xy = np.ascontiguousarray(slice_.obsm["spatial"][:, :2], dtype=np.float32)
    return panel, xy, reference["nonzeros"]


def _warm_up(name: str, given: Any) -> float:
    """Seconds of a first small run, which compiles the kernels or reads them from their cache."""
    made = simulated_arrays(700, 200, 0, "counts")
    panel = select_panel(made["x"], made["genes"], ["exact"] * 200, tuple(made["ref_genes"]))
    contest = Contest(panel, made["xy"], np.diff(made["ref_x"].indptr), given)
    started = time.perf_counter()
    contest.run(name)
    return time.perf_counter() - started


def _give_back() -> None:
    """Return freed memory to the system: a baseline must not hold what the run would take again unseen."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _keep(path: str, out: dict[str, Any]) -> None:
    graph = out["graph"]
    np.savez(path, indptr=graph.indptr, indices=graph.indices, denoised=out["denoised"])


def main() -> None:
    """Measure one contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*OURS, "scipy"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=40, help="of scipy")
    parser.add_argument("--limit-mb", type=int, default=0)
    parser.add_argument("--keep", help="write graph and denoised counts to this .npz")
    given = parser.parse_args()
    report: dict[str, Any] = {"warm_up_s": _warm_up(given.name, given)}
    _give_back()
    if given.limit_mb and given.name in OURS:
        limit = status("VmData") + given.limit_mb * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        report["limit_bytes"] = given.limit_mb * 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    report["rss_imports"] = status("VmRSS")
    contest = Contest(*load(given.folder), given)
    _give_back()
    report["rss_loaded"] = status("VmRSS")
    best: dict[str, Any] = {}
    for turn in range(given.repeat):
        out = contest.run(given.name)
        if turn == 0:
            report["peak"] = status("VmHWM")
        if not best or sum(out["phases"].values()) < sum(best["phases"].values()):
            best = {"phases": out["phases"]}
        if turn + 1 < given.repeat:
            del out
    report["seconds"] = sum(best["phases"].values())
    report["phases"] = {phase: round(seconds, 4) for phase, seconds in best["phases"].items()}
    report["iterations"] = int(out["iterations"])
    report["recall"] = out.get("recall")
    report["budget_mean"] = float(np.mean(out["budget"]))
    own = np.diff(contest.panel.shared_counts.indptr)
    report["target_correlation"] = target_correlation(out["targets"], own, contest.reference_nonzeros, contest.n_genes)
    if given.keep:
        _keep(given.keep, out)
    given.out.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
