"""Means of cells and their neighbours against loops, and their gradient by finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lloki_atlas.models.means import neighborhood_means, neighborhood_weights


def drawn(seed: int, n: int = 12, k: int = 4):
    rng = np.random.default_rng(seed)
    neighbors = np.array([rng.choice(np.delete(np.arange(n), i), k, replace=False) for i in range(n)])
    neighbors[rng.random(neighbors.shape) < 0.3] = -1
    return neighbors, rng.normal(size=(n, 5)).astype(np.float32)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_means_are_those_of_a_loop(seed: int):
    neighbors, rows = drawn(seed)
    found = neighborhood_means(torch.from_numpy(rows), neighborhood_weights(neighbors)).numpy()
    for i, others in enumerate(neighbors):
        np.testing.assert_allclose(found[i], rows[[i, *others[others >= 0]]].mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_that_of_finite_differences(seed: int):
    neighbors, rows = drawn(seed)
    weights = neighborhood_weights(neighbors).astype(np.float64)
    values = torch.from_numpy(rows).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: neighborhood_means(v, weights).square(), (values,))


def test_a_cell_without_neighbours_is_its_own_mean():
    rows = torch.arange(6.0).view(3, 2)
    assert torch.equal(neighborhood_means(rows, neighborhood_weights(np.full((3, 2), -1))), rows)
