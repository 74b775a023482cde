import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lloki_atlas.errors import MemoryBudgetError
from lloki_atlas.models.batches import (
    MOST_TOKENS,
    bytes_per_token,
    packed_batches,
    padded_batches,
    tokens_that_fit,
)
from lloki_atlas.models.tokens import TokenRows, build_vocabulary

VOCABULARY = build_vocabulary({"<pad>": 0, "<cls>": 1, "<eoc>": 2, **{f"G{i}": i + 3 for i in range(900)}})
lengths = st.lists(st.integers(0, 300), max_size=25)


def token_rows(sizes):
    indptr = np.append(0, np.cumsum(sizes)).astype(np.int64)
    genes = np.concatenate([np.arange(size, dtype=np.int32) + 3 for size in sizes] or [np.empty(0, np.int32)])
    return TokenRows(indptr, genes, (genes % 50 + 1).astype(np.int16), 0, 0)


def held(tokens, cell):
    part = slice(tokens.indptr[cell], tokens.indptr[cell + 1])
    return [1, *tokens.genes[part].tolist()], [0, *tokens.digits[part].tolist()]


@given(lengths, st.integers(1, 1200), st.booleans())
def test_padded_batches_hold_every_cell_once_behind_its_cls(sizes, batch_tokens, fill):
    tokens, seen = token_rows(sizes), []
    for batch in padded_batches(tokens, VOCABULARY, batch_tokens=batch_tokens, fill=fill):
        length = batch.genes.shape[1]
        assert batch.genes.shape[0] * length <= batch_tokens or batch.genes.shape[0] == 1
        for row, cell in enumerate(batch.cells):
            kept = slice(None) if batch.mask is None else batch.mask[row]
            assert (batch.genes[row][kept].tolist(), batch.digits[row][kept].tolist()) == held(tokens, cell)
        if batch.mask is not None:
            assert not batch.genes[~batch.mask].any()
            assert batch.mask[:, 0].all()
            assert length % 16 == 0
        seen.extend(batch.cells.tolist())
    assert sorted(seen) == np.flatnonzero(sizes).tolist()


@given(lengths, st.integers(1, 1200))
def test_a_filled_batch_has_a_shape_that_follows_from_the_length(sizes, batch_tokens):
    shapes = {}
    for batch in padded_batches(token_rows(sizes), VOCABULARY, batch_tokens=batch_tokens, fill=True):
        n, length = batch.genes.shape
        assert shapes.setdefault(length, n) == n


@given(lengths, st.integers(1, 1200))
def test_packed_batches_hold_every_cell_once_in_order(sizes, batch_tokens):
    tokens, seen = token_rows(sizes), []
    for batch in packed_batches(tokens, VOCABULARY, batch_tokens=batch_tokens):
        assert len(batch.genes) <= batch_tokens or len(batch.cells) == 1
        bounds = batch.offsets.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == len(batch.genes)
        assert batch.longest == max(np.diff(bounds))
        for place, cell in enumerate(batch.cells):
            part = slice(bounds[place], bounds[place + 1])
            assert (batch.genes[part].tolist(), batch.digits[part].tolist()) == held(tokens, cell)
        seen.extend(batch.cells.tolist())
    assert seen == np.flatnonzero(sizes).tolist()


def test_more_memory_takes_more_tokens_up_to_what_keeps_a_gpu_busy():
    def fit(megabytes):
        return tokens_that_fit(device_memory=megabytes * 2**20, resident=200 * 2**20, per_token=8192, longest=1200)

    assert fit(1000) == 800 * 128
    assert fit(500) < fit(1000) < fit(1e5) == MOST_TOKENS


def test_weights_that_do_not_fit_are_refused_with_both_figures():
    with pytest.raises(MemoryBudgetError, match=r"take 210 MiB .* 209 are allowed: raise embedder.device_memory_mb"):
        tokens_that_fit(device_memory=209 * 2**20, resident=200 * 2**20, per_token=8192, longest=1200)


def test_a_token_of_the_published_width_takes_a_few_kilobytes():
    assert 6 * 512 * 2 <= bytes_per_token(embsize=512, d_hid=512, itemsize=2) <= 20 * 512 * 2
    assert bytes_per_token(embsize=512, d_hid=4096, itemsize=4) >= (4 * 512 + 4096) * 4
