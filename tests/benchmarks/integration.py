"""What the autoencoder does to real slices: does it mix technologies, and what does it cost?

    python -m tests.benchmarks.integration [MANIFEST] [--seeds 5] [--cells 0] [--ablations] [--only TEXT] [--votes-only]

Embeds the slices of the manifest once (default: catalogs/mouse-cortex.toml), then compares `X_fp` itself, Harmony on
it (one run a seed), the autoencoder as it is by default, and preset `paper`; with --ablations each loss off and each
choice of the default undone. Scores: balanced accuracy of the vote of the 15 nearest cells of the other technologies
(cosine), `mixing` (how many technologies the 15 nearest of 4,000 cells are of: 0 its own alone, 1 as many as there
are), and raw scib-metrics on the labelled cells, biology the mean of isolated labels, KMeans NMI and ARI,
silhouette label, cLISI; batch the mean of BRAS, iLISI, kBET, graph connectivity, with PCR comparison left out;
total 0.6 biology + 0.4 batch. Needs the extra `metrics`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lloki_atlas import open_catalog, select_cells
from lloki_atlas.config import AutoencoderConfig
from lloki_atlas.kernels.neighbors import nearest_rows
from lloki_atlas.models.criterion import platform_mixing
from lloki_atlas.models.encoder import FrozenEncoder
from lloki_atlas.models.training import train_autoencoder_on
from lloki_atlas.stages.build import build
from lloki_atlas.stages.train import NO_LABEL
from tests.benchmarks.votes import balanced_accuracy, vote

N_VOTES = 15
DEFAULT = AutoencoderConfig()
PAPER = AutoencoderConfig(preset="paper")
ABLATIONS: dict[str, AutoencoderConfig] = {
    "default, no pairs": dataclasses.replace(DEFAULT, triplet_weight=0.0),
    "default, no conservation": dataclasses.replace(DEFAULT, conservation_weight=0.0),
    "default, no reconstruction": dataclasses.replace(DEFAULT, reconstruction_weight=0.0),
    "default, random start": dataclasses.replace(DEFAULT, start="random"),
    "default, random negatives": dataclasses.replace(DEFAULT, negatives="slice"),
    "default, single cells": dataclasses.replace(DEFAULT, n_neighbors_mean=0),
    "default, pairs among latents": dataclasses.replace(DEFAULT, pair_space="latent"),
    "default, no distant cells": dataclasses.replace(DEFAULT, n_distant=0),
    "paper, no triplets": dataclasses.replace(PAPER, triplet_weight=0.0),
    "paper, no conservation": dataclasses.replace(PAPER, conservation_weight=0.0),
    "paper, conservation 1": dataclasses.replace(PAPER, conservation_weight=1.0),
    "paper, conservation 1, isometric start": dataclasses.replace(PAPER, conservation_weight=1.0, start="isometric"),
}


@dataclasses.dataclass(frozen=True)
class Cells:
    """Embedded cells: `embeddings` (n, 512) float32, and text of each."""

    embeddings: np.ndarray
    technology: np.ndarray
    platform: np.ndarray
    slice_id: np.ndarray
    label: np.ndarray


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", nargs="?", default="catalogs/mouse-cortex.toml")
    parser.add_argument("--label-key", default="cell_type_coarse")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cells", type=int, default=0, help="most labelled cells to score with scib; 0: all")
    parser.add_argument("--ablations", action="store_true", help="one seed each")
    parser.add_argument("--only", default="", help="contenders whose name holds this text")
    parser.add_argument("--votes-only", action="store_true", help="no scib-metrics")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    cells = embedded_cells(arguments.manifest, arguments.label_key)
    rows = []
    for name, seed, latents in contenders(cells, arguments.seeds, ablations=arguments.ablations, only=arguments.only):
        scores: dict[str, Any] = {"method": name, "seed": seed, **cross_votes(latents, cells)}
        scores["mixing"] = mixing(latents, cells)
        if not arguments.votes_only:
            scores.update(scib_scores(latents, cells, most=arguments.cells))
        rows.append(scores)
        print(json.dumps(scores), file=sys.stderr, flush=True)
    if not rows:
        parser.error(f"no contender's name holds '{arguments.only}' (those of the ablations need --ablations)")
    table = pd.DataFrame(rows).groupby("method", sort=False).agg(["mean", "std"]).drop(columns="seed", level=0)
    print(table.xs("mean", axis=1, level=1).round(3).to_string())
    print("\nstandard deviation over seeds")
    print(table.xs("std", axis=1, level=1).dropna().round(3).to_string())
    if arguments.json:
        print(json.dumps(rows))


def embedded_cells(manifest: str, label_key: str) -> Cells:
    """Build up to the 512-d embedding, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        catalog = open_catalog(build(manifest, root=Path(folder) / "atlas", until="embed", progress=False).root)
        adata = select_cells(catalog).to_anndata()
        panels = {name: record.panel for name, record in catalog.state.slices.items()}
    adata = adata[np.isfinite(adata.obsm["X_fp"][:, 0])]
    obs = {name: adata.obs[name].astype(str).to_numpy() for name in ("technology", "slice_id", label_key)}
    platform = np.array([f"{t}|{panels[s]}" for t, s in zip(obs["technology"], obs["slice_id"], strict=True)])
    embeddings = np.ascontiguousarray(adata.obsm["X_fp"], dtype=np.float32)
    return Cells(embeddings, obs["technology"], platform, obs["slice_id"], obs[label_key])


