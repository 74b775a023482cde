from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import textbook
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_info, threadpool_limits

from lloki_atlas.errors import InputError
from lloki_atlas.kernels import scaling
from lloki_atlas.kernels.rows import Rows
from lloki_atlas.kernels.scaling import GeneMoments, gene_moments, scaled_components


def make_counts(n_cells=120, n_genes=18, seed=0):
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 4, n_cells)
    counts = rng.poisson(rng.gamma(0.5, 2.0, size=(4, n_genes))[kinds]).astype(np.float32)
    counts[0] = 0
    return counts


def z_scores(counts, clip=5.0):
    counts = counts.astype(np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    logged = np.log1p(100.0 * counts / np.where(totals > 0, totals, 1))
    return np.clip((logged - logged.mean(axis=0)) / (logged.std(axis=0) + 0.001), -clip, clip)


def test_moments_equal_numpy_on_the_dense_matrix():
    counts = make_counts()
    totals = counts.sum(axis=1) + 3
    moments = gene_moments(sp.csr_matrix(counts), totals, target_total=50.0)
    logged = np.log1p(counts.astype(np.float64) / totals[:, None].astype(np.float64) * 50.0)
    np.testing.assert_allclose(moments.mean, logged.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.sd, logged.std(axis=0), rtol=1e-9)


def test_a_gene_that_is_the_same_everywhere_has_sd_zero_not_nan():
    moments = gene_moments(sp.csr_matrix(np.full((7, 2), 3, np.float32)), np.full(7, 6), target_total=10.0)
    np.testing.assert_allclose(moments.sd, 0, atol=1e-7)


def test_a_cell_of_total_zero_counts_as_all_zero():
    counts = sp.csr_matrix(np.array([[2], [0]], np.float32))
    moments = gene_moments(counts, [2, 0], target_total=1.0)
    assert moments.mean[0] == pytest.approx(np.log(2) / 2)


def test_duplicate_entries_are_one_count():
    twice = sp.csr_matrix((np.array([1, 2], np.float32), np.array([0, 0]), np.array([0, 2])), shape=(1, 1))
    once = sp.csr_matrix(np.array([[3]], np.float32))
    assert gene_moments(twice, [3], target_total=5).mean == gene_moments(once, [3], target_total=5).mean
    assert twice.nnz == 2, "the caller's matrix was altered"


def test_moments_of_an_empty_slice_are_refused():
    with pytest.raises(InputError, match="no cells"):
        gene_moments(sp.csr_matrix((0, 3), dtype=np.float32), [], target_total=1.0)


@pytest.mark.parametrize(("totals", "target"), [([1, -1], 1.0), ([1, np.nan], 1.0), ([1], 1.0), ([1, 1], 0.0)])
def test_totals_that_do_not_fit_are_refused(totals, target):
    with pytest.raises(InputError):
        gene_moments(sp.csr_matrix(np.ones((2, 2), np.float32)), totals, target_total=target)


def test_moments_check_themselves():
    with pytest.raises(InputError, match="differ"):
        GeneMoments(np.zeros(2), np.zeros(3))
    with pytest.raises(InputError, match="negative"):
        GeneMoments(np.zeros(2), np.array([1.0, -1.0]))


def test_components_equal_those_of_scikit_learn_up_to_sign():
    counts = make_counts()
    mine = scaled_components(sp.csr_matrix(counts), n_components=5)
    theirs = PCA(5, svd_solver="full").fit_transform(z_scores(counts))
    signs = np.sign((mine * theirs).sum(axis=0))
    np.testing.assert_allclose(mine, theirs * signs, atol=1e-4)


@pytest.mark.parametrize("clip", [1.0, 5.0])
def test_components_equal_the_textbook_with_its_sign(clip):
    counts = make_counts(seed=2)
    mine = scaled_components(sp.csr_matrix(counts), n_components=4, clip=clip)
    np.testing.assert_allclose(mine, textbook.scaled_components(counts, 4, clip=clip), atol=1e-4)


def test_components_have_the_same_bytes_with_one_and_two_blas_threads():
    counts = sp.csr_matrix(make_counts(n_genes=150))
    results = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            results.append(scaled_components(counts, n_components=20).tobytes())
    assert results[0] == results[1]


def test_eigenvectors_are_computed_by_one_blas_thread(monkeypatch):
    seen = []

    def eigh(*args, original=scipy.linalg.eigh, **kwargs):
        seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return original(*args, **kwargs)

    monkeypatch.setattr(scipy.linalg, "eigh", eigh)
    with threadpool_limits(2):
        scaled_components(sp.csr_matrix(make_counts()), n_components=2)
    assert set(seen) == {1}


def test_components_leave_the_number_of_blas_threads_as_it_was():
    before = threadpool_info()
    scaled_components(sp.csr_matrix(make_counts()), n_components=2)
    assert threadpool_info() == before


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 99))
def test_permuting_cells_permutes_components(seed):
    counts = make_counts(seed=5)
    order = np.random.default_rng(seed).permutation(len(counts))
    whole = scaled_components(sp.csr_matrix(counts), n_components=3)
    moved = scaled_components(sp.csr_matrix(counts[order]), n_components=3)
    np.testing.assert_allclose(moved, whole[order], atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "asked", "k"), [((1, 5), 20, 1), ((2, 5), 20, 1), ((9, 5), 20, 5), ((9, 1), 20, 1), ((9, 5), 2, 2)]
)
def test_number_of_components_is_bounded_by_genes_and_cells(shape, asked, k):
    counts = np.random.default_rng(0).poisson(2, shape).astype(np.float32)
    components = scaled_components(sp.csr_matrix(counts), n_components=asked)
    assert components.shape == (shape[0], k)
    assert components.dtype == np.float32
    assert np.isfinite(components).all()


