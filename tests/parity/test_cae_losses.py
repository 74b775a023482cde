"""LLOKI-CAE's losses and pairs against textbook loops over single pairs.

Tolerances: 1e-6 absolute on values in float64 and, for latents of unit scale, in float32; gradients by finite
differences (`torch.autograd.gradcheck`, its defaults in float64). Pairs equal as sets.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lloki_atlas.config import AutoencoderConfig
from lloki_atlas.models.autoencoder import ConditionalAutoencoder
from lloki_atlas.models.losses import conservation_loss, reconstruction_loss, triplet_loss
from lloki_atlas.models.mutual import mutual_neighbors
from lloki_atlas.models.pairs import chunk_neighbors, hard_negatives, nearest_pairs
from lloki_atlas.models.step import Chunk, TrainingStep

TOLERANCE = 1e-6
SEEDS = range(4)


def distance(a, b) -> float:
    return math.sqrt(sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True)))


def textbook_reconstruction(reconstructed, x, equations: str = "code") -> float:
    total = 0.0
    for i in range(len(x)):
        squares = sum((float(a) - float(b)) ** 2 for a, b in zip(reconstructed[i], x[i], strict=True))
        total += squares / len(x[i]) if equations == "code" else squares
    return total / len(x)


def textbook_triplet(z, triplets, margin: float, equations: str = "code") -> float:
    total, power = 0.0, 1 if equations == "code" else 2
    for a, p, n in triplets:
        total += max(0.0, distance(z[a], z[p]) ** power - distance(z[a], z[n]) ** power + margin)
    return total / len(triplets)


def textbook_conservation(z, x, neighbors, equations: str = "code") -> float:
    total, n_pairs = 0.0, 0
    for i, row in enumerate(neighbors):
        for j in row:
            if j >= 0:
                total += (distance(z[i], z[j]) - distance(x[i], x[j])) ** 2
                n_pairs += 1
    return total / (n_pairs if equations == "code" else len(z))


def textbook_neighbors(z, candidates, i: int, k: int) -> list[int]:
    """The k candidates of largest positive cosine with i, ties with the last included."""
    cosines = {}
    for j in candidates:
        cosines[j] = float(np.dot(z[i], z[j]) / (np.linalg.norm(z[i]) * np.linalg.norm(z[j])))
    floor = sorted(cosines.values(), reverse=True)[: min(k, len(cosines))][-1]
    return [j for j in candidates if cosines[j] >= floor and cosines[j] > 0]


def textbook_mutual(z, platform, k: int) -> set[tuple[int, int]]:
    pairs = set()
    for i in range(len(z)):
        for other in set(platform.tolist()) - {int(platform[i])}:
            own = [j for j in range(len(z)) if platform[j] == platform[i]]
            theirs = [j for j in range(len(z)) if platform[j] == other]
            mutual = [j for j in textbook_neighbors(z, theirs, i, k) if i in textbook_neighbors(z, own, j, k)]
            if mutual:
                best = max(mutual, key=lambda j: np.dot(z[i], z[j]) / np.linalg.norm(z[j]))
                pairs.add((i, best))
    return pairs


def drawn(seed: int, n: int = 30, d: int = 8):
    rng = np.random.default_rng(seed)
    z, x = rng.normal(size=(n, d)) / 3, rng.normal(size=(n, 2 * d)) / 3
    triplets = np.array([rng.choice(n, 3, replace=False) for _ in range(25)])
    neighbors = np.array([rng.choice(np.delete(np.arange(n), i), 5, replace=False) for i in range(n)])
    neighbors[rng.random(neighbors.shape) < 0.1] = -1
    distances = np.array([[distance(x[i], x[j]) if j >= 0 else 0.0 for j in row] for i, row in enumerate(neighbors)])
    return z, x, triplets, neighbors, distances


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("equations", ["code", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reconstruction_is_the_textbook_mean(seed: int, equations: str, dtype: torch.dtype):
    z, _, *_ = drawn(seed)
    other, _, *_ = drawn(seed + 100)
    rows = torch.from_numpy(other).to(dtype), torch.from_numpy(z).to(dtype)
    found = reconstruction_loss(*rows, equations=equations).item()
    assert found == pytest.approx(textbook_reconstruction(other, z, equations), abs=TOLERANCE)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("margin", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("equations", ["code", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_triplet_loss_is_the_textbook_sum_over_triplets(seed: int, margin: float, equations: str, dtype: torch.dtype):
    z, _, triplets, *_ = drawn(seed)
    ends = [torch.from_numpy(column.copy()) for column in triplets.T]
    found = triplet_loss(torch.from_numpy(z).to(dtype), *ends, margin=margin, equations=equations).item()
    assert found == pytest.approx(textbook_triplet(z, triplets, margin, equations), abs=TOLERANCE)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("equations", ["code", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conservation_loss_is_the_textbook_sum_over_neighbours(seed: int, equations: str, dtype: torch.dtype):
    z, x, _, neighbors, distances = drawn(seed)
    latents, kept = torch.from_numpy(z).to(dtype), torch.from_numpy(distances).to(dtype)
    found = conservation_loss(latents, torch.from_numpy(neighbors), kept, equations=equations).item()
    assert found == pytest.approx(textbook_conservation(z, x, neighbors, equations), abs=TOLERANCE)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("equations", ["code", "paper"])
def test_gradient_of_the_reconstruction_loss_is_that_of_finite_differences(seed: int, equations: str):
    z, _, *_ = drawn(seed, n=6)
    rows = torch.from_numpy(z).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: reconstruction_loss(r, torch.ones_like(r), equations=equations), (rows,))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("equations", ["code", "paper"])
def test_gradient_of_the_triplet_loss_is_that_of_finite_differences(seed: int, equations: str):
    z, _, triplets, *_ = drawn(seed, n=12)
    ends = [torch.from_numpy(column.copy()) for column in triplets.T]
    rows = torch.from_numpy(z).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: triplet_loss(r, *ends, margin=0.4, equations=equations), (rows,))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("equations", ["code", "paper"])
def test_gradient_of_the_conservation_loss_is_that_of_finite_differences(seed: int, equations: str):
    z, _, _, neighbors, distances = drawn(seed, n=12)
    rows = torch.from_numpy(z).requires_grad_()
    ends = torch.from_numpy(neighbors), torch.from_numpy(distances)
    assert torch.autograd.gradcheck(lambda r: conservation_loss(r, *ends, equations=equations), (rows,))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [1, 3, 40])
def test_mutual_pairs_are_those_of_the_textbook(seed: int, k: int):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(40, 6)).astype(np.float32)
    platform = rng.integers(0, 3, 40)
    anchors, positives = nearest_pairs(mutual_neighbors(torch.from_numpy(z), platform=platform, n_neighbors=k), 40)
    found = list(zip(anchors.tolist(), positives.tolist(), strict=True))
    assert set(found) == textbook_mutual(z, platform, k)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("seed", SEEDS)
def test_hard_negatives_are_the_nearest_cells_of_another_label(seed: int):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(40, 6)).astype(np.float32)
    slices, labels = rng.integers(0, 3, 40), rng.integers(-1, 3, 40)
    expected = []
    for a in range(40):
        others = [j for j in range(40) if slices[j] == slices[a] and labels[j] >= 0 and labels[j] != labels[a]]
        expected.append(min(others, key=lambda j: distance(z[a], z[j])) if others and labels[a] >= 0 else -1)
    found = hard_negatives(torch.from_numpy(z), np.arange(40), slice_codes=slices, labels=labels)
    assert found.tolist() == expected


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_conserved_neighbours_and_distances_are_those_of_the_textbook(seed: int, offset: float):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(40, 16)) / 4 + offset).astype(np.float32)
    x[7] = x[8]
    x[9] = x[8] + np.float32(1e-3)
    groups = rng.integers(0, 2, 40)
    groups[7:10] = 0
    neighbors, distances = chunk_neighbors(torch.from_numpy(x), groups=groups, n_neighbors=5)
    for i in range(40):
        others = sorted(distance(x[i], x[j]) for j in range(40) if j != i and groups[j] == groups[i])
        assert len(set(neighbors[i]) - {i}) == 5
        assert (groups[neighbors[i]] == groups[i]).all()
        np.testing.assert_allclose(distances[i], [distance(x[i], x[j]) for j in neighbors[i]], atol=TOLERANCE)
        np.testing.assert_allclose(np.sort(distances[i]), others[:5], atol=TOLERANCE)


def published_triplets(z, platform, k: int, draw) -> list[tuple[int, int, int]]:
    """The published code's triplets: lists of neighbours, the first of which is mutual, and a draw for each."""
    triplets, codes = [], sorted(set(platform.tolist()))
    unit = [row / np.linalg.norm(row) for row in z]
    for first in codes:
        for second in [code for code in codes if code > first]:
            own = [i for i in range(len(z)) if platform[i] == first]
            theirs = [j for j in range(len(z)) if platform[j] == second]
            for i in own:
                for j in sorted(theirs, key=lambda j: -np.dot(unit[i], unit[j]))[:k]:
                    if i in sorted(own, key=lambda a: -np.dot(unit[a], unit[j]))[:k]:
                        triplets.append((i, j, own[draw(len(own))]))
                        break
    return triplets


