"""What pretraining takes of a reference, and of the slices that will be embedded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.cluster.vq import kmeans2

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.neighbors import nearest_rows
from lloki_atlas.kernels.scaling import gene_moments
from lloki_atlas.models.embedders import log_normalized
from lloki_atlas.models.pretraining_batches import Panel, TrainingCells
from lloki_atlas.stages.genes import map_symbols
from lloki_atlas.stages.sources import open_source
from lloki_atlas.store.references import ReferenceProfile

N_NEIGHBORS = 60
N_SMOOTHED = 15
N_GROUPS = 40
MIN_PANEL_GENES = 2
MAX_LOG_GAIN = 4.0


def training_cells(
    profile: ReferenceProfile, panels: Sequence[Panel], *, n_latent: int, random_state: int
) -> TrainingCells:
    """What a reference has to offer: smoothed latents, neighbours, and how often cells and genes are drawn.

    Parameters
    ----------
    profile
        The reference.
    panels
        Known platforms.
    n_latent
        Numbers of the latent.
    random_state
        Seeds the groups that even out how often common and rare cells are drawn.
    """
    factors = profile.factors[:, :n_latent].astype(np.float64)
    # between raw components, where the first outweighs all, and whitened ones, where noise counts as much as signal
    latent = factors / np.sqrt(factors.std(axis=0) + 1e-12)
    n_cells = len(latent)
    n_neighbors = min(N_NEIGHBORS, n_cells - 1)
    if n_neighbors < 1:
        raise InputError(f"a reference of {n_cells} cells cannot be trained on: give at least 2 cells with counts")
    found = nearest_rows(latent.astype(np.float32), latent.astype(np.float32), n_neighbors=n_neighbors + 1).indices
    neighbors = _without_self(found, n_neighbors)
    smoothed = latent.copy()
    n_smoothed = min(N_SMOOTHED, n_neighbors)
    for column in range(n_smoothed):
        smoothed += latent[neighbors[:, column]]
    groups = kmeans2(latent, min(N_GROUPS, n_cells), minit="++", seed=random_state % 2**32)[1]
    rarity = np.bincount(groups)[groups] ** -0.5
    logs = log_normalized(profile.counts, profile.totals, profile.target_total)
    moments = gene_moments(profile.counts, profile.totals, target_total=profile.target_total)
    scale = (moments.sd + 1e-3)[:, None] * (factors.std(axis=0) + 1e-12)
    covariance = logs.T @ factors / n_cells - np.outer(moments.mean, factors.mean(axis=0))
    weights = moments.sd + 1e-3
    return TrainingCells(
        counts=profile.counts,
        latent=(smoothed / (1 + n_smoothed)).astype(np.float32),
        gene_latent=(covariance / scale).astype(np.float32),
        neighbors=neighbors,
        cell_weights=rarity / rarity.sum(),
        gene_weights=weights / weights.sum(),
        panels=tuple(panels),
    )


def known_panels(panels: Sequence[Any], profile: ReferenceProfile, *, gene_map: str | Path | None) -> list[Panel]:
    """Genes, gains and depth of slices, over the genes that each shares with the reference.

    Parameters
    ----------
    panels
        Paths or AnnData.
    profile
        The reference.
    gene_map
        A table (source symbol, canonical symbol) that wins over the built-in ones.

    Raises
    ------
    InputError
        If a slice holds no counts, or shares fewer than two genes with the reference.
    """
    column = {symbol: place for place, symbol in enumerate(profile.symbols)}
    reference_mean = np.asarray(profile.counts.mean(axis=0), dtype=np.float64).ravel()
    known = []
    for source in panels:
        table = open_source(source, spatial_key=None)
        table.require_counts(accept_normalized=False)
        symbols = map_symbols(table.symbols, organism=profile.organism, gene_map=gene_map).canonical
        place = {column[symbol]: i for i, symbol in enumerate(symbols) if symbol in column}
        if len(place) < MIN_PANEL_GENES:
            raise InputError(
                f"{table.description} shares {len(place)} genes with the reference: check the organism and var_names"
            )
        columns = np.array(sorted(place), dtype=np.int64)
        shared = table.counts[:, [place[one] for one in columns]]
        total = float(shared.sum()) / max(1, int(np.count_nonzero(shared.sum(axis=1))))
        gain = _log_shares(np.asarray(shared.mean(axis=0)).ravel()) - _log_shares(reference_mean[columns])
        known.append(Panel(columns, np.clip(gain - gain.mean(), -MAX_LOG_GAIN, MAX_LOG_GAIN), max(total, 1.0)))
    return known


def _log_shares(mean: np.ndarray) -> np.ndarray:
    """Log of each gene's mean count; one that was hardly seen counts as a thousandth of the average gene."""
    mean = mean.astype(np.float64)
    return np.asarray(np.log(mean + 1e-3 * mean.mean() + 1e-12))


def _without_self(found: np.ndarray, n_neighbors: int) -> np.ndarray:
    """Drop each cell from its own neighbours, or the last where it is not among them; a missing one is the cell."""
    own = np.arange(len(found))[:, None]
    rows = np.where(found < 0, own, found)
    drop = rows == own
    drop[:, 1:] &= ~np.logical_or.accumulate(drop, axis=1)[:, :-1]
    drop[~drop.any(axis=1), -1] = True
    return rows[~drop].reshape(len(found), n_neighbors).astype(np.int64)