@pytest.mark.parametrize("clip", [5.0, 1e6])
@pytest.mark.parametrize("n_cells", [1, 6, 7, 49])
def test_identical_cells_have_components_of_exactly_zero(n_cells, clip):
    counts = sp.csr_matrix(np.tile(np.array([[1, 0, 4, 7]], np.float32), (n_cells, 1)))
    assert not scaled_components(counts, n_components=3, clip=clip).any()


def test_cells_without_counts_have_the_components_of_each_other():
    counts = make_counts()
    counts[5] = 0
    components = scaled_components(sp.csr_matrix(counts), n_components=4)
    assert components[0].tobytes() == components[5].tobytes()
    assert components[0].any()


def test_a_slice_of_no_counts_at_all_has_components_of_zero():
    assert not scaled_components(sp.csr_matrix((4, 3), dtype=np.float32), n_components=2).any()


def test_sparse_arrays_wide_types_and_read_only_data_give_the_same_bytes():
    counts = make_counts()
    plain = sp.csr_matrix(counts)
    wide = sp.csr_array(counts.astype(np.float64))
    frozen = plain.copy()
    for part in (frozen.data, frozen.indices, frozen.indptr):
        part.flags.writeable = False
    expected = scaled_components(plain, n_components=3).tobytes()
    assert scaled_components(wide, n_components=3).tobytes() == expected
    assert scaled_components(frozen, n_components=3).tobytes() == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_counts_that_are_not_counts_are_refused(bad):
    with pytest.raises(InputError):
        scaled_components(sp.csr_matrix(np.array([[1, bad]], np.float32)), n_components=1)


@pytest.mark.parametrize("matrix", [np.ones((2, 2)), sp.csc_matrix(np.ones((2, 2)))])
def test_anything_but_csr_is_refused(matrix):
    with pytest.raises(InputError, match="CSR"):
        scaled_components(matrix, n_components=1)


@pytest.fixture(params=[1, 7, 60, 119, 120, 121])
def piece(request, monkeypatch):
    """Another number of rows of a partial sum."""
    monkeypatch.setattr(scaling, "PIECE", request.param)
    return request.param


def lazy(counts, asked=None):
    matrix = sp.csr_matrix(counts)

    def read(start, stop):
        if asked is not None:
            asked.append((start, stop))
        return matrix[start:stop]

    return Rows(matrix.shape, read)


@pytest.mark.parametrize("n_threads", [2, 3])
def test_threads_change_no_byte_of_components_or_moments(piece, n_threads):
    counts = make_counts()
    for matrix in (sp.csr_matrix(counts), lazy(counts)):
        one, more = (scaled_components(matrix, n_components=6, n_threads=threads) for threads in (1, n_threads))
        assert one.tobytes() == more.tobytes()
        one, more = (
            gene_moments(matrix, counts.sum(axis=1), target_total=50.0, n_threads=threads) for threads in (1, n_threads)
        )
        assert (one.mean.tobytes(), one.sd.tobytes()) == (more.mean.tobytes(), more.sd.tobytes())


def test_counts_that_are_read_when_sliced_give_the_same_bytes(piece):
    counts, asked = make_counts(), []
    whole = scaled_components(sp.csr_matrix(counts), n_components=6)
    assert scaled_components(lazy(counts, asked), n_components=6).tobytes() == whole.tobytes()
    assert set(asked) == {(start, min(start + piece, 120)) for start in range(0, 120, piece)}


def test_pieces_of_any_size_give_the_components_of_the_textbook(piece):
    counts = make_counts()
    found = scaled_components(sp.csr_matrix(counts), n_components=6)
    np.testing.assert_allclose(found, textbook.scaled_components(counts, 6), atol=1e-5)


def test_pieces_of_any_size_give_the_moments_of_numpy(piece):
    counts = make_counts()
    moments = gene_moments(lazy(counts), counts.sum(axis=1), target_total=50.0)
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1).astype(np.float64)
    logged = np.log1p(counts / totals * 50.0)
    np.testing.assert_allclose(moments.mean, logged.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.sd, logged.std(axis=0), rtol=1e-9)


def test_totals_that_are_given_are_not_read_again(piece):
    counts, summed, given = make_counts(), [], []
    one = scaled_components(lazy(counts, summed), n_components=3)
    other = scaled_components(lazy(counts, given), n_components=3, totals=counts.sum(axis=1))
    assert one.tobytes() == other.tobytes()
    assert len(given) == len(summed) * 3 // 4


def test_an_error_in_a_piece_is_raised_from_a_thread(monkeypatch):
    monkeypatch.setattr(scaling, "PIECE", 10)
    counts = make_counts()
    counts[77, 2] = -1
    with pytest.raises(InputError, match="negative"):
        scaled_components(sp.csr_matrix(counts), n_components=3, n_threads=3)
