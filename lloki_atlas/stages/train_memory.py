"""What training needs of memory, stated before it runs: bytes above what the process holds already."""

from __future__ import annotations

from collections.abc import Sequence

from lloki_atlas.config import AutoencoderConfig
from lloki_atlas.stages.train_cells import POOL_CELLS
from lloki_atlas.stages.train_labels import PART_CELLS

EMBEDDING_BYTES = 512 * 4
CELL_BYTES = 512 * 2 + 3 * 8  # of a cell in a pool
LEND_CELLS = 50
# of a step (models/step.py, models/mutual.py), which cannot be asked without loading torch
STEP_THREADS, PART_ROWS, MAX_COSINES = 4, 500, 2**23
WEIGHT_BYTES = 4 * 400_000
ACTIVATION_BYTES = 4 * 1500  # of a cell on its way through the model
_BASE = 96 * 2**20  # compiled kernels, files in flight, and what the allocators of several threads keep


def training_memory(token_cells: Sequence[int], n_cells: int, config: AutoencoderConfig, *, labelled: bool) -> int:
    """Upper bound of the peak of a training; with labels two bytes a cell of the atlas are all that grows with it.

    Parameters
    ----------
    token_cells
        Cells of each token in an epoch, at most.
    n_cells
        Cells of all slices.
    config
        Settings of the training.
    labelled
        Whether labels refine the pairs.
    """
    n_tokens, epoch = len(token_cells), sum(token_cells)
    pool = min(epoch, max(POOL_CELLS, config.chunk_cells) + 512 * n_tokens)
    n_pools = 1 if epoch <= max(POOL_CELLS, config.chunk_cells) else 2  # one is read while one is used
    chunk = min(epoch, config.chunk_cells + LEND_CELLS * n_tokens)
    shares = sorted(chunk * cells // epoch + LEND_CELLS for cells in token_cells)
    cosines = max(MAX_COSINES, shares[-1] * shares[-2]) if n_tokens > 1 else 0
    pairs = config.n_neighbors_conservation * 64 + config.n_neighbors_mutual * (n_tokens - 1) * 24
    step = (
        4 * cosines
        + STEP_THREADS * PART_ROWS * chunk * 4
        + chunk * (EMBEDDING_BYTES + ACTIVATION_BYTES + pairs)
        + (2 * (chunk // PART_ROWS + 1) + 8) * WEIGHT_BYTES
    )
    # that which is trained on, that which is made meanwhile, and the held-out one
    chunks = 4 * chunk * EMBEDDING_BYTES
    labels = 2 * n_cells + 256 * PART_CELLS if labelled else 0
    return n_pools * pool * CELL_BYTES + chunks + step + labels + _BASE