class Shares:
    """Draws that are the same shares of however many there are to draw from."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(9)

    def integers(self, low, high):
        return (self.random.random(np.shape(high)) * (high - low)).astype(np.int64) + low


@pytest.mark.parametrize("equations", ["code", "paper"])
@pytest.mark.parametrize("k", [3, 12])
def test_a_step_of_the_reference_preset_is_the_textbook_of_the_published_code(k: int, equations: str):
    config = AutoencoderConfig(
        preset="reference", equations=equations, n_neighbors_mutual=k, n_neighbors_conservation=4
    )
    rng = np.random.default_rng(2)
    platform = rng.permutation(np.repeat([0, 1, 2], [14, 9, 12]))
    x = rng.normal(size=(35, 512)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    model = ConditionalAutoencoder(["a", "b", "c"])
    with torch.no_grad():
        rows = torch.from_numpy(x), torch.from_numpy(platform)
        z = model.encode(*rows)
        y = model.decode(z, rows[1]).numpy()
    z = z.numpy().astype(np.float64)
    draws = Shares()
    triplets = published_triplets(z, platform, k, lambda n: int(draws.integers(0, np.array(n))))
    near = []
    for i in range(35):
        others = [j for j in range(35) if j != i and platform[j] == platform[i]]
        near.append(sorted(others, key=lambda j: distance(x[i], x[j]))[:4])
    with TrainingStep(model, config) as step:
        found = step.losses(Chunk(x, platform, platform), Shares())
    assert found["n_triplets"] == len(triplets) > 10
    assert found["reconstruction"] == pytest.approx(textbook_reconstruction(y, x, equations), abs=TOLERANCE)
    assert found["triplet"] == pytest.approx(textbook_triplet(z, triplets, config.margin, equations), abs=TOLERANCE)
    # in the paper's scale the sum over neighbours, and with it the rounding, is four times the mean
    conservation = textbook_conservation(z, x, near, equations)
    assert found["conservation"] == pytest.approx(conservation, abs=TOLERANCE * (4 if equations == "paper" else 1))
