"""Chunks of cells that are in memory."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np
from numpy.typing import NDArray

from lloki_atlas.config import AutoencoderConfig
from lloki_atlas.errors import InputError
from lloki_atlas.models.autoencoder import N_EMBEDDING
from lloki_atlas.models.pairs import Index, balanced_chunks
from lloki_atlas.models.step import Chunk
from lloki_atlas.models.training_chunks import BLOCK_ROWS, MAX_HELD_OUT, keyed, labels_refine, split_blocks


class ArraySource:
    """Chunks of arrays; every cell is in a chunk of every epoch, but for those that are held out.

    Parameters
    ----------
    embeddings : (n, 512) float32
        Finite.
    platform, slice_codes : (n,) int
        Token and slice of each cell.
    tokens : sequence of str
        Names of the tokens; each has at least one cell.
    config : AutoencoderConfig
    labels : (n,) int, optional
    hold_out : bool, optional
        Whether cells are left out for validation; when None, if `patience` is above 0.

    Raises
    ------
    InputError
        If the arrays do not fit each other, or an embedding is not finite.
    """

    def __init__(
        self,
        embeddings: NDArray[np.float32],
        platform: Index,
        slice_codes: Index,
        tokens: Sequence[str],
        *,
        config: AutoencoderConfig,
        labels: Index | None = None,
        hold_out: bool | None = None,
    ) -> None:
        self.tokens = tuple(tokens)
        self._config = config
        self._cells = _checked(embeddings, platform, slice_codes, labels, tokens=tokens)
        share = config.held_out if (config.patience > 0 if hold_out is None else hold_out) else 0.0
        training, held_out = [], []
        for code, name in enumerate(self.tokens):
            rows = np.flatnonzero(self._cells.platform == code)
            block = np.arange(len(rows)) // BLOCK_ROWS
            kept, left_out = split_blocks(np.bincount(block), share=share, random_state=config.random_state, name=name)
            training.append(rows[np.isin(block, kept)])
            candidates = rows[np.isin(block, left_out)]
            drawn = keyed(config.random_state, f"validation/{name}").permutation(candidates)
            held_out.append(drawn[: max(1, MAX_HELD_OUT // len(self.tokens))])
        self.sizes = tuple(len(rows) for rows in training)
        self._training, self._held_out = np.sort(np.concatenate(training)), np.concatenate(held_out)

    def epoch(self, number: int) -> Generator[Chunk, None, None]:
        """Chunks of an epoch, which is numbered from 1."""
        return self._chunks(self._training, keyed(self._config.random_state, "chunks", number))

    def held_out(self) -> list[Chunk]:
        """Chunks of the cells that are held out; none where none are."""
        if not len(self._held_out):
            return []
        return list(self._chunks(self._held_out, keyed(self._config.random_state, "held-out chunks")))

    def _chunks(self, chosen: Index, generator: np.random.Generator) -> Generator[Chunk, None, None]:
        cells = self._cells
        platform = cells.platform[chosen]
        for part in balanced_chunks(platform, chunk_cells=self._config.chunk_cells, generator=generator):
            rows = chosen[part]
            labels = None if cells.labels is None else cells.labels[rows]
            yield Chunk(cells.embeddings[rows], cells.platform[rows], cells.slice_codes[rows], labels)


def _checked(
    embeddings: NDArray[np.float32],
    platform: Index,
    slice_codes: Index,
    labels: Index | None,
    *,
    tokens: Sequence[str],
) -> Chunk:
    values = np.ascontiguousarray(embeddings, dtype=np.float32)
    if values.ndim != 2 or values.shape[1] != N_EMBEDDING or not len(values):
        raise InputError(
            f"embeddings are of shape {values.shape}: give (n_cells, {N_EMBEDDING}) with at least one cell"
        )
    unfinished = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(unfinished):
        raise InputError(
            f"{len(unfinished)} embeddings are not finite (first: row {unfinished[0]}): leave those cells out"
        )
    codes = _codes("platform", platform, len(values))
    found = np.unique(codes)
    if not np.array_equal(found, np.arange(len(tokens))):
        raise InputError(
            f"platform holds the numbers {found.tolist()}: each of the {len(tokens)} platforms needs its number, "
            "from 0, and at least one cell"
        )
    known = None if labels is None else _codes("labels", labels, len(values))
    if known is not None and not labels_refine(len(np.unique(known[known >= 0]))):
        known = None
    return Chunk(values, codes, _codes("slice_codes", slice_codes, len(values)), known)


def _codes(name: str, column: Index, n_cells: int) -> Index:
    codes = np.asarray(column)
    if codes.shape != (n_cells,) or codes.dtype.kind not in "iu":
        raise InputError(
            f"{name} is {codes.dtype} of shape {codes.shape}: give one whole number for each of {n_cells} cells"
        )
    return codes.astype(np.int64)
