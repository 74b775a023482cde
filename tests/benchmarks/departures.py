"""What each departure from the published code costs or gains on real labelled slices.

    python -m tests.benchmarks.departures [--tables real pooled votes] [--slices …] [--seeds 0 1 2] [--quick] [--json]

`real`: LLOKI-FP on each slice with its own scRNA-seq reference, one setting changed at a time.
`pooled`: the same against a denser synthetic target, for most slices are denser than their reference and may fill in
nothing: the reference's counts summed over groups of five random cells of one type.
`votes`: settings that change the 512-d embedding of catalogs/mouse-cortex.toml, by votes across technologies.

Scored is the denoised matrix (log1p, z-scored, 20 principal components) over labelled cells, labels of at least 16
cells: purity, the share of a cell's 15 nearest cells (cosine) that have its label, averaged per label, then over
labels; and the adjusted Rand index of KMeans with as many clusters as labels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, hstack, triu
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits

from lloki_atlas import build, fit_reference, propagate_slice, run, select_cells
from lloki_atlas.config import PropagationConfig, to_dict
from lloki_atlas.kernels.neighbors import nearest_neighbors, nearest_rows
from lloki_atlas.kernels.ordering import hilbert_order
from lloki_atlas.stages.genes import map_symbols
from lloki_atlas.stages.manifest import read_manifest
from lloki_atlas.store.catalog import Catalog, commit
from lloki_atlas.store.records import Change
from lloki_atlas.store.references import ReferenceProfile
from tests.benchmarks.votes import NO_LABEL, vote

DATA = Path(os.environ.get("LLOKI_ATLAS_DATA", "../shared/data"))
MOP, ROMANOV, ZILIONIS = "ref_mop_10x_biccn", "ref_hypothalamus_romanov2017", "ref_lungcancer_zilionis2019"
# file, slice in it, organism, reference; ISS is cut to its first cells in Hilbert order
SLICES: dict[str, tuple[str, str, str, str]] = {
    "osmFISH": ("osmfish_ssp_codeluppi2018", "osmfish_ssp", "mouse", MOP),
    "STARmap BZ5": ("starmap_mpfc_wang2018", "starmap_BZ5", "mouse", MOP),
    "STARmap BZ9": ("starmap_mpfc_wang2018", "starmap_BZ9", "mouse", MOP),
    "VISp": ("merfish_visp_allen_spacetx", "visp_allen", "mouse", MOP),
    "POA": ("merfish_poa_moffitt2018", "poa_animal7_bregma0.16", "mouse", ROMANOV),
    "lung": ("merfish_lungcancer_chen2024", "merfish_lung_tile", "human", ZILIONIS),
    "ISS": ("iss_coronal_half_qian2020", "iss_coronal_half1", "mouse", MOP),
}
MAX_CELLS, MIN_LABEL, N_NEIGHBORS, POOL = 8000, 16, 15, 5
LABELS = {"coarse": "cell_type_coarse", "fine": "cell_type"}

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "targets by argsort": {"sparsity_match": "argsort"},
    "CDF upper": {"sparsity_cdf": "upper"},
    "CDF linspace": {"sparsity_cdf": "linspace"},
    "sparsity over all genes": {"sparsity_genes": "all"},
    "support redrawn": {"support": "redrawn"},
    "support largest": {"support": "largest"},
    "cap_final": {"cap_final": True},
    "keep_observed": {"keep_observed": True},
    "alpha 0 (no diffusion)": {"alpha": 0.0},
    "alpha 0.5": {"alpha": 0.5},
    "sigma of 100 pairs": {"n_bandwidth_pairs": 100},
    "sigma of 100 x 100": {"bandwidth": "cross", "n_bandwidth_pairs": 100},
    "k 20": {"n_neighbors": 20},
    "k 80": {"n_neighbors": 80},
    "no self loops": {"self_loops": False},
    "graph on counts": {"graph_space": "counts"},
    "graph on counts, whole panel": {"graph_space": "counts"},
    "graph scaled, shared genes alone": {},
    "2 Hilbert parts": {},
    "4 Hilbert parts": {},
    "8 Hilbert parts": {},
    "2 x-stripes": {},
    "4 x-stripes": {},
    "storage float16": {"storage": "float16"},
    "search approximate": {"search": "approximate"},
    'mode "paper"': {"mode": "paper"},
    'mode "reference"': {"mode": "reference"},
}
OF_EMBEDDING: dict[str, dict[str, Any]] = {
    "default": {},
    "default, seed 1": {"random_state": 1},
    "default, seed 2": {"random_state": 2},
    'diffuse "embedding"': {"diffuse": "embedding"},
    'diffuse "embedding", graph on counts': {"diffuse": "embedding", "graph_space": "counts"},
    **{name: VARIANTS[name] for name in ("graph on counts", "alpha 0 (no diffusion)", "cap_final", "k 20", "k 80")},
    **{name: VARIANTS[name] for name in ('mode "paper"', 'mode "reference"')},
}
SCORES = {
    "purity_coarse": "purity, coarse types (difference ± standard error over cells and seeds)",
    "purity_fine": "purity, authors' types (difference ± standard error over cells and seeds)",
    "ari_coarse": "adjusted Rand index of KMeans, coarse types (difference ± sd over seeds)",
    "ari_fine": "adjusted Rand index of KMeans, authors' types (difference ± sd over seeds)",
}
PLAIN = {
    "shared_edges": "edges of the second graph shared with the default's (Jaccard)",
    "seed_edges": "edges of the second graph shared between the first and the other seeds (Jaccard)",
    "iterations": "iterations of propagation",
    "cells_with_budget": "share of cells that may fill in a gene",
    "target_correlation": "correlation of a cell's target sparsity with the one at its own rank",
    "density": "share of non-zero denoised values",
    "recall": "recall of the neighbour search",
}


@dataclass(frozen=True)
class Propagated:
    """What is looked at of one run: denoised values, the second graph, and how it ended."""

    values: np.ndarray
    graph: csr_matrix
    facts: dict[str, float]


def load_slice(name: str) -> ad.AnnData:
    """Cells of one slice, at most MAX_CELLS of them: the first in Hilbert order."""
    file, section, _, _ = SLICES[name]
    adata = ad.read_h5ad(DATA / f"{file}.h5ad")
    adata = adata[(adata.obs["slice"] == section).to_numpy()].copy()
    if adata.n_obs > MAX_CELLS:
        adata = adata[np.sort(hilbert_order(adata.obsm["spatial"])[:MAX_CELLS])].copy()
    return adata


def load_reference(organism: str, file: str, *, pooled: bool) -> ReferenceProfile:
    """Profile of the reference, or of sums over groups of POOL random cells of one type (what is left over is out)."""
    adata = ad.read_h5ad(DATA / f"{file}.h5ad")
    if pooled:
        random = np.random.default_rng(0)
        types = adata.obs["cell_type"].astype(str).to_numpy()
        groups = []
        for kind in sorted(set(types)):
            cells = random.permutation(np.flatnonzero(types == kind))
            groups.append(cells[: len(cells) // POOL * POOL].reshape(-1, POOL))
        members = np.concatenate(groups)
        adata = ad.AnnData(csr_matrix(sum(adata.X[members[:, i]] for i in range(POOL))), var=adata.var)
    return fit_reference(adata, organism=organism)


def propagated(adata: ad.AnnData, profile: ReferenceProfile, *, name: str, variant: str, seed: int) -> Propagated:
    """Run one variant on a slice, or on parts of it that know nothing of each other."""
    settings = VARIANTS[variant] | {"random_state": seed}
    canonical = np.array(map_symbols(adata.var_names, organism=profile.organism).canonical)
    shared = set(canonical) & set(profile.symbols)
    if variant == "graph scaled, shared genes alone":
        adata = adata[:, np.isin(canonical, list(shared))]
    elif variant == "graph on counts, whole panel":
        profile = with_genes(profile, sorted(set(canonical) - shared - {""}))
    parts = [np.arange(adata.n_obs)]
    if variant.endswith(("parts", "stripes")):
        places = adata.obsm["spatial"]
        order = hilbert_order(places) if "Hilbert" in variant else np.argsort(places[:, 0], kind="stable")
        parts = [np.sort(rows) for rows in np.array_split(order, int(variant[0]))]
    blocks, edges, facts = [], [], []
    for number, rows in enumerate(parts):
        part, slice_id = adata[rows].copy(), name if len(parts) == 1 else f"{name}/{number}"
        found = propagate_slice(part, profile, organism=profile.organism, slice_id=slice_id, n_threads=1, **settings)
        found = found[:, found.var_names.isin(shared)]
        blocks.append(found.X)
        graph = found.obsp["propagation_graph"].tocoo()
        edges.append((graph.data, rows[graph.row], rows[graph.col]))
        ended = found.uns["lloki_atlas"]
        correlation = ended["sparsity"]["target_correlation"]
        facts.append(
            {
                "iterations": ended["n_iterations"],
                "cells_with_budget": ended["sparsity"]["cells_with_budget"],
                "target_correlation": np.nan if correlation is None else correlation,
                "density": float(np.mean(found.X != 0)),
                "recall": ended["recall"],
            }
        )
    data, row, column = (np.concatenate(part) for part in zip(*edges, strict=True))
    return Propagated(
        values=np.concatenate(blocks)[np.argsort(np.concatenate(parts))],
        graph=csr_matrix((data, (row, column)), shape=(adata.n_obs, adata.n_obs)),
        facts={key: float(np.mean([part[key] for part in facts])) for key in facts[0]},
    )


def with_genes(profile: ReferenceProfile, symbols: list[str]) -> ReferenceProfile:
    """The reference with further genes, absent in all its cells, so that they count as shared."""
    absent = csr_matrix((profile.counts.shape[0], len(symbols)), dtype=np.float32)
    return replace(profile, counts=csr_matrix(hstack([profile.counts, absent])), symbols=(*profile.symbols, *symbols))


def components(values: np.ndarray) -> np.ndarray:
    """20 principal components of z-scored log1p values: (n_cells, ≤ 20) float32."""
    logs = np.log1p(values.astype(np.float64))
    sd = logs.std(axis=0)
    scaled = (logs - logs.mean(axis=0)) / np.where(sd > 0, sd, 1.0)
    _, vectors = np.linalg.eigh(scaled.T @ scaled)
    return np.ascontiguousarray(scaled @ vectors[:, ::-1][:, :20], dtype=np.float32)


def known_labels(adata: ad.AnnData, column: str) -> np.ndarray:
    """Labels as text; empty for cells without one and for labels of fewer than MIN_LABEL cells."""
    labels = adata.obs[column].astype(str)
    coarse = adata.obs[LABELS["coarse"]].astype(str)
    labels = labels.where(~labels.isin(NO_LABEL) & ~coarse.isin(NO_LABEL), "")
    return labels.where(labels.map(labels.value_counts()) >= MIN_LABEL, "").to_numpy(dtype=str)


def scores(values: np.ndarray, labels: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Per-cell purity and the Rand index at each level of labels."""
    space = components(values)
    found: dict[str, Any] = {}
    for level, names in labels.items():
        scored = np.flatnonzero(names != "")
        own, rows = names[scored], np.ascontiguousarray(space[scored])
        near = nearest_neighbors(rows, n_neighbors=N_NEIGHBORS).indices
        found[level] = ((own[near] == own[:, None]) & (near >= 0)).mean(axis=1)
        clusters = KMeans(len(set(own)), n_init=10, random_state=seed).fit_predict(rows)
        found[f"ari_{level}"] = float(adjusted_rand_score(own, clusters))
    return found


