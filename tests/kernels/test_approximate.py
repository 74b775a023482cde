from __future__ import annotations

import numpy as np
import pytest

from lloki_atlas.errors import InputError
from lloki_atlas.kernels import approximate
from lloki_atlas.kernels.approximate import descent_neighbors, measured_recall
from lloki_atlas.kernels.neighbors import Neighbors, nearest_neighbors, re_rank
from lloki_atlas.kernels.rows import Rows


def clustered(n=1500, d=10, seed=0):
    rng = np.random.default_rng(seed)
    return (3 * rng.normal(size=(12, d))[rng.integers(0, 12, n)] + rng.normal(size=(n, d))).astype(np.float32)


def same_bytes(a, b):
    return a.indices.tobytes() == b.indices.tobytes() and a.distances.tobytes() == b.distances.tobytes()


def without_direction(rows):
    """Rows 3, 70 and 71 have none; their numbers."""
    rows[3], rows[70, 2], rows[71] = 0, np.nan, np.inf
    return [3, 70, 71]


def pretend(monkeypatch, found):
    """Let `found(rows, k)` stand in for the descent, which takes half a minute to compile."""

    def descend(rows, k, key, names):
        candidates = found(rows, k)
        return np.where(candidates >= 0, names[candidates], -1).astype(np.int32)

    monkeypatch.setattr(approximate, "_descend", descend)


def the_right_ones(rows, k):
    """Every row itself and its neighbours, in no order."""
    found = nearest_neighbors(rows, n_neighbors=k - 1).indices
    return np.random.default_rng(0).permuted(np.column_stack([np.arange(len(rows)), found]), axis=1)


@pytest.mark.slow
def test_a_descent_finds_nearly_all_neighbours_and_the_same_each_time():
    rows = clustered()
    nowhere = without_direction(rows)
    one, other = (descent_neighbors(rows, n_neighbors=10, key=7) for _ in range(2))
    assert same_bytes(one, other)
    assert measured_recall(one, rows, key=1) >= 0.9
    assert (one.indices[nowhere] == -1).all()
    assert not np.isin(one.indices, nowhere).any()
    exact = nearest_neighbors(rows, n_neighbors=10)
    shared = [len(set(a) & set(b)) for a, b in zip(one.indices, exact.indices, strict=True)]
    assert np.mean(shared) > 9


def test_candidates_that_hold_the_neighbours_give_the_exact_answer(monkeypatch):
    rows = clustered(200)
    without_direction(rows)
    pretend(monkeypatch, the_right_ones)
    assert same_bytes(descent_neighbors(rows, n_neighbors=10, key=1), nearest_neighbors(rows, n_neighbors=10))


def test_candidates_that_were_not_found_leave_neighbours_missing(monkeypatch):
    rows = clustered(200)

    def none_beyond_the_third(found, k):
        candidates = nearest_neighbors(found, n_neighbors=k).indices.copy()
        candidates[:, 3:] = -1
        return candidates

    pretend(monkeypatch, none_beyond_the_third)
    found, exact = descent_neighbors(rows, n_neighbors=10, key=1), nearest_neighbors(rows, n_neighbors=10)
    np.testing.assert_array_equal(found.indices[:, :3], exact.indices[:, :3])
    assert (found.indices[:, 3:] == -1).all()
    assert measured_recall(found, rows, key=1) == pytest.approx(0.3)


def test_rows_without_direction_have_no_neighbours_and_are_nobodys(monkeypatch):
    rows = clustered(200)
    nowhere = without_direction(rows)
    pretend(monkeypatch, the_right_ones)
    found = descent_neighbors(rows, n_neighbors=10, key=1)
    assert (found.indices[nowhere] == -1).all()
    assert not np.isin(found.indices, nowhere).any()


@pytest.mark.parametrize("n", [0, 1, 2, 11, 22])
def test_few_rows_are_searched_exactly(n, monkeypatch):
    pretend(monkeypatch, lambda rows, k: pytest.fail("a descent among so few"))
    rows = clustered(n)
    found = descent_neighbors(rows, n_neighbors=10, key=1)
    assert same_bytes(found, nearest_neighbors(rows, n_neighbors=10))


@pytest.mark.parametrize("bad", [0.0, np.nan])
def test_rows_that_all_have_no_direction_have_no_neighbours(bad):
    rows = np.full((50, 4), bad, dtype=np.float32)
    found = descent_neighbors(rows, n_neighbors=3, key=1)
    assert (found.indices == -1).all()
    assert measured_recall(found, rows, key=1) == 1.0


@pytest.mark.parametrize(("rows", "k"), [(np.ones(3, np.float32), 1), (np.ones((3, 2), np.float32), 0)])
def test_what_cannot_be_searched_is_refused(rows, k):
    with pytest.raises(InputError):
        descent_neighbors(rows, n_neighbors=k, key=1)


@pytest.mark.parametrize("key", [0, 1, 2**63])
@pytest.mark.parametrize("n", [1, 5, 300, 1500])
def test_exact_neighbours_have_a_recall_of_one(n, key):
    rows = clustered(n)
    assert measured_recall(nearest_neighbors(rows, n_neighbors=8), rows, key=key) == 1.0


def test_neighbours_drawn_at_random_have_a_recall_near_zero():
    rows = clustered()
    drawn = np.random.default_rng(1).integers(0, 1500, (1500, 8)).astype(np.int32)
    assert measured_recall(re_rank(rows, drawn, n_neighbors=8), rows, key=1) < 0.03


def test_recall_is_the_share_of_exact_neighbours():
    rows = clustered(400)
    exact = nearest_neighbors(rows, n_neighbors=8)
    half = exact.indices.copy()
    half[:, 1::2] = -1
    assert measured_recall(re_rank(rows, half, n_neighbors=8), rows, key=3) == pytest.approx(0.5)


def test_which_of_equal_neighbours_is_kept_does_not_matter():
    rows = np.repeat(np.eye(3, dtype=np.float32), 20, axis=0)
    exact = nearest_neighbors(rows, n_neighbors=5)
    last = np.array([[j for j in range(60) if j // 20 == i // 20 and j != i][-5:] for i in range(60)], dtype=np.int32)
    assert not same_bytes(re_rank(rows, last, n_neighbors=5), exact)
    assert measured_recall(re_rank(rows, last, n_neighbors=5), rows, key=1) == 1.0
    assert measured_recall(exact, rows, key=1) == 1.0


def test_no_rows_have_a_recall_of_one():
    nobody = Neighbors(np.zeros((0, 3), np.int32), np.zeros((0, 3), np.float32))
    assert measured_recall(nobody, np.zeros((0, 4), np.float32), key=1) == 1.0


def test_recall_of_rows_that_are_read_when_sliced_is_the_same():
    rows = clustered(400)
    drawn = np.random.default_rng(1).integers(0, 400, (400, 100)).astype(np.int32)
    found = re_rank(rows, drawn, n_neighbors=8)
    lazy = Rows(rows.shape, lambda start, stop: rows[start:stop])
    assert 0.05 < measured_recall(found, rows, key=1) == measured_recall(found, lazy, key=1) < 0.6


def test_a_key_decides_which_rows_are_sampled():
    rows = clustered(1500)
    drawn = np.random.default_rng(1).integers(0, 1500, (1500, 100)).astype(np.int32)
    found = re_rank(rows, drawn, n_neighbors=8)
    one, again, other = (measured_recall(found, rows, key=key) for key in (1, 1, 2))
    assert one == again != other
