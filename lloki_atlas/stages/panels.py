"""A slice's counts as the stages read them: controls left out, shared genes in canonical order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from lloki_atlas.config import PropagationConfig
from lloki_atlas.errors import InputError
from lloki_atlas.kernels.hashing import text_key
from lloki_atlas.kernels.rows import Rows
from lloki_atlas.store.arrays import read_arrays
from lloki_atlas.store.slices import SliceStore

# a count is read, freed of controls and cut to the shared genes (8 bytes each time); the embedder's scale needs
# three float64 at a time
READ_ROWS = 16384  # cells read at a time where a pass over a slice needs no more
ENTRY_BYTES = 48
CELL_BYTES = 64


@dataclass(frozen=True)
class PanelCounts:
    """Counts of one slice and which of its genes the reference has.

    Parameters
    ----------
    counts
        (n_cells, n_genes) CSR float32, every gene of the panel but control probes; or `Rows` of it, read when sliced.
    shared
        (n_shared,) columns of the genes shared with the reference, in alphabetical order of `symbols`.
    symbols
        Canonical symbols of the shared genes.
    """

    counts: csr_matrix | Rows
    shared: np.ndarray
    symbols: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.shared):
            raise InputError("no gene of the panel is in the reference: check the organism and the gene symbols")

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return int(self.counts.shape[0])

    @property
    def shared_counts(self) -> csr_matrix | Rows:
        """(n_cells, n_shared) CSR float32, zeros not stored; `Rows` of it if `counts` are."""
        if isinstance(self.counts, Rows):
            return Rows((self.n_cells, len(self.shared)), lambda start, stop: self._cut(self.counts[start:stop]))
        return self._cut(self.counts)

    def _cut(self, counts: csr_matrix) -> csr_matrix:
        if (
            np.array_equal(self.shared, np.arange(counts.shape[1]))
            and counts.has_canonical_format
            and counts.data.all()
        ):
            return counts  # every gene is shared, in order
        shared = csr_matrix(counts[:, self.shared])
        shared.eliminate_zeros()
        shared.sort_indices()
        return shared

    def row_sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Totals over the panel, float32, and numbers of non-zero shared genes, int32: `(n_cells,)` each."""
        totals, nonzeros = np.empty(self.n_cells, dtype=np.float32), np.empty(self.n_cells, dtype=np.int32)
        for start in range(0, self.n_cells, READ_ROWS):
            rows = slice(start, min(start + READ_ROWS, self.n_cells))
            counts = self.counts[rows]
            totals[rows] = np.asarray(counts.sum(axis=1), dtype=np.float32).ravel()
            nonzeros[rows] = np.diff(self._cut(counts).indptr)
        return totals, nonzeros


def shared_symbols(symbols: tuple[str, ...], reference_symbols: tuple[str, ...]) -> tuple[str, ...]:
    """Canonical symbols of a panel that the reference has, in alphabetical order."""
    known = set(reference_symbols)
    return tuple(sorted({symbol for symbol in symbols if symbol and symbol in known}))


def panel_counts(store: SliceStore, reference_symbols: tuple[str, ...], *, in_memory: bool = True) -> PanelCounts:
    """Counts of a slice, all of them read at once, or `Rows` that are read when they are sliced."""
    if in_memory:
        return select_panel(store.counts(), store.symbols, store.mapping, reference_symbols)
    genes, shared, symbols = _choose(store.symbols, store.mapping, reference_symbols)

    def read(start: int, stop: int) -> csr_matrix:
        return csr_matrix(store.counts(start, stop)[:, genes])

    return PanelCounts(counts=Rows((store.n_cells, len(genes)), read), shared=shared, symbols=symbols)


def select_panel(
    counts: csr_matrix, symbols: Sequence[str], mapping: Sequence[str], reference_symbols: tuple[str, ...]
) -> PanelCounts:
    """Leave out control probes and find the genes that the reference has.

    Parameters
    ----------
    counts
        (n_cells, n_columns) CSR float32, every column of the source.
    symbols, mapping
        Canonical symbol ("" without one) and kind of mapping of every column.
    reference_symbols
        Canonical symbols of the reference.
    """
    genes, shared, names = _choose(symbols, mapping, reference_symbols)
    return PanelCounts(counts=csr_matrix(counts[:, genes]), shared=shared, symbols=names)


def _choose(
    symbols: Sequence[str], mapping: Sequence[str], reference_symbols: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Columns that are genes, which of those are shared, and their symbols in alphabetical order."""
    genes = np.flatnonzero(np.array([how != "control" for how in mapping]))
    column = {symbols[gene]: position for position, gene in enumerate(genes.tolist()) if symbols[gene]}
    shared = shared_symbols(tuple(symbols), reference_symbols)
    return genes, np.array([column[symbol] for symbol in shared], dtype=np.int64), shared


def reference_symbols(reference_path: str) -> tuple[str, ...]:
    """Canonical symbols of a stored reference."""
    return tuple(str(symbol) for symbol in read_arrays(reference_path, ["symbols"])["symbols"])


def slice_random_key(slice_id: str, settings: PropagationConfig) -> int:
    """Key of a slice's random streams: of its id and the seed, so that no other slice shares them."""
    return text_key(f"{slice_id}/{settings.random_state}")


def streamed_memory(store: SliceStore) -> int:
    """Projected bytes of a pass over a slice: READ_ROWS of its counts and what is made of them, and numbers a cell."""
    entries = read_entries(store.n_cells, store.n_genes, store.n_counts)
    return entries * ENTRY_BYTES + store.n_cells * CELL_BYTES + 64 * 2**20


def read_entries(n_cells: int, n_genes: int, n_counts: int) -> int:
    """Counts in memory when READ_ROWS cells are read at a time: twice the average, for depth varies over a slice."""
    rows = min(n_cells, READ_ROWS)
    return min(n_counts, rows * n_genes, 2 * n_counts * rows // max(n_cells, 1))
