"""How cells are dealt out in training: keyed draws, blocks that are held out, rounds of an epoch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from lloki_atlas.kernels.hashing import text_key
from lloki_atlas.models.pairs import MIN_PLATFORM_CELLS, Index

# cells are drawn and held out in blocks of so many rows, whatever the tiles are
BLOCK_ROWS = 256
# validation after every epoch costs about as much as one chunk
MAX_HELD_OUT = 4000


def keyed(random_state: int, purpose: str, *numbers: int) -> np.random.Generator:
    """Return a generator that follows from the seed, a purpose and numbers alone.

    Parameters
    ----------
    random_state
        Any whole number.
    purpose
        What is drawn, such as "blocks/MERFISH|0a"; other purposes give independent numbers.
    numbers
        Not negative, such as the epoch.
    """
    return np.random.default_rng([random_state % 2**63, text_key(purpose), *numbers])


def split_blocks(sizes: Index, *, share: float, random_state: int, name: str) -> tuple[Index, Index]:
    """Deal the blocks of a platform out to training and to the held-out cells.

    Of two blocks or more at least one is held out and at least one is trained on; a single one is trained on.

    Parameters
    ----------
    sizes : (n,) int64
        Rows of each block.
    share
        Of the blocks, to hold out; 0 holds none out.
    random_state, name
        Seed, and name of the platform.

    Returns
    -------
    training, held_out : (k,) int64
        Numbers of blocks: ascending, and in random order.
    """
    n_blocks = len(sizes)
    if n_blocks < 2 or not share:
        return np.arange(n_blocks), np.empty(0, np.int64)
    n_held_out = min(n_blocks - 1, max(1, round(share * n_blocks)))
    order = keyed(random_state, f"held out/{name}").permutation(n_blocks)
    if sizes[order[:n_held_out]].sum() > max(0.5, share) * sizes.sum():
        # of a long block and a short one the long one is trained on
        order = order[np.argsort(sizes[order], kind="stable")]
    return np.sort(order[n_held_out:]), order[:n_held_out]


def labels_refine(n_classes: int) -> bool:
    """Whether labels of so many classes change the pairs; warns where they do not."""
    if n_classes < 2:
        found = "no cell has a label" if n_classes == 0 else "all labels are the same"
        warnings.warn(f"{found}: they refine no pairs, training goes on without labels", stacklevel=3)
    return n_classes > 1


def plan_rounds(sizes: Sequence[Index], *, pool_cells: int) -> list[list[Index]]:
    """Cut the blocks of an epoch into rounds that fit into a pool, each with every platform in proportion.

    A platform that is too small for a share of every round lends blocks to several of them, so that each round has
    at least min(50, all) of its cells.

    Parameters
    ----------
    sizes
        For each platform the cells of its blocks, at least one, in the order in which they are taken; none is 0.
    pool_cells
        Cells of a round, up to one block a platform and what small platforms lend.

    Returns
    -------
    list of list of (k,) int64
        For each round and platform the positions in `sizes` of the blocks to take.
    """
    n_rounds = max(1, -(-sum(int(cells.sum()) for cells in sizes) // pool_cells))
    rounds: list[list[Index]] = [[] for _ in range(n_rounds)]
    for cells in sizes:
        total, before = int(cells.sum()), np.cumsum(cells) - cells
        bounds = np.searchsorted(before * n_rounds // total, np.arange(n_rounds + 1))
        for taken, start, stop in zip(rounds, bounds, bounds[1:], strict=False):
            while np.take(cells, np.arange(start, stop), mode="wrap").sum() < min(total, MIN_PLATFORM_CELLS):
                stop += 1
            taken.append(np.arange(start, stop) % len(cells))
    return rounds
