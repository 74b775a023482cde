"""The criterion of model selection: what it rewards and its limits."""

from __future__ import annotations

import numpy as np
import pytest

from lloki_atlas.models.criterion import integration_score, kept_neighbors, platform_mixing


def cells(shift: float, seed: int = 0, n: int = 240):
    """Two platforms of four types each; the second is shifted off the first."""
    rng = np.random.default_rng(seed)
    types = np.arange(n) % 4
    platform = np.arange(n) // (n // 2)
    rows = 3 * np.eye(6)[types] + rng.normal(0, 0.2, size=(n, 6))
    rows[:, 5] += shift * platform
    return rows.astype(np.float32), platform, types


def score(rows, latents, platform, labels=None):
    return integration_score(rows, latents, platform=platform, slice_codes=platform, labels=labels)


def test_the_embeddings_themselves_keep_all_neighbours():
    rows, platform, _ = cells(6.0)
    assert score(rows, rows, platform)["biology"] == 1.0


def test_taking_the_shift_away_mixes_and_keeps_biology():
    rows, platform, types = cells(6.0)
    aligned = rows.copy()
    aligned[:, 5] -= 6 * platform
    for labels in (None, types):
        apart, mixed = score(rows, rows, platform, labels), score(rows, aligned, platform, labels)
        assert mixed["batch"] > 0.8 > 0.1 > apart["batch"]
        assert mixed["score"] > apart["score"]


@pytest.mark.parametrize("labelled", [False, True])
def test_noise_mixes_and_loses_all_biology(labelled: bool):
    rows, platform, types = cells(6.0)
    noise = np.random.default_rng(1).normal(size=rows.shape).astype(np.float32)
    found = score(rows, noise, platform, types if labelled else None)
    assert found["batch"] > 0.8
    assert found["biology"] < 0.4


def test_the_score_is_the_weighted_sum():
    rows, platform, _ = cells(1.0)
    found = score(rows, rows, platform)
    assert found["score"] == pytest.approx(0.6 * found["biology"] + 0.4 * found["batch"])


def test_one_platform_has_nothing_to_mix():
    rows, platform, _ = cells(0.0)
    assert score(rows, rows, np.zeros_like(platform))["batch"] == 0.0


def test_permuting_cells_changes_nothing():
    rows, platform, types = cells(1.0)
    order = np.random.default_rng(2).permutation(len(rows))
    assert score(rows, rows, platform, types) == pytest.approx(
        score(rows[order], rows[order], platform[order], types[order])
    )


def test_labels_of_one_type_or_none_are_as_no_labels():
    rows, platform, types = cells(1.0)
    for labels in (np.zeros_like(types), np.full_like(types, -1)):
        assert score(rows, rows, platform, labels) == score(rows, rows, platform)


def test_a_slice_of_one_cell_does_not_count():
    cosines = np.eye(3, dtype=np.float32)
    assert kept_neighbors(cosines, cosines, np.arange(3), 5) == 1.0


def test_mixing_is_that_of_the_inverse_simpson_index_by_hand():
    # four cells, two platforms; each cell's two nearest are one of each platform
    cosines = np.array([[0, 9, 9, 1], [9, 0, 1, 9], [9, 1, 0, 9], [1, 9, 9, 0]], np.float32)
    assert platform_mixing(cosines, np.array([0, 0, 1, 1]), 2) == pytest.approx(1.0)
