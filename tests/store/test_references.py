"""The stored reference: what a profile has to be, its columns, and that it reads back as it was written."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from lloki_atlas.errors import InputError, NotFoundError
from lloki_atlas.store.references import ReferenceProfile, read_reference, write_reference

SYMBOLS = ("GAD1", "AQP4", "SST", "PVALB")


def make_profile(**parts):
    random = np.random.default_rng(0)
    dense = random.poisson(0.8, (7, 4)).astype(np.float32)
    values = {
        "counts": csr_matrix(dense),
        "symbols": SYMBOLS,
        "totals": dense.sum(axis=1) + 3,
        "factors": random.normal(size=(7, 2)).astype(np.float32),
        "target_total": 5.5,
        "labels": ("Neuron", "", "Glia", "Glia", "é", "Neuron", "nan"),
        "organism": "mouse",
        **parts,
    }
    return ReferenceProfile(**values)


@pytest.mark.parametrize(
    "symbols", [SYMBOLS[:3], (*SYMBOLS, "VIP"), ("GAD1", "AQP4", "SST", "SST")], ids=["fewer", "more", "repeated"]
)
def test_a_profile_needs_one_different_symbol_a_gene(symbols):
    with pytest.raises(InputError, match="reference of 4 genes needs as many different symbols"):
        make_profile(symbols=symbols)


@pytest.mark.parametrize(
    "part",
    [
        {"totals": np.ones(6, np.float32)},
        {"factors": np.ones((8, 2), np.float32)},
        {"labels": ("a",) * 6},
        {"totals": np.ones((7, 1), np.float32)},
    ],
    ids=["totals", "factors", "labels", "totals of two axes"],
)
def test_a_profile_needs_one_row_a_cell(part):
    with pytest.raises(InputError, match="one row a cell"):
        make_profile(**part)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.sampled_from(SYMBOLS), unique=True))
def test_columns_come_in_the_order_that_is_asked_for(symbols):
    profile = make_profile()
    expected = profile.counts.toarray()[:, [SYMBOLS.index(symbol) for symbol in symbols]]
    np.testing.assert_array_equal(profile.columns(tuple(symbols)).toarray(), expected)


def test_columns_store_no_zeros_and_have_sorted_indices():
    counts = csr_matrix((np.array([0, 2, 1], np.float32), np.array([1, 0, 1]), np.array([0, 2, 3])), shape=(2, 2))
    profile = make_profile(
        counts=counts,
        symbols=("A", "B"),
        totals=np.ones(2, np.float32),
        factors=np.ones((2, 1), np.float32),
        labels=("", ""),
    )
    columns = profile.columns(("B", "A"))
    assert columns.nnz == 2
    assert columns.has_sorted_indices


def test_columns_leave_the_profile_as_it_was():
    profile = make_profile()
    before = profile.counts.toarray()
    profile.columns(SYMBOLS[:2]).data[:] = 99
    np.testing.assert_array_equal(profile.counts.toarray(), before)


@pytest.mark.parametrize("part", ["symbols", "labels", "target_total", "organism"])
def test_a_written_profile_reads_back_with_the_same(tmp_path, part):
    profile = make_profile()
    write_reference(tmp_path / "ref.zarr", profile)
    assert getattr(read_reference(tmp_path / "ref.zarr"), part) == getattr(profile, part)


@pytest.mark.parametrize("part", ["totals", "factors"])
def test_a_written_profile_reads_back_with_the_same_bytes_of(tmp_path, part):
    profile = make_profile()
    write_reference(tmp_path / "ref.zarr", profile)
    assert getattr(read_reference(tmp_path / "ref.zarr"), part).tobytes() == getattr(profile, part).tobytes()


def test_written_counts_read_back_as_they_were(tmp_path):
    profile = make_profile()
    write_reference(tmp_path / "ref.zarr", profile)
    back = read_reference(tmp_path / "ref.zarr").counts
    np.testing.assert_array_equal(back.toarray(), profile.counts.toarray())
    assert (back.dtype, back.shape) == (np.float32, (7, 4))


def test_a_last_gene_without_counts_is_kept(tmp_path):
    dense = np.zeros((7, 4), np.float32)
    dense[:, 0] = 1
    write_reference(tmp_path / "ref.zarr", make_profile(counts=csr_matrix(dense)))
    assert read_reference(tmp_path / "ref.zarr").counts.shape == (7, 4)


def test_a_missing_reference_is_not_found(tmp_path):
    with pytest.raises(NotFoundError):
        read_reference(tmp_path / "none.zarr")
