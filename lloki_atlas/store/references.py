"""The scRNA-seq reference as it is stored: counts, totals and principal components of its cells."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from lloki_atlas.errors import InputError
from lloki_atlas.store.arrays import read_arrays, read_attributes, write_arrays
from lloki_atlas.store.places import Place

DIMS: dict[str, tuple[str, ...]] = {
    "indptr": ("cell_bound",),
    "indices": ("entry",),
    "data": ("entry",),
    "symbols": ("gene",),
    "totals": ("cell",),
    "factors": ("cell", "factor"),
    "labels": ("cell",),
}


@dataclass(frozen=True)
class ReferenceProfile:
    """A scRNA-seq reference, ready to give any panel its sparsity histogram and its map onto factors.

    Parameters
    ----------
    counts
        (n_cells, n_genes) CSR float32.
    symbols
        Canonical symbol per column, unique.
    totals
        (n_cells,) float32, counts over the whole transcriptome.
    factors
        (n_cells, n_factors) float32, principal components of z-scored log counts.
    target_total
        Library size that counts are scaled to: the median of `totals`.
    labels
        (n_cells,) text, empty where the reference has no labels.
    organism
        `mouse` or `human`.
    """

    counts: csr_matrix
    symbols: tuple[str, ...]
    totals: np.ndarray
    factors: np.ndarray
    target_total: float
    labels: tuple[str, ...]
    organism: str

    def __post_init__(self) -> None:
        n_cells, n_genes = self.counts.shape
        if len(self.symbols) != n_genes or len(set(self.symbols)) != n_genes:
            raise InputError(f"a reference of {n_genes} genes needs as many different symbols")
        if self.totals.shape != (n_cells,) or self.factors.shape[0] != n_cells or len(self.labels) != n_cells:
            raise InputError("totals, factors and labels of a reference have one row a cell")

    def columns(self, symbols: tuple[str, ...]) -> csr_matrix:
        """Counts of these genes, in this order."""
        position = {symbol: column for column, symbol in enumerate(self.symbols)}
        chosen = csr_matrix(self.counts[:, [position[symbol] for symbol in symbols]])
        chosen.eliminate_zeros()
        chosen.sort_indices()
        return chosen


def write_reference(folder: str | Place, profile: ReferenceProfile) -> None:
    """Write a reference as a group of arrays."""
    counts = profile.counts
    write_arrays(
        folder,
        {
            "indptr": counts.indptr.astype(np.int64),
            "indices": counts.indices.astype(np.int32),
            "data": counts.data.astype(np.float32),
            "symbols": np.array(profile.symbols, dtype=np.str_),
            "totals": profile.totals,
            "factors": profile.factors,
            "labels": np.array(profile.labels, dtype=np.str_),
        },
        dims=DIMS,
        attributes={"organism": profile.organism, "target_total": profile.target_total},
    )


def read_reference(folder: str | Place) -> ReferenceProfile:
    """Read a stored reference."""
    arrays = read_arrays(folder)
    attributes = read_attributes(folder)
    symbols = tuple(str(symbol) for symbol in arrays["symbols"])
    return ReferenceProfile(
        counts=csr_matrix(
            (arrays["data"], arrays["indices"], arrays["indptr"]), shape=(len(arrays["totals"]), len(symbols))
        ),
        symbols=symbols,
        totals=arrays["totals"],
        factors=arrays["factors"],
        target_total=float(attributes["target_total"]),
        labels=tuple(str(label) for label in arrays["labels"]),
        organism=str(attributes["organism"]),
    )
