"""Which search a slice gets, and what it says of itself."""

from __future__ import annotations

import numpy as np
import pytest

from lloki_atlas.config import PropagationConfig
from lloki_atlas.kernels.neighbors import nearest_neighbors, re_rank
from lloki_atlas.kernels.rows import Rows
from lloki_atlas.stages import search
from lloki_atlas.stages.search import find_neighbors, is_approximate

ROWS = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
SETTINGS = {"n_neighbors": 8}


@pytest.mark.parametrize(
    ("n_cells", "settings", "approximate"),
    [
        (10**7, {}, False),
        (1, {"search": "approximate"}, True),
        (999, {"approximate_from": 1000}, False),
        (1000, {"approximate_from": 1000}, True),
        (10**7, {"approximate_from": 0}, False),
        (1, {"search": "approximate", "approximate_from": 1000}, True),
    ],
)
def test_a_slice_is_searched_approximately_when_it_is_asked_for_or_large(n_cells, settings, approximate):
    assert is_approximate(n_cells, PropagationConfig(**settings)) == approximate


@pytest.mark.parametrize("n_threads", [1, 2])
def test_the_exact_search_finds_everything(n_threads):
    found, recall = find_neighbors(ROWS, PropagationConfig(**SETTINGS), key=1, n_threads=n_threads)
    assert found.indices.tobytes() == nearest_neighbors(ROWS, n_neighbors=8).indices.tobytes()
    assert recall == 1.0


def test_an_approximate_search_says_what_it_found(monkeypatch):
    asked = []

    def every_other(rows, *, n_neighbors, key):
        asked.append((type(rows), key))
        indices = nearest_neighbors(rows, n_neighbors=n_neighbors).indices.copy()
        indices[:, ::2] = -1
        return re_rank(rows, indices, n_neighbors=n_neighbors)

    monkeypatch.setattr(search, "descent_neighbors", every_other)
    lazy = Rows(ROWS.shape, lambda start, stop: ROWS[start:stop])
    for rows in (ROWS, lazy):
        _, recall = find_neighbors(rows, PropagationConfig(search="approximate", **SETTINGS), key=5)
        assert recall == pytest.approx(0.5)
    assert asked == [(np.ndarray, 5)] * 2


def test_an_approximate_search_of_few_cells_is_exact():
    found, recall = find_neighbors(ROWS[:15], PropagationConfig(search="approximate", **SETTINGS), key=5)
    assert found.indices.tobytes() == nearest_neighbors(ROWS[:15], n_neighbors=8).indices.tobytes()
    assert recall == 1.0
