"""Training cells of a foundation model: reference cells as an imaging platform, or LLOKI-FP, would show them.

A view of a cell is what is left of it on a gene panel, at a depth, with a gain per gene; or the same of a weighted
mean over neighbouring cells, since the engine embeds diffused counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from lloki_atlas.models.tokens import TokenRows, tokenize


@dataclass(frozen=True)
class Panel:
    """Genes that a platform measures: `columns` (n,) int ascending, and how it sees them.

    `log_gain` (n,) is the log of a gene's mean count on the platform relative to the reference's, `depth` the mean
    count of a cell over the panel, None where it is not known.
    """

    columns: np.ndarray
    log_gain: np.ndarray
    depth: float | None = None


@dataclass(frozen=True)
class TrainingCells:
    """What is trained on.

    Parameters
    ----------
    counts
        (n_cells, n_genes) CSR float32.
    latent
        (n_cells, n_latent) float32, what the row of `<cls>` has to tell; its cosine is the wanted similarity.
    gene_latent
        (n_genes, n_latent) float32, correlation of each gene with each number of the latent.
    neighbors
        (n_cells, n_neighbors) int, nearest cells, without the cell itself.
    cell_weights
        (n_cells,) float64, how often a cell is drawn; they sum to 1.
    gene_weights
        (n_genes,) float64, how often a gene is in a random panel; they sum to 1.
    panels
        Platforms that are known beforehand.
    """

    counts: csr_matrix
    latent: np.ndarray
    gene_latent: np.ndarray
    neighbors: np.ndarray
    cell_weights: np.ndarray
    gene_weights: np.ndarray
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Augmentation:
    """How views are drawn; ranges are drawn from log-uniformly, once a view of a batch.

    `panel_genes` of a random panel; `panel_share` of the views have a known panel; `depth` expected counts of a cell
    over the panel, `depth_sd` its spread among cells (log scale); `gain_sd` largest spread of the genes' efficiency
    on a random panel (log scale), `known_sd` the one around the gains of a known panel, and that of its depth;
    `diffused_share` of the views are means over `diffused_cells` neighbours, `few_share` over 2 to 6;
    up to `stranger_share` of those are random cells.
    """

    panel_genes: tuple[int, int] = (16, 200)
    panel_share: float = 0.7
    depth: tuple[float, float] = (5.0, 400.0)
    depth_sd: float = 0.4
    gain_sd: float = 1.6
    known_sd: float = 0.3
    diffused_share: float = 0.45
    few_share: float = 0.2
    diffused_cells: tuple[int, int] = (10, 45)
    stranger_share: float = 0.4


@dataclass(frozen=True)
class Batch:
    """Some cells of a view, padded to the longest: tokens and bins (n, length) int64, and their rows in the view."""

    rows: np.ndarray
    genes: np.ndarray
    digits: np.ndarray


def draw_panel(cells: TrainingCells, settings: Augmentation, generator: np.random.Generator) -> Panel:
    """Draw a platform: a known one, with some doubt about its gains and depth, or random genes, gains and depth."""
    if cells.panels and generator.random() < settings.panel_share:
        known = cells.panels[generator.integers(len(cells.panels))]
        columns, log_gain, spread = known.columns, known.log_gain, settings.known_sd
        depth = None if known.depth is None else known.depth * np.exp(generator.normal(scale=spread))
    else:
        n_genes = cells.counts.shape[1]
        low, high = (min(bound, n_genes) for bound in settings.panel_genes)
        size = round(_log_uniform(low, high, generator))
        columns = np.sort(generator.choice(n_genes, size=size, replace=False, p=cells.gene_weights))
        log_gain, spread, depth = np.zeros(size), settings.gain_sd, None
    noise = generator.normal(scale=generator.uniform(0, spread), size=len(columns))
    return Panel(columns, log_gain + noise, depth or _log_uniform(*settings.depth, generator))


def draw_view(
    cells: TrainingCells,
    rows: np.ndarray,
    *,
    tokens: np.ndarray,
    n_bins: int,
    max_genes: int,
    settings: Augmentation,
    generator: np.random.Generator,
) -> TokenRows:
    """Tokens of cells as one platform would show them.

    Parameters
    ----------
    cells
        The reference.
    rows
        (n,) int, the cells.
    tokens
        (n_genes,) int64, the token of each column.
    n_bins, max_genes
        As for `tokenize`.
    settings
        How strange the platform may be.
    generator
        Source of every random number.
    """
    panel = draw_panel(cells, settings, generator)
    members, weights = _members(cells, rows, settings, generator)
    counts = csr_matrix(cells.counts[members.ravel()][:, panel.columns])
    rate = counts.data * np.exp(panel.log_gain)[counts.indices]
    mean = max(float(rate.sum()) / members.size, 0.5)
    spread = generator.normal(scale=settings.depth_sd, size=members.size)
    # three times what the reference has at most: more would only multiply its zeros
    scale = min(float(panel.depth or mean) / mean, 3.0) * np.exp(spread)
    rate *= np.repeat(scale, np.diff(counts.indptr))
    seen = csr_matrix((generator.poisson(rate).astype(np.float32), counts.indices, counts.indptr), counts.shape)
    n, k = members.shape
    mixing = csr_matrix((weights.ravel(), np.arange(n * k), np.arange(n + 1) * k), shape=(n, n * k))
    shown = csr_matrix(mixing @ seen) if k > 1 else seen
    shown.eliminate_zeros()
    return tokenize(shown, tokens[panel.columns], n_bins=n_bins, max_genes=max_genes)


def batches(view: TokenRows, kept: np.ndarray, *, pad: int, cls: int, n_parts: int) -> list[Batch]:
    """Cells of a view in `n_parts` batches of similar length, `<cls>` first.

    Parameters
    ----------
    view
        Tokens of the cells.
    kept
        Rows of the view to take, ascending; none is empty.
    pad, cls
        Tokens of padding and `<cls>`.
    n_parts
        How many batches; fewer when there are fewer cells.
    """
    lengths = np.diff(view.indptr)
    made = []
    for rows in np.array_split(kept[np.argsort(lengths[kept], kind="stable")], min(n_parts, len(kept))):
        place = np.arange(lengths[rows].max())
        filled = place < lengths[rows][:, None]
        source = np.where(filled, view.indptr[rows][:, None] + place, 0)
        genes = np.full((len(rows), 1 + len(place)), pad, dtype=np.int64)
        digits = np.zeros(genes.shape, dtype=np.int64)
        genes[:, 0] = cls
        genes[:, 1:] = np.where(filled, view.genes[source], pad)
        digits[:, 1:] = np.where(filled, view.digits[source], 0)
        made.append(Batch(rows, genes, digits))
    return made


def _members(
    cells: TrainingCells, rows: np.ndarray, settings: Augmentation, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cells whose mean a view is, the cell itself first, and their weights: two (n, k)."""
    kind, most = generator.random(), cells.neighbors.shape[1]
    if kind < settings.diffused_share:
        k = round(_log_uniform(*settings.diffused_cells, generator))
    elif kind < settings.diffused_share + settings.few_share:
        k = int(generator.integers(2, 7))
    else:
        k = 0
    k = min(k, most)
    members = np.empty((len(rows), 1 + k), dtype=np.int64)
    members[:, 0] = rows
    chosen = generator.permuted(np.broadcast_to(np.arange(most), (len(rows), most)), axis=1)[:, :k]
    members[:, 1:] = np.take_along_axis(cells.neighbors[rows], chosen, axis=1)
    strange = generator.random((len(rows), k)) < generator.uniform(0, settings.stranger_share)
    members[:, 1:][strange] = generator.integers(len(cells.neighbors), size=int(strange.sum()))
    # neighbours differ in their spatial weight
    return members, np.asarray(generator.gamma(2.0, size=members.shape), dtype=np.float32)


def _log_uniform(low: float, high: float, generator: np.random.Generator) -> float:
    return float(np.exp(generator.uniform(np.log(low), np.log(high))))
