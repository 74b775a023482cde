import numpy as np
import pytest
from scipy.sparse import coo_matrix, csr_matrix

from lloki_atlas.errors import CheckpointError, InputError
from lloki_atlas.models.tokens import TokenRows, build_vocabulary, lookup_genes, tokenize

INDICES = {"ACTB": 0, "C1orf112": 1, "Gapdh": 2, "GAPDH": 3, "<pad>": 4, "<cls>": 5, "<eoc>": 6}
VOCABULARY = build_vocabulary(INDICES)


def cells(tokens: TokenRows) -> list[tuple[list[int], list[int]]]:
    bounds = zip(tokens.indptr[:-1], tokens.indptr[1:], strict=True)
    return [(tokens.genes[a:b].tolist(), tokens.digits[a:b].tolist()) for a, b in bounds]


# vocabulary


def test_missing_special_tokens_are_appended_in_scgpts_order():
    vocabulary = build_vocabulary({"ACTB": 0, "<cls>": 1, "[PAD]": 2}, pad_token="[PAD]")
    assert (vocabulary.tokens["<pad>"], vocabulary.cls, vocabulary.tokens["<eoc>"], len(vocabulary)) == (3, 1, 4, 5)


def test_another_pad_token_is_honoured():
    assert build_vocabulary({"ACTB": 0, "[PAD]": 1, "<cls>": 2}, pad_token="[PAD]").pad == 1


@pytest.mark.parametrize(
    "indices",
    [{"ACTB": "0"}, {"ACTB": 0.0}, {"ACTB": True}, {"ACTB": 3}, {"ACTB": 0, "GAPDH": 0}, {"ACTB": 0, "B": 4}],
)
def test_a_table_that_does_not_number_its_rows_is_refused(indices):
    with pytest.raises(CheckpointError, match=r"vocab\.json"):
        build_vocabulary({**indices, "<pad>": 1, "<cls>": 2})


def test_a_list_is_no_vocabulary():
    with pytest.raises(CheckpointError, match="not a table of token to row number"):
        build_vocabulary(["ACTB", "<pad>", "<cls>"])


def test_a_vocabulary_without_cls_is_refused_by_its_name():
    with pytest.raises(CheckpointError, match=r"vocab\.json has no '<cls>'"):
        build_vocabulary({"ACTB": 0, "<pad>": 1})


def test_a_pad_token_that_is_not_in_the_vocabulary_is_refused():
    with pytest.raises(CheckpointError, match=r"'\[PAD\]'"):
        build_vocabulary(INDICES, pad_token="[PAD]")


@pytest.mark.parametrize(
    ("genes", "tokens"),
    [
        (["ACTB", "NOPE"], [0, -1]),
        (["actb"], [0]),
        (["C1ORF112"], [1]),
        (["GAPDH", "Gapdh"], [3, 2]),
        (["gapdh"], [3]),
        (["Gapdh", "Gapdh"], [2, -1]),
        (["actb", "ACTB"], [-1, 0]),
        (["actb", "Actb"], [0, -1]),
        (["<pad>", "<cls>", "<CLS>", "<eoc>", ""], [-1, -1, -1, -1, -1]),
    ],
    ids=[
        "unknown",
        "lower-case",
        "upper-case",
        "as-written-first",
        "upper-case-token-first",
        "twice",
        "as-written-wins",
        "first-wins",
        "no-gene",
    ],
)
def test_a_gene_finds_its_token(genes, tokens):
    assert lookup_genes(VOCABULARY, genes).tolist() == tokens


def test_among_mixed_case_spellings_the_first_row_wins():
    vocabulary = build_vocabulary({"aBC": 0, "Abc": 1, "<pad>": 2, "<cls>": 3})
    assert lookup_genes(vocabulary, ["ABC"]).tolist() == [0]


# tokens


def test_tokens_are_the_non_zero_values_of_known_genes_in_vocabulary_order():
    rows = np.array([[9, 5, 0, 1], [0, 0, 4, 0]], dtype=np.float32)
    tokens = tokenize(rows, np.array([-1, 3, 0, 1]), n_bins=5, max_genes=10)
    assert cells(tokens) == [([1, 3], [1, 4]), ([0], [2])]


def test_a_cell_without_a_known_gene_has_no_token():
    rows = np.array([[3, 0], [0, 0], [0, 2]], dtype=np.float32)
    tokens = tokenize(rows, np.array([-1, 0]), n_bins=51, max_genes=10)
    assert np.diff(tokens.indptr).tolist() == [0, 0, 1]


def test_the_largest_values_stay_and_the_earlier_token_among_equal_ones():
    rows = np.array([[2, 7, 2, 2], [1, 0, 0, 0]], dtype=np.float32)
    tokens = tokenize(rows, np.array([6, 9, 4, 5]), n_bins=51, max_genes=2)
    assert tokens.genes.tolist() == [4, 9, 6]
    assert (tokens.n_truncated, tokens.n_dropped) == (1, 2)


