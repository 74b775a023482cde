"""LLOKI-CAE's `reference` preset against the authors' code, run on the CPU from the checkout LLOKI_CHECKOUT names.

Both sides get the same weights, chunks and negatives (theirs are drawn by a patched `torch.randint`). Tolerances: 1e-5
relative on the losses of one chunk (their triplet distances add 1e-6 to every difference), mutual pairs equal as sets,
1e-4 relative on the losses of every epoch of a training.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support.published_autoencoder import (
    FOLDER,
    import_published,
    injected,
    published_model,
    train_published,
)

from lloki_atlas.config import AutoencoderConfig
from lloki_atlas.models.autoencoder import ConditionalAutoencoder
from lloki_atlas.models.mutual import mutual_neighbors
from lloki_atlas.models.pairs import balanced_chunks, chunk_neighbors, nearest_pairs
from lloki_atlas.models.step import Chunk, TrainingStep

CONFIG = AutoencoderConfig(preset="reference", chunk_cells=400)
SIZES = (300, 260, 340)
N_EPOCHS = 4


@pytest.fixture(scope="module")
def published():
    """The authors' autoencoder and its training."""
    folder = os.environ.get("LLOKI_CHECKOUT")
    if not folder or not (Path(folder) / FOLDER / "train.py").exists():
        pytest.skip("no checkout of the published code: set LLOKI_CHECKOUT to its folder")
    pytest.importorskip("matplotlib")
    return import_published(Path(folder))


class Draws:
    """Negatives for both sides: the n-th draw of a run is the same share of however many cells there are."""

    def __init__(self) -> None:
        self.shares = np.random.default_rng(3)

    def integers(self, low: int, high: np.ndarray) -> np.ndarray:
        """As `numpy.random.Generator.integers`."""
        return (self.shares.random(len(high)) * (high - low)).astype(np.int64) + low

    def randint(self, low: int, high: int, shape: tuple[int], device: torch.device) -> torch.Tensor:
        """As `torch.randint`."""
        return torch.tensor((self.shares.random(shape) * (high - low)).astype(np.int64) + low, device=device)


@pytest.fixture(scope="module")
def sample() -> tuple[np.ndarray, np.ndarray]:
    """Unit rows of types that every batch shows, shifted by the batch."""
    rng = np.random.default_rng(11)
    batch = np.repeat(np.arange(len(SIZES)), SIZES)
    values = rng.normal(size=(6, 512))[rng.integers(0, 6, len(batch))] + 0.6 * rng.normal(size=(3, 512))[batch]
    values += 0.7 * rng.normal(size=values.shape)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32), batch


@pytest.fixture
def models(published) -> tuple[ConditionalAutoencoder, torch.nn.Module]:
    """Ours and theirs, with the same weights."""
    ours = ConditionalAutoencoder([f"batch {code}" for code in range(3)], token_size=CONFIG.token_size)
    return ours, published_model(published, ours, CONFIG.token_size)


def chunk_of(sample: tuple[np.ndarray, np.ndarray], rows: np.ndarray) -> Chunk:
    embeddings, batch = sample
    return Chunk(embeddings[rows], batch[rows], batch[rows])


def latents_by_batch(z: torch.Tensor, batch: np.ndarray) -> list[torch.Tensor]:
    return [z[torch.from_numpy(batch == code)] for code in range(3)]


def test_latents_and_reconstructions_are_theirs(sample, models):
    ours, theirs = models
    x, batch = (torch.from_numpy(array) for array in sample)
    with torch.no_grad():
        z = ours.encode(x, batch)
        torch.testing.assert_close(z, theirs.encode(x, batch), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.decode(z, batch), theirs(x, batch), rtol=1e-5, atol=1e-6)


