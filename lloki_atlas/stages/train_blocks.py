"""Blocks of 256 rows of stored embeddings: which belong to a platform, and their cells, a few megabytes at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lloki_atlas.errors import InputError
from lloki_atlas.store.arrays import read_row_blocks

# read at once: 2 MiB
BATCH_BLOCKS = 8

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Blocks:
    """The blocks of one token, in the order of their slices.

    `slices`, `starts` and `stops` say where each lies; `training` and `held_out` are numbers of blocks. `counts` are
    their cells with an embedding, -1 before they are read.
    """

    name: str
    slices: Index
    starts: Index
    stops: Index
    training: Index
    held_out: Index
    counts: Index


def token_blocks(samples: Sequence[dict[str, Any]], name: str, *, share: float, random_state: int) -> Blocks:
    """Cut the slices of a token into blocks, and deal these out to training and to the held-out cells.

    Parameters
    ----------
    samples
        Slices: `token` and `n_cells`.
    name
        The token.
    share
        Of the blocks, to hold out; 0 holds none out.
    random_state
        Seed.
    """
    from lloki_atlas.models.training_chunks import BLOCK_ROWS, split_blocks

    own = [code for code, sample in enumerate(samples) if sample["token"] == name]
    rows = [np.arange(0, samples[code]["n_cells"], BLOCK_ROWS) for code in own]
    ends = [np.minimum(part + BLOCK_ROWS, samples[code]["n_cells"]) for code, part in zip(own, rows, strict=True)]
    slices, starts, stops = np.repeat(own, [len(part) for part in rows]), np.concatenate(rows), np.concatenate(ends)
    training, held_out = split_blocks(stops - starts, share=share, random_state=random_state, name=name)
    return Blocks(name, slices, starts, stops, training, held_out, counts=np.full(len(slices), -1))


def count_cells(samples: Sequence[dict[str, Any]], blocks: Blocks, chosen: Index) -> Index:
    """Cells with an embedding of the blocks chosen; what is not known is read."""
    new = chosen[blocks.counts[chosen] < 0]
    for place, rows, _ in read_blocks(samples, blocks.slices[new], blocks.starts[new], blocks.stops[new]):
        blocks.counts[new[place]] = len(rows)
    return blocks.counts[chosen]


def read_blocks(
    samples: Sequence[dict[str, Any]], slices: Index, starts: Index, stops: Index
) -> Iterator[tuple[int, NDArray[np.float16], Index]]:
    """Read blocks, slice by slice.

    Yields
    ------
    position in the arrays given, embeddings of the cells that have one, their rows in the slice

    Raises
    ------
    InputError
        If an embedding is not finite in part.
    """
    order = np.lexsort((starts, slices))
    edges = np.flatnonzero(np.diff(slices[order], prepend=-1))
    for first, last in pairwise([*edges, len(order)]):
        sample = samples[slices[order[first]]]
        for start in range(first, last, BATCH_BLOCKS):
            batch = order[start : min(start + BATCH_BLOCKS, last)]
            ranges = [(int(starts[place]), int(stops[place])) for place in batch]
            values = read_row_blocks(sample["embedding_path"], "X_fp", ranges)
            rows = np.concatenate([np.arange(*bounds) for bounds in ranges])
            known = _embedded(values, rows, sample["slice_id"])
            done = 0
            for place, (begin, end) in zip(batch, ranges, strict=True):
                kept = known[done : done + end - begin]
                part = values[done : done + end - begin]
                yield int(place), part if kept.all() else part[kept], rows[done : done + end - begin][kept]
                done += end - begin


def _embedded(values: NDArray[np.float16], rows: Index, slice_id: str) -> NDArray[np.bool_]:
    """Which rows are embeddings and not NaN throughout."""
    known: NDArray[np.bool_] = np.asarray(np.isfinite(values).all(axis=1))
    unknown = np.flatnonzero(~known)
    broken = unknown[~np.isnan(values[unknown]).all(axis=1)]
    if len(broken):
        raise InputError(
            f"the embedding of slice '{slice_id}' is not finite in part of row {rows[broken[0]]}: embed it again"
        )
    return known
