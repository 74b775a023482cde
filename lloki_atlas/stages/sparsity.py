"""How many genes each cell may fill in, and how its sparsity compares with what it was to be."""

from __future__ import annotations

from typing import Any

import numpy as np

from lloki_atlas.config import PropagationConfig
from lloki_atlas.errors import InputError
from lloki_atlas.kernels.transport import assigned_targets, target_nonzeros

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def sparsity_targets(
    nonzeros: np.ndarray,
    *,
    own_histogram: np.ndarray,
    reference_histogram: np.ndarray,
    reference_histogram_all: np.ndarray | None,
    settings: PropagationConfig,
) -> np.ndarray:
    """Number of non-zero shared genes that transport assigns to each cell: (n_cells,) int32.

    Parameters
    ----------
    nonzeros
        (n_cells,) int32, non-zero shared genes.
    own_histogram, reference_histogram
        (n_shared + 1,) int64, cells by number of non-zero shared genes.
    reference_histogram_all
        (n_reference_genes + 1,) int64, the same over all genes of the reference; None when it is not needed.
    settings
        `sparsity_cdf`, `sparsity_match`, `sparsity_genes`.
    """
    if (settings.sparsity_cdf, settings.sparsity_match, settings.sparsity_genes) == ("midrank", "rank", "shared"):
        return target_nonzeros(own_histogram, reference_histogram)[nonzeros].astype(np.int32)
    histogram = reference_histogram if settings.sparsity_genes == "shared" else reference_histogram_all
    if histogram is None:
        raise InputError("sparsity over all genes of the reference was asked for without their histogram: give it")
    return assigned_targets(
        nonzeros,
        np.repeat(np.arange(len(histogram)), histogram),
        n_genes=len(own_histogram) - 1,
        n_reference_genes=len(histogram) - 1,
        cdf=settings.sparsity_cdf or "midrank",
        match=settings.sparsity_match or "rank",
    )


def sparsity_report(
    nonzeros: np.ndarray, target: np.ndarray, achieved: np.ndarray, *, n_genes: int, reference_histogram: np.ndarray
) -> dict[str, Any]:
    """Own, target and achieved sparsity of a slice.

    Parameters
    ----------
    nonzeros, target, achieved
        (n_cells,) numbers of non-zero shared genes: observed, wanted, and after propagation.
    n_genes
        Number of shared genes.
    reference_histogram
        (n_shared + 1,) cells of the reference by number of non-zero shared genes.

    Returns
    -------
    `n_genes`; mean and quantiles of the sparsity (share of zero genes) `own`, `target`, `achieved` and of the
    `reference`; `cells_with_budget`, the share of cells that may fill in a gene; `target_correlation`, that of the
    target with the reference's sparsity at the cell's own mid-rank, 1 when every cell is sent where it belongs (None
    when all cells are alike).
    """
    reference = np.repeat(np.arange(len(reference_histogram)), reference_histogram)
    own = 1.0 - nonzeros / n_genes
    ordered = np.sort(own)
    rank = (np.searchsorted(ordered, own, "left") + np.searchsorted(ordered, own, "right")) / 2
    quantile = np.quantile(1.0 - reference / n_genes, np.clip(rank / len(own), 0.0, 1.0))
    wanted = 1.0 - target / n_genes
    alike = np.ptp(quantile) == 0 or np.ptp(wanted) == 0
    return {
        "n_genes": int(n_genes),
        "own": _summary(own),
        "target": _summary(wanted),
        "achieved": _summary(1.0 - achieved / n_genes),
        "reference": _summary(1.0 - reference / n_genes),
        "cells_with_budget": float(np.mean(target > nonzeros)),
        "target_correlation": None if alike else float(np.corrcoef(wanted, quantile)[0, 1]),
    }


def _summary(sparsity: np.ndarray) -> dict[str, float]:
    found = {"mean": float(np.mean(sparsity))}
    found.update({f"q{int(100 * q):02d}": float(np.quantile(sparsity, q)) for q in QUANTILES})
    return found