def test_values_are_binned_before_any_is_left_out():
    row = np.array([[1, 2, 3, 4, 5]], dtype=np.float32)
    whole = tokenize(row, np.arange(5), n_bins=6, max_genes=5)
    cut = tokenize(row, np.arange(5), n_bins=6, max_genes=2)
    assert cut.digits.tolist() == whole.digits[-2:].tolist() == [4, 5]


def test_the_order_of_the_columns_changes_nothing():
    generator = np.random.default_rng(0)
    rows = generator.poisson(1.0, size=(20, 12)).astype(np.float32)
    columns = np.array([3, -1, 5, 0, 8, 1, -1, 11, 2, 30, 7, 4])
    order = generator.permutation(12)
    assert cells(tokenize(rows, columns, n_bins=9, max_genes=5)) == cells(
        tokenize(rows[:, order], columns[order], n_bins=9, max_genes=5)
    )


def test_csr_and_dense_rows_give_the_same_tokens():
    rows = np.random.default_rng(1).poisson(0.7, size=(300, 12)).astype(np.float32)
    columns = np.arange(12)[::-1].copy()
    dense = tokenize(rows, columns, n_bins=51, max_genes=4)
    sparse = tokenize(csr_matrix(rows), columns, n_bins=51, max_genes=4)
    assert cells(dense) == cells(sparse)
    assert (dense.n_truncated, dense.n_dropped) == (sparse.n_truncated, sparse.n_dropped)


def test_a_stored_zero_is_no_token():
    rows = csr_matrix(coo_matrix((np.array([0, 2], dtype=np.float32), ([0, 0], [0, 1])), shape=(1, 2)))
    assert rows.nnz == 2
    assert tokenize(rows, np.array([0, 1]), n_bins=51, max_genes=4).genes.tolist() == [1]


def test_no_cells_give_no_tokens():
    assert tokenize(np.empty((0, 3), np.float32), np.arange(3), n_bins=51, max_genes=4).indptr.tolist() == [0]


def test_columns_that_do_not_fit_the_genes_are_refused():
    with pytest.raises(InputError, match=r"\(2, 3\) do not fit 4 genes"):
        tokenize(np.ones((2, 3), np.float32), np.arange(4), n_bins=51, max_genes=4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_by_its_row(value):
    rows = np.ones((300, 3), np.float32)
    rows[270, 1] = value
    with pytest.raises(InputError, match="row 270"):
        tokenize(rows, np.arange(3), n_bins=51, max_genes=4)


# scGPT's random rule


def tied_rows(n_cells: int = 60, n_genes: int = 90) -> np.ndarray:
    return np.random.default_rng(3).poisson(1.2, size=(n_cells, n_genes)).astype(np.float32)


def test_the_random_rule_follows_from_the_cell_and_the_seed_alone():
    rows, columns = tied_rows(), np.arange(90)
    rule = {"n_bins": 51, "max_genes": 30, "mode": "reference"}
    drawn = cells(tokenize(rows, columns, random_state=1, **rule))
    order = np.random.default_rng(0).permutation(len(rows))
    genes = np.random.default_rng(1).permutation(90)
    again = cells(tokenize(rows[order][:, genes], columns[genes], random_state=1, n_threads=3, **rule))
    assert again == [drawn[i] for i in order]
    assert cells(tokenize(rows, columns, random_state=2, **rule)) != drawn


def test_the_random_rule_keeps_every_gene_equally_often():
    rows = np.arange(1, 41, dtype=np.float32)[None, :] + np.arange(4000, dtype=np.float32)[:, None]
    tokens = tokenize(rows, np.arange(40), n_bins=51, max_genes=10, mode="reference")
    assert np.diff(tokens.indptr).tolist() == [10] * 4000
    share = np.bincount(tokens.genes, minlength=40) / 4000
    assert np.abs(share - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 4000)


def test_distinct_values_leave_the_random_rule_no_choice():
    rows = np.random.default_rng(4).permutation(60).astype(np.float32)[None, :] + 1
    one, other = (
        tokenize(rows, np.arange(60), n_bins=51, max_genes=60, mode=mode) for mode in ("default", "reference")
    )
    np.testing.assert_array_equal(one.digits, other.digits)


@pytest.mark.parametrize("mode", ["default", "reference"])
def test_threads_change_no_token(mode):
    rows, columns = tied_rows(700, 40), np.arange(40)
    one, many = (
        tokenize(rows, columns, n_bins=51, max_genes=20, mode=mode, n_threads=n_threads) for n_threads in (1, 4)
    )
    assert [part.tobytes() for part in (one.indptr, one.genes, one.digits)] == [
        part.tobytes() for part in (many.indptr, many.genes, many.digits)
    ]
