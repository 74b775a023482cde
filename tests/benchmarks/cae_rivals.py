"""The sample of `tests.benchmarks.cae`, and one contender trained on it in a process of its own.

    python -m tests.benchmarks.cae_rivals NAME --sample SAMPLE.npz --out RESULT.json   (what the benchmark calls)

Contenders: `authors` (the published training loop), `ours` (preset `reference`, the same chunks), `default` (default
settings, chunks drawn anew in every epoch). All start from the same weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lloki_atlas.config import AutoencoderConfig
from lloki_atlas.models.autoencoder import ConditionalAutoencoder
from lloki_atlas.models.pairs import balanced_chunks
from lloki_atlas.models.step import Chunk, TrainingStep
from tests.support.published_autoencoder import import_published, published_model, train_published

CONTENDERS = ("authors", "ours", "default")
N_BATCHES = 5
N_TYPES = 20
WARM_CELLS = 600
LOSSES = ("total", "reconstruction", "triplet", "conservation")

Epochs = list[dict[str, float]]


def make_sample(n_cells: int, seed: int) -> dict[str, np.ndarray]:
    """Unit rows of types that every batch shows, each shifted by its batch: `embeddings` and `batch`."""
    rng = np.random.default_rng(seed)
    batch = np.sort(np.arange(n_cells) % N_BATCHES)
    types = rng.choice(N_TYPES, n_cells, p=rng.dirichlet(np.full(N_TYPES, 2.0)))
    centers, shifts = rng.normal(size=(N_TYPES, 512)), rng.normal(size=(N_BATCHES, 512))
    values = centers[types] + 0.6 * shifts[batch] + 0.6 * rng.normal(size=(n_cells, 512))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return {"embeddings": values.astype(np.float32), "batch": batch}


def settings(preset: str, *, epochs: int, chunk_cells: int, n_neighbors: int) -> AutoencoderConfig:
    """The preset with the sizes of the benchmark; the default settings keep their own number of neighbours."""
    config = AutoencoderConfig(preset=preset, n_epochs=epochs, chunk_cells=chunk_cells)  # type: ignore[arg-type]
    return config if preset == "default" else dataclasses.replace(config, n_neighbors_mutual=n_neighbors)


def new_model(config: AutoencoderConfig) -> ConditionalAutoencoder:
    """The weights that everyone starts from."""
    return ConditionalAutoencoder([f"batch {code}" for code in range(N_BATCHES)], token_size=config.token_size)


def fixed_chunks(batch: np.ndarray, config: AutoencoderConfig) -> list[np.ndarray]:
    """The chunks of `authors` and `ours`."""
    return balanced_chunks(batch, chunk_cells=config.chunk_cells, generator=np.random.default_rng(0))


def run_authors(sample: dict[str, np.ndarray], config: AutoencoderConfig, checkout: Path) -> Epochs:
    """Their loop; what they print after an epoch tells its time."""
    published = import_published(checkout)
    ends: list[float] = []
    published.train.print = lambda *_: ends.append(time.perf_counter())
    model = published_model(published, new_model(config), config.token_size)
    rows = fixed_chunks(sample["batch"], config)
    torch.manual_seed(0)
    started = time.perf_counter()
    found = train_published(
        published,
        model,
        sample["embeddings"],
        sample["batch"],
        chunks=rows,
        epochs=config.n_epochs,
        lr=config.learning_rate,
        lamb=config.triplet_weight,
        lamb_neighborhood=config.conservation_weight,
        margin=config.margin,
        knn=config.n_neighbors_mutual,
    )
    seconds = np.diff([started, *ends])
    return [
        {**{name: found[name][epoch] for name in LOSSES}, "seconds": float(seconds[epoch])}
        for epoch in range(config.n_epochs)
    ]


def run_ours(sample: dict[str, np.ndarray], config: AutoencoderConfig, n_threads: int) -> Epochs:
    """Our steps, on the chunks of the authors' loop or on new ones in every epoch."""
    embeddings, batch = sample["embeddings"], sample["batch"]
    epochs: Epochs = []
    chunks: list[Chunk] = []
    ended = time.perf_counter()
    with TrainingStep(new_model(config), config, n_threads=n_threads) as step:
        for epoch in range(config.n_epochs):
            generator = np.random.default_rng([config.random_state, epoch])
            if config.chunks == "redrawn":
                drawn = balanced_chunks(batch, chunk_cells=config.chunk_cells, generator=generator)
            else:
                drawn = fixed_chunks(batch, config)
            if config.chunks == "redrawn" or not chunks:
                chunks = [Chunk(embeddings[rows], batch[rows], batch[rows]) for rows in drawn]
            steps = [step.update(chunk, generator) for chunk in chunks]
            means = {name: float(np.mean([losses[name] for losses in steps])) for name in LOSSES[1:]}
            # the sum that the authors report: the triplet loss weighted, the conservation loss not
            means["triplet"] *= config.triplet_weight
            started, ended = ended, time.perf_counter()
            epochs.append({"total": sum(means.values()), **means, "seconds": ended - started})
    return epochs


def memory(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    """Warm up on a few cells, train, write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("--sample", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkout", type=Path)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--chunk-cells", type=int, required=True)
    parser.add_argument("--neighbors", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    sizes = {"chunk_cells": given.chunk_cells, "n_neighbors": given.neighbors}
    preset = "default" if given.name == "default" else "reference"

    def train(sample: dict[str, np.ndarray], epochs: int) -> Epochs:
        config = settings(preset, epochs=epochs, **sizes)
        if given.name == "authors":
            return run_authors(sample, config, given.checkout)
        return run_ours(sample, config, given.threads)

    started = time.perf_counter()
    train(make_sample(WARM_CELLS, seed=1), epochs=1)
    warm_up = time.perf_counter() - started
    sample = dict(np.load(given.sample))
    before = memory("VmRSS")
    started, cpu = time.perf_counter(), time.process_time()
    epochs = train(sample, given.epochs)
    result: dict[str, Any] = {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}
    result |= {"warm_up_s": warm_up, "epochs": epochs}
    result |= {"peak_mb": memory("VmHWM") / 1e6, "above_sample_mb": (memory("VmHWM") - before) / 1e6}
    given.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
