"""Corner cases of the three losses; the textbook forms are in tests/parity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lloki_atlas.kernels.edges import incidence
from lloki_atlas.models.losses import (
    conservation_loss,
    pair_distances,
    reconstruction_loss,
    triplet_loss,
)
from lloki_atlas.models.workers import PART_ROWS, Workers


def rows(n: int, d: int = 6, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, d))).to(dtype).requires_grad_()


def indices(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


NONE = torch.empty(0, dtype=torch.int64)


def test_reconstruction_of_the_input_itself_costs_nothing():
    x = rows(5)
    assert reconstruction_loss(x, x).item() == 0.0


def test_reconstruction_is_a_mean_over_dimensions_not_a_sum():
    assert reconstruction_loss(torch.zeros(3, 512), torch.ones(3, 512)).item() == 1.0


def test_reconstruction_of_the_paper_is_a_sum_over_dimensions():
    assert reconstruction_loss(torch.zeros(3, 512), torch.ones(3, 512), equations="paper").item() == 512.0


@pytest.mark.parametrize("equations", ["code", "paper"])
def test_triplet_loss_is_zero_without_triplets(equations: str):
    loss = triplet_loss(rows(4), NONE, NONE, NONE, margin=1.0, equations=equations)
    assert loss.item() == 0.0


def test_triplet_distances_of_the_paper_are_squared():
    z = torch.tensor([[0.0], [2.0], [3.0]], dtype=torch.float64)
    assert triplet_loss(z, indices(0), indices(1), indices(2), margin=6.0, equations="paper").item() == 1.0
    assert triplet_loss(z, indices(0), indices(1), indices(2), margin=5.0, equations="paper").item() == 0.0


def test_triplet_loss_is_the_margin_where_positive_and_negative_are_equally_far():
    z = torch.tensor([[0.0], [1.0], [-1.0]], dtype=torch.float64)
    assert triplet_loss(z, indices(0), indices(1), indices(2), margin=0.7).item() == pytest.approx(0.7)


def test_triplet_loss_is_zero_once_the_negative_is_farther_by_the_margin():
    z = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    assert triplet_loss(z, indices(0), indices(1), indices(2), margin=1.0).item() == 0.0


def test_conservation_loss_is_zero_without_neighbours():
    neighbors = torch.full((4, 3), -1)
    assert conservation_loss(rows(4), neighbors, torch.zeros(4, 3, dtype=torch.float64)).item() == 0.0


def test_conservation_loss_is_zero_where_distances_are_kept():
    z = rows(6)
    neighbors = torch.tensor([[(i + 1) % 6, (i + 2) % 6] for i in range(6)])
    kept = pair_distances(z.detach(), torch.arange(6), neighbors)
    assert conservation_loss(z, neighbors, kept).item() == 0.0


def test_missing_neighbours_do_not_enter_the_mean():
    z = torch.tensor([[0.0], [3.0]], dtype=torch.float64)
    distances = torch.tensor([[1.0, 99.0], [0.0, 99.0]], dtype=torch.float64)
    loss = conservation_loss(z, torch.tensor([[1, -1], [-1, -1]]), distances)
    assert loss.item() == pytest.approx(4.0)


def test_conservation_of_the_paper_is_a_sum_over_neighbours_and_a_mean_over_all_cells():
    z = torch.tensor([[0.0], [3.0], [7.0]], dtype=torch.float64)
    neighbors, distances = torch.tensor([[1, 2], [-1, -1], [-1, -1]]), torch.ones(3, 2, dtype=torch.float64)
    assert conservation_loss(z, neighbors, distances, equations="code").item() == pytest.approx((4 + 36) / 2)
    assert conservation_loss(z, neighbors, distances, equations="paper").item() == pytest.approx((4 + 36) / 3)


@pytest.mark.parametrize("equations", ["code", "paper"])
@pytest.mark.parametrize("loss", ["triplet", "conservation"])
def test_gradient_at_zero_distance_is_finite(loss: str, equations: str):
    z = torch.zeros(4, 3, requires_grad=True)
    if loss == "triplet":
        value = triplet_loss(z, indices(0, 1), indices(1, 2), indices(3, 0), margin=1.0, equations=equations)
    else:
        value = conservation_loss(z, torch.tensor([[1], [2], [3], [0]]), torch.ones(4, 1), equations=equations)
    value.backward()
    assert z.grad is not None
    assert torch.equal(z.grad, torch.zeros(4, 3))


def test_infinite_slope_at_zero_does_not_reach_other_rows():
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]], requires_grad=True)
    pair_distances(z, indices(0, 0), torch.tensor([[1], [2]])).sum().backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
    assert z.grad[2].norm().item() == pytest.approx(1.0)


@pytest.mark.parametrize("n", [1, PART_ROWS - 1, PART_ROWS, PART_ROWS + 1])
def test_pair_distances_cross_the_ends_of_parts(n: int):
    z = rows(50, dtype=torch.float32).detach()
    rng = np.random.default_rng(1)
    left = torch.from_numpy(rng.integers(0, 50, n))
    right = torch.from_numpy(rng.integers(0, 50, (n, 1)))
    expected = np.linalg.norm(z.numpy()[left.numpy()] - z.numpy()[right[:, 0].numpy()], axis=1)
    np.testing.assert_allclose(pair_distances(z, left, right)[:, 0], expected, atol=1e-6)


def test_gradient_keeps_the_dtype_of_the_latents():
    z = rows(6, dtype=torch.float32)
    pair_distances(z, indices(0, 1), torch.tensor([[2, 3], [4, 5]])).sum().backward()
    assert z.grad is not None
    assert z.grad.dtype == torch.float32


def test_edges_that_are_known_and_threads_change_no_bit():
    z, left = rows(1200, dtype=torch.float32), torch.arange(1200)
    right = torch.from_numpy(np.random.default_rng(3).integers(-1, 1200, (1200, 5)))
    found = []
    with Workers(2) as workers:
        known = incidence(left.numpy(), right.numpy(), 1200)
        for options in ({}, {"ends": known}, {"each": workers.each}):
            distances = pair_distances(z, left, right, **options)
            found.append((distances.detach(), torch.autograd.grad(distances.square().sum(), z)[0]))
    for distances, gradient in found[1:]:
        assert torch.equal(distances, found[0][0])
        assert torch.equal(gradient, found[0][1])
