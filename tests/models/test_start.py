"""The start of training keeps the geometry of the embeddings."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lloki_atlas.models.autoencoder import ConditionalAutoencoder
from lloki_atlas.models.start import principal_directions, start_isometric


def embeddings(rank: int, n: int = 300, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, rank)) @ rng.normal(size=(rank, 512))
    return torch.from_numpy((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))


def started(rows: torch.Tensor, n_platforms: int = 2, seed: int = 0) -> ConditionalAutoencoder:
    model = ConditionalAutoencoder([f"p{i}|x" for i in range(n_platforms)], random_state=seed)
    start_isometric(model, rows)
    return model


@pytest.mark.parametrize("rank", [1, 10, 60])
def test_embeddings_of_few_directions_are_reconstructed_from_the_outset(rank: int):
    rows = embeddings(rank)
    with torch.no_grad():
        _, reconstructed = started(rows)(rows, torch.zeros(len(rows), dtype=torch.int64))
    assert (reconstructed - rows).norm(dim=1).max() < 0.35
    assert torch.nn.functional.cosine_similarity(reconstructed, rows).min() > 0.9


def test_latents_are_not_negative_and_their_cosines_follow_those_of_the_embeddings():
    rows = embeddings(30)
    with torch.no_grad():
        latents = started(rows).encode(rows, torch.zeros(len(rows), dtype=torch.int64))
    assert (latents >= 0).all()
    above = np.triu_indices(len(rows), 1)
    before = (rows @ rows.T).numpy()[above]
    directions = torch.nn.functional.normalize(latents, dim=1)
    after = (directions @ directions.T).numpy()[above]
    assert np.corrcoef(before, after)[0, 1] > 0.9


def test_platforms_start_side_by_side():
    rows = embeddings(20)
    model = started(rows)
    with torch.no_grad():
        first, second = (model.encode(rows, torch.full((len(rows),), code)) for code in (0, 1))
    assert (first - second).norm(dim=1).max() < 0.2 * first.norm(dim=1).min()


def test_equal_samples_give_equal_bytes_and_other_seeds_other_weights():
    rows = embeddings(20)
    first, second, other = started(rows), started(rows), started(rows, seed=1)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not torch.equal(first.encoder[1].weight, other.encoder[1].weight)


@pytest.mark.parametrize(("rank", "at_most", "expected"), [(5, 64, 5), (100, 64, 64), (3, 2, 2)])
def test_principal_directions_are_orthonormal_and_no_more_than_there_are(rank: int, at_most: int, expected: int):
    found = principal_directions(embeddings(rank), at_most=at_most)
    assert found.shape == (expected, 512)
    np.testing.assert_allclose((found @ found.T).numpy(), np.eye(expected), atol=1e-5)


def test_principal_directions_are_those_of_a_singular_value_decomposition():
    rows = embeddings(4)
    expected = np.linalg.svd(rows.numpy(), full_matrices=False)[2][:4]
    found = principal_directions(rows, at_most=4).numpy()
    np.testing.assert_allclose(np.abs((found * expected).sum(axis=1)), 1, atol=1e-4)


def test_a_few_cells_are_enough():
    rows = embeddings(5, n=2)
    assert torch.isfinite(started(rows).encode(rows, torch.zeros(2, dtype=torch.int64))).all()
