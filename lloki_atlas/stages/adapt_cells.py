"""Samples of stored embeddings for adapting to a platform: drawn in blocks, a few megabytes in memory beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lloki_atlas.stages.train_blocks import BATCH_BLOCKS, read_blocks, token_blocks
from lloki_atlas.stages.train_labels import Codes

if TYPE_CHECKING:
    from lloki_atlas.models.step import Chunk

# torch loads where a task needs it: the driver, `status` and `plan` do without
N_EMBEDDING = 512


def read_sample(
    samples: Sequence[dict[str, Any]],
    tokens: Sequence[str],
    *,
    size: int,
    random_state: int,
    labels: Sequence[Codes] | None = None,
) -> Chunk:
    """Draw cells of each token, and read their embeddings; cells without one are left out.

    Parameters
    ----------
    samples
        For each slice `slice_id`, `token`, `n_cells` and `embedding_path`.
    tokens
        Names of tokens in the order of their numbers; those without slices have no cells.
    size
        Most cells of a token: whole blocks of 256 rows, in random order.
    random_state
        Seed.
    labels
        For each slice the labels of its cells, -1 where unknown.

    Returns
    -------
    Cells of all tokens; slices are numbered as in `samples`.

    Raises
    ------
    InputError
        If an embedding is not finite in part.
    """
    from lloki_atlas.models.step import Chunk
    from lloki_atlas.models.training_chunks import BLOCK_ROWS, keyed

    embeddings, platform, slice_codes, label_codes = [], [], [], []
    known = {sample["token"] for sample in samples}
    for code, name in enumerate(tokens):
        if name not in known:
            continue
        blocks = token_blocks(samples, name, share=0.0, random_state=random_state)
        order = keyed(random_state, f"adapt/{name}").permutation(len(blocks.slices))
        left, start = size, 0
        while left and start < len(order):
            # never more than fill up the rest: blocks come in the order of their slices, not of the draw
            batch = order[start : start + min(BATCH_BLOCKS, -(-left // BLOCK_ROWS))]
            start += len(batch)
            where = blocks.slices[batch], blocks.starts[batch], blocks.stops[batch]
            for place, values, rows in read_blocks(samples, *where):
                taken = min(left, len(rows))
                left -= taken
                embeddings.append(values[:taken].astype(np.float32))
                platform.append(np.full(taken, code))
                slice_codes.append(np.full(taken, where[0][place]))
                if labels is not None:
                    label_codes.append(labels[where[0][place]][rows[:taken]].astype(np.int64))
    return Chunk(
        np.concatenate([np.empty((0, N_EMBEDDING), np.float32), *embeddings]),
        np.concatenate([np.empty(0, np.int64), *platform]),
        np.concatenate([np.empty(0, np.int64), *slice_codes]),
        None if labels is None else np.concatenate([np.empty(0, np.int64), *label_codes]),
    )