def shared_edges(a: csr_matrix, b: csr_matrix) -> float:
    """Jaccard index of the edges of two undirected graphs, self loops left out."""
    first, second = triu(a, 1) != 0, triu(b, 1) != 0
    both = first.multiply(second).nnz
    return both / max(first.nnz + second.nnz - both, 1)


def balanced(per_cell: np.ndarray, names: np.ndarray) -> tuple[float, float]:
    """Mean over labels of the labels' means, and its standard error over cells."""
    parts = [per_cell[names == name] for name in sorted(set(names))]
    error = np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) / len(parts)
    return float(np.mean([part.mean() for part in parts])), float(error)


def study_slice(name: str, profile: ReferenceProfile, variants: list[str], seeds: list[int]) -> dict[str, Any]:
    """All variants and seeds on one slice: variant -> measure -> numbers."""
    adata = load_slice(name)
    labels = {level: known_labels(adata, column) for level, column in LABELS.items()}
    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    first: dict[str, csr_matrix] = {}
    for seed in seeds:
        scored: dict[bytes, dict[str, Any]] = {}  # many variants leave the same values
        base = None
        for variant in variants:
            found = propagated(adata, profile, name=name, variant=variant, seed=seed)
            base = base or found  # the first variant is the default
            earlier = first.setdefault(variant, found.graph)
            content = hashlib.sha256(np.ascontiguousarray(found.values).tobytes()).digest()
            if content not in scored:
                scored[content] = scores(found.values, labels, seed)
            edges = {
                "shared_edges": shared_edges(found.graph, base.graph),
                "seed_edges": np.nan if seed == seeds[0] else shared_edges(found.graph, earlier),
            }
            runs[variant].append(scored[content] | found.facts | edges)
    out = {variant: summary(runs[variant], runs["default"], labels) for variant in variants}
    sizes = {level: [int((part != "").sum()), len(set(part) - {""})] for level, part in labels.items()}
    return {"cells": adata.n_obs, "scored": sizes, "variants": out}


