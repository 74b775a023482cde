from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.cap import cap_rows


def plain(rows, floor, targets):
    """One row after the other, in Python."""
    out = np.array(np.broadcast_to(floor, rows.shape), dtype=np.float32)
    for i, row in enumerate(rows):
        order = sorted(range(len(row)), key=lambda gene: (-(row[gene] - out[i, gene]), gene))
        for gene in order[: targets[i]]:
            out[i, gene] = row[gene]
    return out


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 8), n_genes=st.integers(1, 9), seed=st.integers(0, 999), by_row=st.booleans())
def test_the_largest_values_stay_and_the_others_fall_to_the_floor(n, n_genes, seed, by_row):
    rng = np.random.default_rng(seed)
    floor = rng.integers(-2, 2, (n, n_genes) if by_row else n_genes).astype(np.float32)
    rows = (floor + rng.integers(0, 4, (n, n_genes))).astype(np.float32)
    targets = rng.integers(0, n_genes + 3, n)
    capped = cap_rows(rows, floor, targets)
    np.testing.assert_array_equal(capped, plain(rows, floor, targets))
    assert ((capped > floor).sum(axis=1) <= targets).all()


def test_equal_values_stay_by_gene():
    np.testing.assert_array_equal(cap_rows(np.ones((1, 4), np.float32), np.zeros(4), [2]), [[1, 1, 0, 0]])


def test_values_are_ranked_by_their_height_above_the_floor():
    rows, floor = np.array([[5, 1, 3]], np.float32), np.array([4.5, -2, 1], np.float32)
    np.testing.assert_array_equal(cap_rows(rows, floor, [1]), [[4.5, 1, 1]])


def test_a_target_of_every_gene_leaves_rows_as_they_are():
    rows = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    assert cap_rows(rows, np.zeros(6), np.full(5, 6)).tobytes() == rows.tobytes()


def test_the_callers_rows_stay_as_they_were():
    rows = np.ones((2, 3), np.float32)
    cap_rows(rows, np.zeros(3), [0, 1])
    assert (rows == 1).all()
    assert rows.flags.writeable


def test_rows_become_float32():
    assert cap_rows(np.ones((2, 3)), 0.0, [1, 1]).dtype == np.float32


def test_no_rows_are_no_error():
    assert cap_rows(np.zeros((0, 3), np.float32), np.zeros(3), np.zeros(0, int)).shape == (0, 3)


@pytest.mark.parametrize(
    ("rows", "targets", "message"),
    [(np.ones(3), [1], "rows"), (np.ones((2, 3)), [1], "targets"), (np.ones((2, 3)), [1, -1], "negative")],
)
def test_what_does_not_fit_is_refused(rows, targets, message):
    with pytest.raises(InputError, match=message):
        cap_rows(rows, np.zeros(3), targets)
