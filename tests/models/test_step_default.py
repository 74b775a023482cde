"""The forms of the default step, without negatives and between means, against plain loops over a chunk."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lloki_atlas.config import AutoencoderConfig
from lloki_atlas.models.autoencoder import ConditionalAutoencoder
from lloki_atlas.models.losses import pair_loss
from lloki_atlas.models.step import Chunk, TrainingStep

TOLERANCE = 1e-5


def chunk(n: int = 90, seed: int = 0) -> Chunk:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, 512)).astype(np.float32)
    rows[:, 20:] *= 0.05
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    platform = np.arange(n) % 3
    return Chunk(rows, platform.astype(np.int64), (platform + 3 * (np.arange(n) % 2)).astype(np.int64))


def step(config: AutoencoderConfig, n_threads: int = 1) -> TrainingStep:
    return TrainingStep(ConditionalAutoencoder(["a|x", "b|x", "c|x"]), config, n_threads=n_threads)


def means(rows: np.ndarray, embeddings: np.ndarray, groups: np.ndarray, k: int) -> np.ndarray:
    found = np.empty_like(rows)
    for i in range(len(rows)):
        others = np.flatnonzero((groups == groups[i]) & (np.arange(len(rows)) != i))
        near = others[np.argsort(np.linalg.norm(embeddings[others] - embeddings[i], axis=1))[:k]]
        found[i] = rows[[i, *near]].mean(axis=0)
    return found


def mutual_distance(rows: np.ndarray, space: np.ndarray, platform: np.ndarray, k: int) -> float:
    """Mean distance of every cell and its nearest mutual neighbour in each other platform."""
    unit = space / np.linalg.norm(space, axis=1, keepdims=True)
    cosines, distances = unit @ unit.T, []
    for own in np.unique(platform):
        for other in set(np.unique(platform)) - {own}:
            left, right = np.flatnonzero(platform == own), np.flatnonzero(platform == other)
            part = cosines[np.ix_(left, right)]
            mutual = (part >= np.sort(part, axis=1)[:, -k][:, None]) & (part >= np.sort(part, axis=0)[-k]) & (part > 0)
            for i in np.flatnonzero(mutual.any(axis=1)):
                j = np.where(mutual[i], part[i], -2).argmax()
                distances.append(np.linalg.norm(rows[left[i]] - rows[right[j]]))
    return float(np.mean(distances))


@pytest.mark.parametrize("n_mean", [0, 4])
@pytest.mark.parametrize("pair_space", ["embedding", "latent"])
def test_the_pull_is_the_mean_distance_of_mutual_neighbours_or_of_their_means(n_mean: int, pair_space: str):
    config = AutoencoderConfig(n_neighbors_mean=n_mean, pair_space=pair_space, n_neighbors_mutual=5, n_distant=0)
    cells = chunk()
    with step(config) as found, torch.no_grad():
        latents = found.model.encode(torch.from_numpy(cells.embeddings), torch.from_numpy(cells.platform)).numpy()
        losses = found.losses(cells, np.random.default_rng(0))
    averaged = means(latents, cells.embeddings, cells.slice_codes, n_mean)
    space = averaged if pair_space == "latent" else means(cells.embeddings, cells.embeddings, cells.slice_codes, n_mean)
    expected = mutual_distance(averaged, space, cells.platform, 5)
    assert losses["triplet"] == pytest.approx(expected, abs=TOLERANCE)


def test_random_cells_of_the_slice_are_conserved_as_well():
    cells = chunk()
    losses = []
    for n_distant in (0, 5):
        with step(AutoencoderConfig(n_distant=n_distant)) as found:
            losses.append(found.losses(cells, np.random.default_rng(0))["conservation"])
    assert losses[0] != losses[1]


def test_the_default_step_moves_pairs_together_and_keeps_distances():
    cells = chunk(240)
    config = AutoencoderConfig(learning_rate=3e-3)
    with step(config) as found:
        losses = [found.update(cells, np.random.default_rng(i)) for i in range(40)]
    assert losses[-1]["total"] < 0.6 * losses[0]["total"]


def test_the_default_step_has_the_same_bytes_on_any_number_of_threads():
    cells = chunk(240)
    weights = []
    for n_threads in (1, 3):
        with step(AutoencoderConfig(), n_threads) as found:
            for i in range(2):
                found.update(cells, np.random.default_rng(i))
            weights.append(torch.cat([value.detach().ravel() for value in found.model.parameters()]))
    assert torch.equal(*weights)


def test_labels_of_different_types_are_not_pulled_together():
    cells = chunk()
    labels = np.arange(len(cells.embeddings)) % 3  # no type is on two platforms
    with step(AutoencoderConfig()) as found:
        losses = found.losses(dataclasses.replace(cells, labels=labels), np.random.default_rng(0))
    assert losses["n_triplets"] == 0
    assert losses["triplet"] == 0


@pytest.mark.parametrize("equations", ["code", "paper"])
def test_the_pair_loss_is_a_mean_of_distances_and_its_gradient_that_of_finite_differences(equations: str):
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 3))).requires_grad_()
    left, right = torch.tensor([0, 1, 2]), torch.tensor([5, 6, 7])
    distances = (rows[left] - rows[right]).norm(dim=1)
    expected = distances.square().mean() if equations == "paper" else distances.mean()
    found = pair_loss(rows, left, right, equations=equations)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.autograd.gradcheck(lambda r: pair_loss(r, left, right, equations=equations), (rows,))
    assert pair_loss(rows, left[:0], right[:0]).item() == 0
