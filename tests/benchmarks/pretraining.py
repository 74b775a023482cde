"""Does an embedder of one's own beat the same architecture untrained, and principal components?

    python -m tests.benchmarks.pretraining [--minutes 20] [--checkpoint DIR] [--seed 0] [--threads N] [--json]

Trains on the 10x reference of mouse cortex, with the genes of the slices below and their mean counts (or takes a
folder that `lloki-atlas pretrain` wrote), and embeds those slices: counts as `measured`, counts `diffused` by LLOKI-FP
(`propagation.diffuse = "counts"`), and `diffused after`, embeddings of measured counts, diffused (`"embedding"`).

purity: share of a cell's 15 nearest cells (cosine; its slice, labelled cells, itself left out) that have its label.
Mean over cells / mean over labels of at least 16 cells. osmFISH and ISS chose the settings; STARmap and VISp did not.
votes: balanced accuracy of the majority of the 15 nearest cells of the other technologies (osmFISH, STARmap, VISp).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits

from lloki_atlas import fit_reference, propagate_slice
from lloki_atlas.config import EmbedderConfig
from lloki_atlas.kernels.neighbors import nearest_rows
from lloki_atlas.kernels.scaling import gene_moments
from lloki_atlas.models.checkpoint import read_checkpoint
from lloki_atlas.models.embedders import ReferenceEmbedder, ReferenceFactors, ReferenceFactory
from lloki_atlas.models.pretraining_model import PretrainingModel, Shape
from lloki_atlas.models.scgpt import load_scgpt
from lloki_atlas.models.tokens import tokenize
from lloki_atlas.stages.pretrain import pretrain
from lloki_atlas.store.references import ReferenceProfile
from tests.benchmarks.departures import DATA, LABELS, MOP, SLICES, known_labels, load_slice
from tests.benchmarks.votes import balanced_accuracy, vote

NAMES = ("osmFISH", "ISS", "STARmap BZ5", "STARmap BZ9", "VISp")
VOTERS = {"osmFISH": "osmFISH", "STARmap BZ5": "STARmap", "STARmap BZ9": "STARmap", "VISp": "VISp"}
INPUTS = ("measured", "diffused", "diffused after")
N_NEIGHBORS, N_COMPONENTS = 15, 20

Embed = Callable[[ad.AnnData, str], np.ndarray]


def prepared(name: str, profile: ReferenceProfile) -> ad.AnnData:
    """Cells of a slice after LLOKI-FP, with their totals over the whole panel and their labels."""
    adata = load_slice(name)
    out = propagate_slice(adata, profile, slice_id=name)
    out.obs["total"] = np.asarray(adata.X.sum(axis=1)).ravel()
    for column in LABELS.values():
        out.obs[column] = known_labels(adata, column)
    return out


def values(slice_: ad.AnnData, which: str) -> np.ndarray:
    """Dense rows of a slice: counts, or diffused counts."""
    found = slice_.layers["counts"] if which == "measured" else slice_.X
    return np.asarray(found.toarray() if hasattr(found, "toarray") else found, dtype=np.float32)


def components(slice_: ad.AnnData, which: str, *, scaled: bool) -> np.ndarray:
    """Principal components of the rows as they are, or library-normalised, log1p and z-scored."""
    rows = values(slice_, which).astype(np.float64)
    if scaled:
        total = rows.sum(axis=1, keepdims=True)
        rows = np.log1p(rows / np.maximum(total, 1e-9) * np.median(total[total > 0]))
        rows = np.clip((rows - rows.mean(axis=0)) / (rows.std(axis=0) + 1e-3), -8, 8)
    u, s, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    return (u * s)[:, :N_COMPONENTS]


def bins(slice_: ad.AnnData, which: str) -> np.ndarray:
    """Principal components of the value bins, all that a model of this architecture is given."""
    rows = values(slice_, which)
    tokens = tokenize(rows, np.arange(rows.shape[1]), n_bins=51, max_genes=rows.shape[1])
    table = csr_matrix((tokens.digits.astype(np.float64), tokens.genes, tokens.indptr), rows.shape).toarray()
    u, s, _ = np.linalg.svd(table - table.mean(axis=0), full_matrices=False)
    return (u * s)[:, :N_COMPONENTS]


def diffused_after(slice_: ad.AnnData, embedding: np.ndarray) -> np.ndarray:
    """Mix embeddings along the graph; a cell without one has none afterwards."""
    missing = ~np.isfinite(embedding).all(axis=1)
    mixed = np.asarray(csr_matrix(slice_.obsp["propagation_graph"]) @ np.where(missing[:, None], 0, embedding))
    mixed[missing] = np.nan
    return mixed


def closed_form(slice_: ad.AnnData, which: str, profile: ReferenceProfile) -> np.ndarray:
    """The `reference` embedder; it diffuses z-scored log counts."""
    symbols = tuple(slice_.var_names)
    counts = csr_matrix(slice_.layers["counts"])
    totals = slice_.obs["total"].to_numpy(dtype=np.float32)
    target = float(np.median(totals[totals > 0]))
    moments = gene_moments(counts, totals, target_total=target)
    factors = ReferenceFactors(profile.columns(symbols), profile.totals, profile.factors, profile.target_total)
    weights = ReferenceFactory().fit_panel(EmbedderConfig(), factors)["weights"]
    embedder = ReferenceEmbedder(weights, moments.mean, moments.sd, target)
    sparse, baseline = embedder.transform(counts, totals)
    if which == "diffused":
        graph = csr_matrix(slice_.obsp["propagation_graph"])
        sums = np.asarray(graph.sum(axis=1))
        rows = (graph @ sparse).toarray() + sums * baseline[None, :]
    else:
        rows = sparse.toarray() + baseline[None, :]
    return embedder.embed(np.ascontiguousarray(rows, dtype=np.float32))


def untrained(folder: Path, checkpoint: Path, *, random_state: int) -> Path:
    """Write the same three files with random weights."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("training.json", "loss.svg", "unfinished.pt"))
    read = read_checkpoint(checkpoint)
    settings = read.settings
    shape = Shape(
        n_tokens=len(read.vocabulary),
        width=settings.embsize,
        n_heads=settings.nheads,
        n_hidden=settings.d_hid,
        n_layers=settings.nlayers,
        n_bins=settings.n_bins,
        n_outputs=1,
        pad=read.vocabulary.pad,
        pad_value=settings.pad_value,
        mask_value=-1,
    )
    torch.save(PretrainingModel(shape, random_state=random_state).state_dict(), folder / "best_model.pt")
    return folder


