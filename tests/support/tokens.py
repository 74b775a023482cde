"""Value bins of one cell."""

from __future__ import annotations

import numpy as np

from lloki_atlas.models.tokens import tokenize


def bin_values(values: np.ndarray, *, n_bins: int) -> np.ndarray:
    """Return the bins of the non-zero values of one cell, in their order."""
    return tokenize(values[None], np.arange(len(values)), n_bins=n_bins, max_genes=len(values)).digits.astype(np.int64)
