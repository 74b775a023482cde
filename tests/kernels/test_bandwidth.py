from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity.textbook import splitmix

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.bandwidth import cross_bandwidth


def places(n, seed=0):
    return (np.random.default_rng(seed).random((n, 2)) * 1000).astype(np.float32)


def drawn(key, part, n_sampled, n):
    return [int((splitmix(key, part, p) >> 11) * 2.0**-53 * n) for p in range(n_sampled)]


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 60), n_sampled=st.integers(1, 20), key=st.integers(0, 2**64 - 1))
def test_it_is_the_mean_of_all_distances_between_two_keyed_draws(n, n_sampled, key):
    xy = places(n, n).astype(np.float64)
    first, second = (xy[drawn(key, part, n_sampled, n)] for part in (0, 1))
    expected = np.linalg.norm(first[:, None] - second[None], axis=2).mean()
    assert cross_bandwidth(xy, n_sampled=n_sampled, key=key) == pytest.approx(expected, rel=1e-12)


def test_its_mean_over_keys_is_the_mean_distance_of_all_pairs():
    xy = places(50)
    expected = np.linalg.norm(xy[:, None] - xy[None], axis=2).mean()  # with pairs of a cell and itself
    means = [cross_bandwidth(xy, key=key) for key in range(300)]
    assert np.mean(means) == pytest.approx(expected, abs=4 * np.std(means) / np.sqrt(300))


def test_its_spread_over_keys_is_that_of_a_generators_draws():
    xy, rng = places(2000), np.random.default_rng(1)
    mine = [cross_bandwidth(xy, key=key) for key in range(200)]
    theirs = []
    for _ in range(200):
        first, second = xy[rng.choice(2000, 100)], xy[rng.choice(2000, 100)]
        theirs.append(np.linalg.norm(first[:, None] - second[None], axis=2).mean())
    assert 0.8 < np.std(mine) / np.std(theirs) < 1.25


def test_another_key_draws_other_cells():
    xy = places(200)
    assert cross_bandwidth(xy, key=1) != cross_bandwidth(xy, key=2)


@pytest.mark.parametrize("xy", [np.zeros((1, 2)), np.full((5, 2), 3.0)])
def test_one_cell_or_cells_at_one_place_have_none(xy):
    assert cross_bandwidth(xy, key=0) == 0.0


@pytest.mark.parametrize("xy", [np.zeros((0, 2)), np.zeros((3, 3)), np.full((3, 2), np.nan)])
def test_coordinates_that_do_not_fit_are_refused(xy):
    with pytest.raises(InputError):
        cross_bandwidth(xy, key=0)


def test_a_sample_of_no_cells_is_refused():
    with pytest.raises(InputError, match="at least one"):
        cross_bandwidth(places(3), n_sampled=0, key=0)