def purity(embedding: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Mean over cells, and over labels."""
    kept = (labels != "") & np.isfinite(embedding).all(axis=1)
    rows, names = np.ascontiguousarray(embedding[kept], dtype=np.float32), labels[kept]
    found = nearest_rows(rows, rows, n_neighbors=N_NEIGHBORS + 1).indices
    own = found == np.arange(len(rows))[:, None]
    own[~own.any(axis=1), -1] = True  # a cell among many equal ones may not find itself
    share = ((names[np.maximum(found, 0)] == names[:, None]) & (found >= 0) & ~own).sum(axis=1) / N_NEIGHBORS
    return float(share.mean()), float(np.mean([share[names == name].mean() for name in np.unique(names)]))


def votes(embeddings: dict[str, np.ndarray], slices: dict[str, ad.AnnData]) -> dict[str, float]:
    """Balanced accuracy per technology, coarse types."""
    rows = np.concatenate([embeddings[name] for name in VOTERS]).astype(np.float32)
    labels = np.concatenate([slices[name].obs[LABELS["coarse"]].to_numpy(dtype=str) for name in VOTERS])
    technologies = np.concatenate([np.full(slices[name].n_obs, technology) for name, technology in VOTERS.items()])
    known = (labels != "") & np.isfinite(rows).all(axis=1)
    scores = {}
    for technology in sorted(set(VOTERS.values())):
        own, others = known & (technologies == technology), known & (technologies != technology)
        types = sorted(set(labels[own]) & set(labels[others]))
        own &= np.isin(labels, types)
        found = nearest_rows(rows[own], rows[others], n_neighbors=N_NEIGHBORS).indices
        voted = np.array([vote(list(labels[others][row])) for row in found])
        scores[technology] = balanced_accuracy(labels[own], voted, types)
    return scores


def measure(methods: dict[str, Embed], slices: dict[str, ad.AnnData]) -> list[dict[str, Any]]:
    """One entry for every method, input and slice."""
    found = []
    for method, embed in methods.items():
        for which in INPUTS:
            embeddings = {name: _embedded(embed, slice_, which) for name, slice_ in slices.items()}
            for name, slice_ in slices.items():
                scores = {
                    key: purity(embeddings[name], slice_.obs[column].to_numpy(dtype=str))
                    for key, column in LABELS.items()
                }
                found.append({"method": method, "input": which, "slice": name, **scores})
            if not method.startswith("PCA"):  # components of one slice say nothing about another
                found.append({"method": method, "input": which, "slice": "votes", **votes(embeddings, slices)})
    return found


def _embedded(embed: Embed, slice_: ad.AnnData, which: str) -> np.ndarray:
    if which == "diffused after":
        return diffused_after(slice_, embed(slice_, "measured"))
    return embed(slice_, which)


def tables(entries: list[dict[str, Any]]) -> str:
    """Markdown: purity of each kind of label, and votes."""
    frame = pd.DataFrame(entries)
    parts = []
    for key, column in LABELS.items():
        part = frame[frame["slice"] != "votes"].copy()
        part["text"] = [f"{cells:.3f} / {balanced:.3f}" for cells, balanced in part[key]]
        part = part.pivot_table(index=["input", "method"], columns="slice", values="text", aggfunc="first", sort=False)
        parts.append(f"purity, {column} (cells / labels)\n\n{_markdown(part)}")
    chosen = frame[frame["slice"] == "votes"].set_index(["input", "method"])[sorted(set(VOTERS.values()))]
    parts.append(f"votes, {LABELS['coarse']}\n\n{_markdown(chosen.map('{:.3f}'.format))}")
    return "\n\n".join(parts)


def _markdown(frame: pd.DataFrame) -> str:
    order = [INPUTS.index(which) for which in frame.index.get_level_values("input")]
    frame = frame.iloc[np.argsort(order, kind="stable")].reset_index()
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> None:
    """Train or read a model, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--epochs", type=int, default=110)
    parser.add_argument("--checkpoint", type=Path, action="append", help="repeatable: one row each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-panels", action="store_true", help="train on random panels alone")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    profile = fit_reference(DATA / f"{MOP}.h5ad", organism="mouse")
    with tempfile.TemporaryDirectory() as scratch, threadpool_limits(arguments.threads):
        checkpoints = arguments.checkpoint or [Path(scratch) / "trained"]
        if arguments.checkpoint is None:
            files = [] if arguments.no_panels else sorted({SLICES[name][0] for name in NAMES})
            pretrain(
                profile,
                checkpoints[0],
                panels=[DATA / f"{file}.h5ad" for file in files],
                n_epochs=arguments.epochs,
                minutes=arguments.minutes,
                n_threads=arguments.threads,
                random_state=arguments.seed,
            )
        folders = {
            f"random weights, seed {i}": untrained(Path(scratch) / f"random{i}", checkpoints[0], random_state=i)
            for i in (0, 1)
        }
        folders |= {f"pretrained ({folder.name})": folder for folder in checkpoints}
        models = {name: load_scgpt(folder, device="cpu") for name, folder in folders.items()}
        slices = {name: prepared(name, profile) for name in NAMES}
        methods: dict[str, Embed] = {
            "PCA, counts": lambda slice_, which: components(slice_, which, scaled=False),
            "PCA, z-scored log counts": lambda slice_, which: components(slice_, which, scaled=True),
            "PCA, value bins": bins,
            **{
                name: lambda slice_, which, model=model: model.embed(values(slice_, which), list(slice_.var_names))
                for name, model in models.items()
            },
            "closed form (`reference`)": lambda slice_, which: closed_form(slice_, which, profile),
        }
        entries = measure(methods, slices)
    print(tables(entries))
    if arguments.json:
        print(json.dumps(entries))


if __name__ == "__main__":
    main()
