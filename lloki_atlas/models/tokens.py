"""From expression rows to scGPT's tokens: which vocabulary entry a gene is, and which value bin its value falls in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from lloki_atlas.errors import CheckpointError, InputError
from lloki_atlas.kernels.binning import bin_rows, count_present
from lloki_atlas.kernels.hashing import mix
from lloki_atlas.kernels.threads import over_rows

# what scGPT appends to a vocabulary, in this order, where missing; without a trained `<cls>` there is no embedding
SPECIAL_TOKENS = ("<pad>", "<cls>", "<eoc>")

_BLOCK_ROWS = 256


@dataclass(frozen=True)
class Vocabulary:
    """Index of every token, and of every gene token by its upper-case form.

    `folded` leads to the token that is itself upper-case, otherwise to the one of smallest index.
    """

    tokens: dict[str, int]
    folded: dict[str, int]
    pad: int
    cls: int
    special: frozenset[int]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class TokenRows:
    """Gene tokens of many cells, without `<cls>`: cell i has `genes[indptr[i]:indptr[i + 1]]` (int32), ascending.

    `digits` (int16) are the value bins, 1 to n_bins - 1. `n_truncated` cells had more genes than fit, which left
    `n_dropped` values out.
    """

    indptr: np.ndarray
    genes: np.ndarray
    digits: np.ndarray
    n_truncated: int
    n_dropped: int

    def __post_init__(self) -> None:
        if self.genes.shape != self.digits.shape or self.indptr[-1] != len(self.genes):
            raise InputError("token rows are inconsistent: genes and digits need the length that indptr ends with")


def build_vocabulary(indices: Any, *, pad_token: str = "<pad>") -> Vocabulary:
    """Check the content of a `vocab.json`; append `<pad>` and `<eoc>` where missing, as scGPT does.

    Parameters
    ----------
    indices
        Token to row of the embedding table; the rows have to be 0, 1, ... without a gap.
    pad_token
        Token that fills cells up to a common length.

    Returns
    -------
    Vocabulary
        The tokens, the special ones included.

    Raises
    ------
    CheckpointError
        If it is not such a table, or has no `<cls>` or `pad_token`.
    """
    if not isinstance(indices, Mapping) or not all(type(index) is int for index in indices.values()):
        raise CheckpointError("vocab.json is not a table of token to row number: take the file of the same checkpoint")
    for token, name in (("<cls>", "the token of the cell"), (pad_token, "pad_token of args.json")):
        if token not in indices:
            raise CheckpointError(f"vocab.json has no '{token}', {name}: take the file of the same checkpoint")
    if sorted(indices.values()) != list(range(len(indices))):
        raise CheckpointError(
            f"the {len(indices)} tokens of vocab.json do not have the row numbers 0 to {len(indices) - 1}, each once: "
            "take the file of the same checkpoint"
        )
    tokens = dict(indices)
    for token in SPECIAL_TOKENS:
        tokens.setdefault(token, len(tokens))
    special = frozenset(tokens[token] for token in (*SPECIAL_TOKENS, pad_token))
    folded: dict[str, int] = {}
    for token, index in sorted(tokens.items(), key=lambda item: (item[0] != item[0].upper(), item[1])):
        if index not in special:
            folded.setdefault(token.upper(), index)
    return Vocabulary(tokens, folded, tokens[pad_token], tokens["<cls>"], special)


def lookup_genes(vocabulary: Vocabulary, genes: Sequence[str]) -> np.ndarray:
    """Find the token of each gene: the same text first, otherwise the same upper-case text.

    A token belongs to one gene: the first that matches it as written, otherwise the first that matches its
    upper-case form. Special tokens and the empty symbol are no genes.

    Parameters
    ----------
    vocabulary
        The tokens.
    genes
        Symbols, one a column.

    Returns
    -------
    numpy.ndarray
        (n_genes,) int64, -1 where the gene has no token.
    """
    found = np.full(len(genes), -1, dtype=np.int64)
    taken = set(vocabulary.special)
    for as_written in (True, False):
        for column, gene in enumerate(genes):
            # a gene that is a token as written is no second spelling of another one
            if not gene or (gene in vocabulary.tokens) != as_written:
                continue
            index = vocabulary.tokens[gene] if as_written else vocabulary.folded.get(gene.upper(), -1)
            if index >= 0 and index not in taken:
                found[column] = index
                taken.add(index)
    return found


def tokenize(
    rows: Any,
    columns: np.ndarray,
    *,
    n_bins: int,
    max_genes: int,
    mode: str = "default",
    random_state: int = 0,
    n_threads: int = 1,
) -> TokenRows:
    """Turn the non-zero values of known genes into tokens, each cell by itself.

    A cell's tokens are in the order of the vocabulary, so the order of the columns is of no account. Values are
    binned before anything is left out.

    Parameters
    ----------
    rows
        (n_cells, n_genes), dense or CSR; read as float32.
    columns
        (n_genes,) int64 token of each column, -1 for none.
    n_bins
        Number of value bins with the one reserved for zero.
    max_genes
        Most gene tokens that a cell may have.
    mode
        `default`: equal values share the middle one of the bins that scGPT draws theirs from, and of more than
        `max_genes` the largest values stay, the earlier token among equal ones. `reference`: both are drawn at
        random, with the probabilities of scGPT, from a stream keyed by `random_state` and the cell's own content.
    random_state
        Seed of `reference`.
    n_threads
        Threads; they change no bit.

    Returns
    -------
    TokenRows
        The tokens of every cell.

    Raises
    ------
    InputError
        If the columns do not fit the rows, or a value is not finite.
    """
    if rows.ndim != 2 or rows.shape[1] != len(columns):
        raise InputError(f"rows of shape {rows.shape} do not fit {len(columns)} genes: give one column a gene")
    order = np.argsort(columns, kind="stable")[np.count_nonzero(columns < 0) :]
    tokens, key = columns[order].astype(np.int32), np.uint64(mix(random_state))
    present = np.zeros(rows.shape[0], dtype=np.int64)

    def count(start: int, stop: int) -> None:
        for first, dense in _blocks(rows, start, stop):
            broken = count_present(dense, order, present[first : first + len(dense)])
            if broken >= 0:
                raise InputError(
                    f"row {first + broken} holds a value that is not finite: give counts, or diffused counts"
                )

    over_rows(rows.shape[0], n_threads, count)
    indptr = np.append(0, np.cumsum(np.minimum(present, max_genes)))
    genes, digits = np.empty(indptr[-1], dtype=np.int32), np.empty(indptr[-1], dtype=np.int16)

    def fill(start: int, stop: int) -> None:
        for first, dense in _blocks(rows, start, stop):
            starts = indptr[first : first + len(dense)]
            bin_rows(dense, order, tokens, n_bins - 1, max_genes, mode == "reference", key, starts, genes, digits)

    over_rows(rows.shape[0], n_threads, fill)
    dropped = np.maximum(present - max_genes, 0)
    return TokenRows(indptr, genes, digits, int(np.count_nonzero(dropped)), int(dropped.sum()))


def _blocks(rows: Any, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
    for first in range(start, stop, _BLOCK_ROWS):
        block = rows[first : min(first + _BLOCK_ROWS, stop)]
        dense = block.toarray() if sparse.issparse(block) else block
        yield first, np.ascontiguousarray(dense, dtype=np.float32)