def test_losses_of_a_chunk_are_theirs(published, sample, models):
    ours, theirs = models
    x, batch = (torch.from_numpy(array) for array in sample)
    with torch.no_grad():
        z = theirs.encode(x, batch)
        by_batch = latents_by_batch(z, sample[1])
        pairs = published.train.find_mutual_nearest_neighbors([rows.numpy() for rows in by_batch], n_neighbors=40)
        with injected(published, Draws().randint):
            triplet = published.train.triplet_loss(by_batch, pairs, margin=CONFIG.margin)
        near = published.train.compute_batch_nearest_neighbors(batch, x, k_neighbors=30)
        conservation = published.train.neighborhood_preservation_loss_old(
            z, torch.tensor(near[0]), torch.tensor(near[1], dtype=torch.float32)
        )
        reconstruction = theirs.loss(theirs.decode(z, batch), x)
    with TrainingStep(ours, CONFIG) as step:
        found = step.losses(chunk_of(sample, np.arange(len(batch))), Draws())
    assert found["n_triplets"] == len(pairs) > 100
    assert found["reconstruction"] == pytest.approx(reconstruction.item(), rel=1e-5)
    assert found["triplet"] == pytest.approx(triplet.item(), rel=1e-5)
    assert found["conservation"] == pytest.approx(conservation.item(), rel=1e-5)


@pytest.mark.parametrize("k", [5, 40, 260])
def test_mutual_pairs_are_theirs(published, sample, models, k):
    z = models[1].encode(*(torch.from_numpy(array) for array in sample)).detach()
    starts = np.concatenate([[0], np.cumsum(SIZES)])
    pairs = published.train.find_mutual_nearest_neighbors(
        [rows.numpy() for rows in latents_by_batch(z, sample[1])], n_neighbors=k
    )
    expected = {
        (starts[pair["batch_A"]] + pair["index_A"], starts[pair["batch_B"]] + pair["index_B"]) for pair in pairs
    }
    mutual = mutual_neighbors(z, platform=sample[1], n_neighbors=k)
    found = nearest_pairs(mutual, len(z), both=False)
    assert set(zip(*found, strict=True)) == expected


def test_conserved_neighbours_are_theirs(published, sample):
    x, batch = (torch.from_numpy(array) for array in sample)
    indices, distances = published.train.compute_batch_nearest_neighbors(batch, x, k_neighbors=30)
    neighbors, found = chunk_neighbors(x, groups=sample[1], n_neighbors=30)
    order = np.argsort(neighbors, axis=1)
    np.testing.assert_array_equal(np.take_along_axis(neighbors, order, axis=1), np.sort(indices, axis=1))
    theirs = np.take_along_axis(distances, np.argsort(indices, axis=1), axis=1)
    np.testing.assert_allclose(np.take_along_axis(found, order, axis=1), theirs, atol=1e-5)


def test_trainings_keep_together(published, sample, models):
    embeddings, batch = sample
    ours, theirs = models
    rows = balanced_chunks(batch, chunk_cells=CONFIG.chunk_cells, generator=np.random.default_rng(0))
    expected = train_published(
        published,
        theirs,
        embeddings,
        batch,
        chunks=rows,
        epochs=N_EPOCHS,
        negatives=Draws().randint,
        lr=CONFIG.learning_rate,
        lamb=CONFIG.triplet_weight,
        lamb_neighborhood=CONFIG.conservation_weight,
        margin=CONFIG.margin,
        knn=CONFIG.n_neighbors_mutual,
    )
    chunks, draws = [chunk_of(sample, chunk) for chunk in rows], Draws()
    weights = {"reconstruction": 1.0, "triplet": CONFIG.triplet_weight, "conservation": 1.0}
    with TrainingStep(ours, CONFIG, n_threads=2) as step:
        for epoch in range(N_EPOCHS):
            losses = [step.update(chunk, draws) for chunk in chunks]
            for name, weight in weights.items():
                mean = weight * np.mean([loss[name] for loss in losses])
                assert mean == pytest.approx(expected[name][epoch], rel=1e-4), (name, epoch)
    assert expected["total"][-1] < 0.95 * expected["total"][0]
