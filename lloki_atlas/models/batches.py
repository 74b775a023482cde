"""Batches of tokens for the transformer: which cells go together, and how many tokens a device may take at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lloki_atlas.errors import MemoryBudgetError
from lloki_atlas.models.tokens import TokenRows, Vocabulary

PAD_MULTIPLE = 16
# a CPU is busy with one cell of this many tokens; its activations then stay in the cache
CPU_TOKENS = 512
# what a GPU needs to be busy; more only takes memory
MOST_TOKENS = 131_072


@dataclass(frozen=True, eq=False)
class Batch:
    """Cells to encode together: padded to one length, or packed one after the other.

    `cells` are their rows. Padded: `genes` and `digits` are (size, length) int32, `mask` (size, length) bool or None
    where nothing is padding; rows past the last cell hold `<cls>` alone. Packed: `genes` and `digits` are (n_tokens,)
    and `offsets` (n_cells + 1,) int32.
    """

    cells: np.ndarray
    genes: torch.Tensor
    digits: torch.Tensor
    mask: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    longest: int = 0


def padded_batches(tokens: TokenRows, vocabulary: Vocabulary, *, batch_tokens: int, fill: bool) -> Iterator[Batch]:
    """Cells of one length together; lengths are rounded up to a multiple of 16.

    Parameters
    ----------
    tokens
        Cells without a token are in no batch.
    vocabulary
        Of the checkpoint.
    batch_tokens
        Tokens of a batch, `<cls>` and padding included; a cell of more than half of it is alone, and not padded.
    fill
        Whether the last batch of a length is filled up to the size of the others, so that every cell of the length
        is computed in the same shapes.
    """
    lengths = np.diff(tokens.indptr)
    padded = np.where(lengths > 0, -(-(lengths + 1) // PAD_MULTIPLE) * PAD_MULTIPLE, 0)
    alone = 2 * padded > batch_tokens
    padded[alone] = lengths[alone] + 1
    for length in np.unique(padded[padded > 0]).tolist():
        cells = np.flatnonzero(padded == length)
        size = 1 if alone[cells[0]] else batch_tokens // length
        for start in range(0, len(cells), size):
            part = cells[start : start + size]
            yield _padded(tokens, vocabulary, part, size if fill else len(part), length)


def packed_batches(tokens: TokenRows, vocabulary: Vocabulary, *, batch_tokens: int) -> Iterator[Batch]:
    """Cells in their order, as many as `batch_tokens` hold, at least one."""
    cells = np.flatnonzero(np.diff(tokens.indptr))
    ends = np.cumsum(np.diff(tokens.indptr)[cells] + 1)
    start = 0
    while start < len(cells):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + batch_tokens, side="right")))
        yield _packed(tokens, vocabulary, cells[start:stop], np.append(0, ends[start:stop] - before))
        start = stop


def _padded(tokens: TokenRows, vocabulary: Vocabulary, cells: np.ndarray, size: int, length: int) -> Batch:
    genes = np.full((size, length), vocabulary.pad, dtype=np.int32)
    digits = np.zeros((size, length), dtype=np.int32)
    mask = np.zeros((size, length), dtype=bool)
    genes[:, 0] = vocabulary.cls
    mask[:, 0] = True
    for row, cell in enumerate(cells):
        start, stop = tokens.indptr[cell], tokens.indptr[cell + 1]
        genes[row, 1 : 1 + stop - start] = tokens.genes[start:stop]
        digits[row, 1 : 1 + stop - start] = tokens.digits[start:stop]
        mask[row, 1 : 1 + stop - start] = True
    kept = None if mask.all() else torch.from_numpy(mask)
    return Batch(cells, torch.from_numpy(genes), torch.from_numpy(digits), kept)


def _packed(tokens: TokenRows, vocabulary: Vocabulary, cells: np.ndarray, offsets: np.ndarray) -> Batch:
    genes = np.full(offsets[-1], vocabulary.cls, dtype=np.int32)
    digits = np.zeros(offsets[-1], dtype=np.int32)
    gene = np.ones(offsets[-1], dtype=bool)
    gene[offsets[:-1]] = False
    held = slice(tokens.indptr[cells[0]], tokens.indptr[cells[-1] + 1])  # between them are only cells without tokens
    genes[gene], digits[gene] = tokens.genes[held], tokens.digits[held]
    return Batch(
        cells,
        torch.from_numpy(genes),
        torch.from_numpy(digits),
        offsets=torch.from_numpy(offsets.astype(np.int32)),
        longest=int(np.diff(offsets).max()),
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch; to a GPU through page-locked memory, without waiting for it."""
    if device.type == "cpu":
        return batch

    def move(part: torch.Tensor | None) -> Any:
        return None if part is None else part.pin_memory().to(device, non_blocking=True)

    return Batch(
        batch.cells, move(batch.genes), move(batch.digits), move(batch.mask), move(batch.offsets), batch.longest
    )


def bytes_per_token(*, embsize: int, d_hid: int, itemsize: int) -> int:
    """Device bytes that a token of a batch takes at the peak of the forward pass.

    Two float32 rows along the layers, and of one layer: the input, the joint queries, keys and values (3 widths), what
    attention returns and a product of it; or the hidden row instead.
    """
    return 8 * embsize + max(6 * embsize, 3 * embsize + d_hid) * itemsize + 64


def tokens_that_fit(*, device_memory: int, resident: int, per_token: int, longest: int) -> int:
    """Most tokens of a batch that keep to the memory allowed.

    Parameters
    ----------
    device_memory
        Bytes that may be taken of the device.
    resident
        Bytes of weights, tables and libraries' workspaces.
    per_token
        `bytes_per_token`.
    longest
        Tokens of the longest cell there can be.

    Raises
    ------
    MemoryBudgetError
        If the weights and one cell do not fit.
    """
    fitting = (device_memory - resident) // per_token
    if fitting < longest:
        need = -(-(resident + longest * per_token) // 2**20)
        raise MemoryBudgetError(
            f"the weights and one cell of {longest} tokens take {need} MiB of the device, and "
            f"{device_memory // 2**20} are allowed: raise embedder.device_memory_mb (--device-memory)"
        )
    return int(min(fitting, MOST_TOKENS))