def summary(runs: list[dict[str, Any]], base: list[dict[str, Any]], labels: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means over seeds; for scores also the spread, the difference to the default and its error."""
    out: dict[str, Any] = {key: mean_of([run[key] for run in runs]) for key in PLAIN}

    def score(values: list[float], others: list[float], over_cells: float | None = None) -> dict[str, float]:
        steps = [value - other for value, other in zip(values, others, strict=True)]
        error = spread(steps) if over_cells is None else float(np.hypot(over_cells, spread(steps) / len(steps) ** 0.5))
        found = {"mean": float(np.mean(values)), "sd": spread(values)}
        return found | {"difference": float(np.mean(steps)), "error": error}

    for level, names in labels.items():
        names = names[names != ""]
        values, others = ([balanced(run[level], names)[0] for run in part] for part in (runs, base))
        per_cell = np.mean([run[level] - other[level] for run, other in zip(runs, base, strict=True)], axis=0)
        out[f"purity_{level}"] = score(values, others, balanced(per_cell, names)[1])
        values, others = ([run[f"ari_{level}"] for run in part] for part in (runs, base))
        out[f"ari_{level}"] = score(values, others)
    return out


def mean_of(values: list[float]) -> float | None:
    """Mean of what is known; None when nothing is."""
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else None


def spread(values: list[float]) -> float:
    """Standard deviation over seeds, 0 for a single one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def study_votes(names: list[str]) -> dict[str, dict[str, float]]:
    """Recall of votes across technologies in the 512-d space; slices are ingested once, settings changed after."""
    described = read_manifest("catalogs/mouse-cortex.toml")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        catalog = build(described, root=Path(folder) / "atlas", until="ingest", progress=False, n_workers=1)
        for name in names:
            # made anew: a mode decides only fields that were not given, and the manifest's are all decided
            config = replace(described.config, propagation=PropagationConfig(**OF_EMBEDDING[name]))
            catalog = commit(catalog, Change(config=to_dict(config)), message=name)
            catalog = run(catalog, progress=False, n_workers=1, until="embed")
            found[name] = votes_by_type(catalog)
            print("votes", name, file=sys.stderr, flush=True)
    return found


def votes_by_type(catalog: Catalog) -> dict[str, float]:
    """Balanced accuracy of `tests.benchmarks.votes` per technology with its error; and over neurons alone."""
    adata = select_cells(catalog).to_anndata()
    labels = adata.obs[LABELS["coarse"]].astype(str).to_numpy()
    technologies = adata.obs["technology"].astype(str).to_numpy()
    space = np.ascontiguousarray(adata.obsm["X_fp"], dtype=np.float32)
    known = ~np.isin(labels, NO_LABEL) & np.isfinite(space[:, 0])
    out = {}
    for technology in sorted(set(technologies[known])):
        own, others = known & (technologies == technology), known & (technologies != technology)
        own &= np.isin(labels, sorted(set(labels[others])))
        near = nearest_rows(space[own], space[others], n_neighbors=N_NEIGHBORS).indices
        voted = np.array([vote(list(labels[others][row[row >= 0]])) for row in near])
        right = (voted == labels[own]).astype(float)
        neurons = np.isin(labels[own], ("Excitatory", "Inhibitory"))
        for name, cells in ((technology, right >= 0), (f"{technology} neurons", neurons)):
            out[name], out[f"{name} error"] = balanced(right[cells], labels[own][cells])
    return out


def tables(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines: list[str] = []
    for part in ("real", "pooled"):
        slices = report.get(part, {})
        for key, title in (SCORES | PLAIN).items() if slices else ():
            rows = {
                name: {variant: cell(variant, values[key]) for variant, values in content["variants"].items()}
                for name, content in slices.items()
            }
            lines += [f"\n{part}: {title}\n", markdown(pd.DataFrame(rows))]
    if "votes" in report:
        lines += ["\nvotes across technologies\n", markdown(pd.DataFrame(report["votes"]).T.round(3))]
    return "\n".join(lines)


def cell(variant: str, value: Any) -> str:
    """The default's score and its spread over seeds; any other variant's difference to it and the error of that."""
    if not isinstance(value, dict):
        return "" if value is None else f"{value:.3f}"
    if variant == "default":
        return f"{value['mean']:.3f} ± {value['sd']:.3f}"
    return f"{value['difference']:+.3f} ± {value['error']:.3f}"


def markdown(frame: pd.DataFrame) -> str:
    """A Markdown table of a frame and its index."""
    head = ["variant", *map(str, frame.columns)]
    rows = [[str(index), *map(str, row)] for index, row in zip(frame.index, frame.to_numpy(), strict=True)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def main() -> None:
    """Run what is asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=("real", "pooled", "votes"), default=["real", "pooled", "votes"])
    parser.add_argument("--slices", nargs="+", choices=tuple(SLICES), default=list(SLICES))
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="one small slice, one seed, no votes")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON document")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.slices, arguments.seeds = ["STARmap BZ5"], arguments.seeds[:1]
        arguments.tables = [table for table in arguments.tables if table != "votes"]
        arguments.variants = [name for name in arguments.variants if "approximate" not in name]  # compiles a minute
    variants = ["default", *(variant for variant in arguments.variants if variant != "default")]
    report: dict[str, Any] = {}
    with threadpool_limits(1):
        for table in arguments.tables:
            if table == "votes":
                report[table] = study_votes(list(OF_EMBEDDING))
                continue
            report[table] = {}
            for name in arguments.slices:
                profile = load_reference(*SLICES[name][2:], pooled=table == "pooled")
                report[table][name] = study_slice(name, profile, variants, arguments.seeds)
                print(table, name, file=sys.stderr, flush=True)
    print(tables(report))
    if arguments.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
