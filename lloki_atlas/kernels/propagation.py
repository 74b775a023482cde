"""Feature propagation: unknown entries are filled in from neighbours, observed ones stay, within a budget per cell."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.blocks import BlockStore, MemoryBlocks, Storage, block_width, stored_dtype
from lloki_atlas.kernels.checks import CsrArrays, array, csr_arrays
from lloki_atlas.kernels.gather import advance
from lloki_atlas.kernels.graph import Graph
from lloki_atlas.kernels.support import Support, draw_supports, gene_words, mark_observed
from lloki_atlas.kernels.threads import over_rows

ROWS = 2048  # cells of a partial sum of changes, and of a read: fixed, for sums must not depend on threads

MakeBlocks = Callable[[int, int, int, Storage], BlockStore]


@dataclass(frozen=True)
class Propagated:
    """`values` (n_cells, n_genes) float32, the iterations run, and the last relative change of the unknown entries."""

    values: NDArray[np.float32]
    n_iterations: int
    relative_change: float

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.dtype != np.float32:
            raise InputError(f"values is {self.values.dtype} of {self.values.ndim} axes: give (n, G) float32")
        if self.n_iterations < 0 or not self.relative_change >= 0:
            raise InputError("iterations and change cannot be negative")


class PropagatedRows:
    """Propagated values, still in blocks of genes: sliced like a `(n_cells, n_genes)` float32 matrix.

    Attributes
    ----------
    shape
        Cells and genes.
    n_iterations, relative_change
        How propagation ended.
    """

    def __init__(self, counts: Any, blocks: BlockStore, width: int, scale: NDArray[np.float32] | None) -> None:
        self.shape = (int(counts.shape[0]), int(counts.shape[1]))
        self.n_iterations, self.relative_change = 0, 0.0
        self._counts, self._blocks, self._width, self._scale = counts, blocks, width, scale

    def __getitem__(self, rows: slice) -> NDArray[np.float32]:
        start, stop, _ = rows.indices(self.shape[0])
        out = np.empty((stop - start, self.shape[1]), dtype=np.float32)
        for block in range(-(-self.shape[1] // self._width)):
            genes = slice(block * self._width, min((block + 1) * self._width, self.shape[1]))
            part = self._blocks.read_rows(block, start, stop)
            part = part.view(np.float16) if part.dtype == np.uint16 else part
            out[:, genes] = part[:, : genes.stop - genes.start]
        if self._scale is not None:
            out *= self._scale
            known = self._counts[start:stop].tocoo()  # rounded to float16 in storage
            seen = known.data != 0
            out[known.row[seen], known.col[seen]] = known.data[seen]
        return out

    def toarray(self) -> NDArray[np.float32]:
        """Return all rows."""
        return self[0 : self.shape[0]]

    def count_nonzeros(self) -> NDArray[np.int32]:
        """Return the number of non-zero genes of each cell, `(n_cells,)`."""
        counted = np.zeros(self.shape[0], dtype=np.int32)
        for start in range(0, self.shape[0], ROWS):
            stop = min(start + ROWS, self.shape[0])
            for block in range(-(-self.shape[1] // self._width)):  # padding is zero
                counted[start:stop] += np.count_nonzero(self._blocks.read_rows(block, start, stop), axis=1)
        return counted


def propagate(
    graph: Graph,
    counts: Any,
    budget: ArrayLike,
    *,
    key: int,
    max_iterations: int = 40,
    tolerance: float = 1e-3,
) -> Propagated:
    """Fill in unknown entries and return all values as one array; see `propagate_blocks`."""
    rows = propagate_blocks(graph, counts, budget, key=key, max_iterations=max_iterations, tolerance=tolerance)
    return Propagated(rows.toarray(), rows.n_iterations, rows.relative_change)


def propagate_blocks(
    graph: Graph,
    counts: Any,
    budget: ArrayLike,
    *,
    key: int,
    max_iterations: int = 40,
    tolerance: float = 1e-3,
    storage: Storage = "float32",
    n_threads: int = 1,
    make_blocks: MakeBlocks = MemoryBlocks,
) -> PropagatedRows:
    """Fill in unknown entries by X ← (1 − M)∘(A X) + M∘X⁰ (equation 2), at most `budget` of them per cell.

    M marks the observed (non-zero) entries. In the iteration in which a cell first has more non-zero unknown
    entries than its budget, those of smallest hash(key, cell row, gene) are kept, `budget` of them, and no others
    are filled in from then on; so the iteration converges, and nothing depends on order. It ends when the change of
    the unknown entries is below `tolerance` of their norm (0 when there are none).
    Products are float32, fused, in the order of the graph's indices. An entry counts as non-zero if a path of edges
    leads to an observed one, however small its value.

    Parameters
    ----------
    graph
        Of n_cells rows.
    counts
        `(n_cells, n_genes)` CSR float32, not negative: a matrix, or anything with a `shape` whose row slices are one.
    budget
        `(n_cells,)` int32, see `imputation_budget`.
    key
        Key of the slice.
    max_iterations
        Upper limit of the iterations.
    tolerance
        Relative change at which they end.
    storage
        Type of the values between iterations: float16 halves memory and traffic. Each gene is stored in units of a
        power of two near its maximum; after as many iterations the relative error of values above a
        thousandth of that unit is below 3e-3, and no entry becomes zero.
    n_threads
        Threads; they change no bit.
    make_blocks
        Where blocks of genes are kept: called with n_cells, the number of blocks, their width and `storage`.

    Returns
    -------
    PropagatedRows
        Observed entries are exactly those given.

    Raises
    ------
    InputError
        If shapes do not fit, a count or budget is negative, or a setting is not positive.
    """
    n, n_genes = (int(length) for length in counts.shape)
    if n != graph.n_cells:
        raise InputError(f"counts has {n} cells and the graph {graph.n_cells}: give one slice's")
    allowed = array(budget, np.int32, name="budget", shape=(n,))
    if allowed.size and int(allowed.min()) < 0:
        raise InputError("budget holds a negative number: give max(0, target - own)")
    if max_iterations < 1 or not tolerance > 0:
        raise InputError(f"max_iterations is {max_iterations}, tolerance {tolerance}: both have to be positive")
    width = block_width(n, storage)
    observed, largest = _observe(counts)
    scale = None if storage == "float32" else _powers_of_two(largest)
    n_blocks = -(-n_genes // width)
    blocks = make_blocks(n, n_blocks, width, storage)
    _fill(counts, blocks, n_blocks, width, scale)
    rows = PropagatedRows(counts, blocks, width, scale)
    rows.n_iterations = 1
    if not allowed.any():  # nothing may be filled in
        return rows
    arrays = _graph_arrays(graph)
    support = draw_supports(arrays, observed, allowed, key=key, max_iterations=max_iterations, n_threads=n_threads)
    spare = np.empty((n, width), dtype=stored_dtype(storage))
    for iteration in range(1, max_iterations + 1):
        change, norm = np.zeros(n_blocks * width), np.zeros(n_blocks * width)
        for block in range(n_blocks):
            genes = slice(block * width, (block + 1) * width)
            current = blocks.read(block)
            change[genes], norm[genes] = _advance(
                arrays, current, spare, block, iteration, observed, support, n_threads
            )
            spare = blocks.replace(block, spare)
        if scale is not None:
            units = np.append(scale, np.zeros(n_blocks * width - n_genes)).astype(np.float64) ** 2
            change, norm = change * units, norm * units
        total = math.fsum(norm.tolist())
        rows.n_iterations = iteration
        rows.relative_change = math.sqrt(math.fsum(change.tolist()) / total) if total > 0 else 0.0
        if rows.relative_change < tolerance:
            break
    return rows


def projected_bytes(n_cells: int, n_genes: int, *, storage: Storage = "float32", in_memory: bool = True) -> int:
    """Return the largest memory of `propagate_blocks` beside its graph and counts."""
    width = block_width(n_cells, storage)
    block = n_cells * width * stored_dtype(storage).itemsize
    held = -(-n_genes // width) if in_memory else 1
    bits = 4 * n_cells * gene_words(n_genes) * 8
    return (held + 1) * block + bits + ROWS * n_genes * 32 + 16 * n_cells


def _advance(
    arrays: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
    current: NDArray[Any],
    following: NDArray[Any],
    block: int,
    iteration: int,
    observed: NDArray[np.uint64],
    support: Support,
    n_threads: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One iteration of a block; squares of the change and of the unknown entries by gene, `(width,)`."""
    n, width = current.shape
    change, norm = np.zeros((-(-n // ROWS), width)), np.zeros((-(-n // ROWS), width))

    def rows(start: int, stop: int) -> None:
        for at in range(start, stop, ROWS):
            part = at // ROWS
            advance(
                *arrays,
                current,
                following,
                at,
                min(at + ROWS, stop),
                block,
                iteration,
                observed,
                support.allowed,
                support.frozen_at,
                change[part],
                norm[part],
            )

    over_rows(n, n_threads, rows, chunk=ROWS)
    return change.sum(axis=0), norm.sum(axis=0)


def _chunks(counts: Any) -> Any:
    """Checked CSR arrays of ROWS cells at a time, each with its first row."""
    for start in range(0, counts.shape[0], ROWS):
        yield start, csr_arrays(counts[start : min(start + ROWS, counts.shape[0])], name="counts")


def _observe(counts: Any) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    observed = np.zeros((counts.shape[0], gene_words(counts.shape[1])), dtype=np.uint64)
    largest = np.zeros(counts.shape[1], dtype=np.float32)
    for start, part in _chunks(counts):
        mark_observed(part.indptr, part.indices, part.data, start, observed)
        np.maximum.at(largest, part.indices, part.data)
    return observed, largest


def _powers_of_two(largest: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return for each gene the power of two at or above its maximum: scaling by it loses no digit."""
    return np.exp2(np.ceil(np.log2(np.where(largest > 0, largest, 1.0)))).astype(np.float32)


def _fill(counts: Any, blocks: BlockStore, n_blocks: int, width: int, scale: NDArray[np.float32] | None) -> None:
    for start, part in _chunks(counts):
        dense = _dense(part, n_blocks * width)
        if scale is not None:
            dense[:, : len(scale)] /= scale
            rounded = dense.astype(np.float16).view(np.uint16)
            rounded[(dense > 0) & (rounded == 0)] = 1  # the smallest number above zero: what is observed stays so
            dense = rounded
        for block in range(n_blocks):
            blocks.write_rows(block, start, dense[:, block * width : (block + 1) * width])


def _dense(part: CsrArrays, n_columns: int) -> NDArray[Any]:
    dense = np.zeros((part.shape[0], n_columns), dtype=np.float32)
    dense[np.repeat(np.arange(part.shape[0]), np.diff(part.indptr)), part.indices] = part.data
    return dense


def _graph_arrays(graph: Graph) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    return (
        array(graph.indptr, np.int64, name="indptr", shape=(None,)),
        array(graph.indices, np.int32, name="indices", shape=(None,)),
        array(graph.weights, np.float32, name="weights", shape=(None,)),
    )