def contenders(cells: Cells, n_seeds: int, *, ablations: bool, only: str = "") -> Iterator[tuple[str, int, np.ndarray]]:
    """Name, seed and (n, d) latents of every contender whose name holds the text."""
    if only in "X_fp":
        yield "X_fp", 0, cells.embeddings
    methods: dict[str, Callable[[int], np.ndarray]] = {
        "X_fp, Harmony": lambda seed: harmony(cells, seed),
        "autoencoder, default": lambda seed: trained(cells, DEFAULT, seed),
        "autoencoder, paper": lambda seed: trained(cells, PAPER, seed),
    }
    for seed in range(n_seeds):
        for name, method in methods.items():
            if only in name:
                yield name, seed, method(seed)
    for name, config in ABLATIONS.items() if ablations else ():
        if only in name:
            yield name, 0, trained(cells, config, 0)


def trained(cells: Cells, config: AutoencoderConfig, seed: int) -> np.ndarray:
    """Latents of all cells by an autoencoder trained on them."""
    platforms, platform = np.unique(cells.platform, return_inverse=True)
    slices = np.unique(cells.slice_id, return_inverse=True)[1]
    config = dataclasses.replace(config, random_state=seed)
    started = time.perf_counter()
    model, _ = train_autoencoder_on(cells.embeddings, platform, slices, platforms.tolist(), config=config)
    print(f"trained in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    encoder = FrozenEncoder(model)
    latents = np.empty((len(platform), 128), np.float32)
    for code in range(len(platforms)):
        latents[platform == code] = encoder.encode(cells.embeddings[platform == code], code)
    return latents


def harmony(cells: Cells, seed: int) -> np.ndarray:
    """Harmony on the principal components of the embeddings, one batch a technology."""
    import harmonypy

    values = cells.embeddings[:, np.abs(cells.embeddings).sum(axis=0) > 0].astype(np.float64)
    frame = pd.DataFrame({"technology": cells.technology})
    found = np.asarray(harmonypy.run_harmony(values, frame, ["technology"], random_state=seed, verbose=False).Z_corr)
    return (found if len(found) == len(values) else found.T).astype(np.float32)


def cross_votes(latents: np.ndarray, cells: Cells) -> dict[str, float]:
    """Balanced accuracy of the vote of the nearest cells of the other technologies, and its mean."""
    known = ~np.isin(cells.label, NO_LABEL)
    directions = latents / np.maximum(np.linalg.norm(latents, axis=1, keepdims=True), 1e-12)
    scores = {}
    for technology in sorted(set(cells.technology[known])):
        own, others = known & (cells.technology == technology), known & (cells.technology != technology)
        types = sorted(set(cells.label[own]) & set(cells.label[others]))
        if len(types) < 2:
            continue
        own &= np.isin(cells.label, types)
        found = nearest_rows(directions[own], directions[others], n_neighbors=N_VOTES).indices
        voted = np.array([vote(list(row)) for row in cells.label[others][found]])
        scores[technology] = balanced_accuracy(cells.label[own], voted, types)
    return {**scores, "votes": float(np.mean(list(scores.values())))}


def mixing(latents: np.ndarray, cells: Cells) -> float:
    """Effective number of technologies among the nearest cells of a sample, from 0 to 1."""
    rows = np.random.default_rng(0).choice(len(latents), min(4000, len(latents)), replace=False)
    directions = latents[rows] / np.maximum(np.linalg.norm(latents[rows], axis=1, keepdims=True), 1e-12)
    technology = np.unique(cells.technology[rows], return_inverse=True)[1]
    return platform_mixing(directions @ directions.T, technology, N_VOTES)


def scib_scores(latents: np.ndarray, cells: Cells, *, most: int = 0) -> dict[str, float]:
    """Raw scib-metrics of the labelled cells; exact Euclidean neighbours."""
    import scib_metrics as scib
    from scib_metrics.nearest_neighbors import NeighborsResults
    from sklearn.neighbors import NearestNeighbors

    rows = np.flatnonzero(~np.isin(cells.label, NO_LABEL))
    if most and len(rows) > most:
        rows = np.sort(np.random.default_rng(0).choice(rows, most, replace=False))
    values = np.ascontiguousarray(latents[rows], dtype=np.float32)
    batch = np.unique(cells.technology[rows], return_inverse=True)[1]
    label = np.unique(cells.label[rows], return_inverse=True)[1]
    distances, indices = NearestNeighbors(n_neighbors=90, algorithm="brute").fit(values).kneighbors(values)

    def near(k: int) -> Any:
        return NeighborsResults(indices=indices[:, :k], distances=distances[:, :k])

    clusters = scib.nmi_ari_cluster_labels_kmeans(values, label)
    biology = {
        "isolated": scib.isolated_labels(values, label, batch),
        "NMI": clusters["nmi"],
        "ARI": clusters["ari"],
        "silhouette": scib.silhouette_label(values, label),
        "cLISI": scib.clisi_knn(near(90), label),
    }
    batches = {
        "BRAS": scib.bras(values, label, batch),
        "iLISI": scib.ilisi_knn(near(90), batch),
        "kBET": scib.kbet_per_label(near(50), batch, label),
        "connectivity": scib.graph_connectivity(near(15), label),
    }
    means = {"biology": np.mean(list(biology.values())), "batch": np.mean(list(batches.values()))}
    total = 0.6 * means["biology"] + 0.4 * means["batch"]
    return {name: float(value) for name, value in {**biology, **batches, **means, "total": total}.items()}


if __name__ == "__main__":
    main()
