"""The scRNA-seq reference: gene list, totals, factors; and for every panel its sparsity histogram and map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from lloki_atlas.config import AtlasConfig, EmbedderConfig, to_dict
from lloki_atlas.engine.outputs import Output
from lloki_atlas.engine.plan import Task
from lloki_atlas.errors import InputError
from lloki_atlas.kernels.scaling import gene_moments, scaled_components
from lloki_atlas.kernels.transport import sparsity_histogram
from lloki_atlas.models.embedders import ReferenceFactors, embedder_factory
from lloki_atlas.stages.genes import map_symbols
from lloki_atlas.stages.lineage import atlas_config
from lloki_atlas.stages.panels import shared_symbols
from lloki_atlas.stages.sources import open_source
from lloki_atlas.store.arrays import read_arrays
from lloki_atlas.store.catalog import Catalog
from lloki_atlas.store.records import SliceRecord
from lloki_atlas.store.references import ReferenceProfile, read_reference
from lloki_atlas.store.slices import SliceStore

CLIP = 10.0
MAX_FACTOR_GENES = 2000  # the most variable ones carry the factors; more only cost memory: (genes, genes) float64
PANEL_DIMS: dict[str, tuple[str, ...]] = {
    "symbols": ("gene",),
    "histogram": ("n_nonzero",),
    "histogram_all": ("n_nonzero_all",),
    "weights": ("gene", "factor"),
}


def fit_reference(
    source: Any,
    *,
    organism: str,
    label_key: str | None = None,
    layer: str | None = None,
    n_factors: int = AtlasConfig().embedder.n_factors,
    gene_map: str | Path | None = None,
) -> ReferenceProfile:
    """Make a reference profile of a scRNA-seq data set.

    Parameters
    ----------
    source
        Path of an h5ad file, or an AnnData; integer counts.
    organism
        `mouse` or `human`; mouse symbols are mapped to human ones.
    label_key
        Column of `obs` with cell types, kept for label transfer.
    layer
        Layer that holds the counts; `X` when None.
    n_factors
        Principal components to keep.
    gene_map
        A table (source symbol, canonical symbol) that wins over the built-in ones.

    Returns
    -------
    Counts over the mapped genes, totals over all genes, and (n_cells, n_factors) factors: principal components of
    log1p of library-normalised counts, z-scored per gene and clipped at 10, over the (at most 2,000) genes of the
    largest variance.

    Raises
    ------
    InputError
        If the source cannot be used as counts, or no gene has a canonical symbol.
    """
    table = open_source(source, layer=layer, spatial_key=None)
    table.require_counts(accept_normalized=False)
    if label_key is not None and label_key not in table.obs:
        raise InputError(
            f"{table.description} has no obs column '{label_key}': choose from {', '.join(map(str, table.obs.columns))}"
        )
    genes = map_symbols(table.symbols, organism=organism, gene_map=gene_map)
    mapped = np.array([column for column, symbol in enumerate(genes.canonical) if symbol], dtype=np.int64)
    if not len(mapped):
        raise InputError(f"{table.description} has no gene with a known symbol: check the organism and var_names")
    totals = np.asarray(table.counts.sum(axis=1), dtype=np.float32).ravel()
    filled = np.flatnonzero(totals > 0)  # a cell without counts says nothing about sparsity or factors
    counts = csr_matrix(table.counts[filled][:, mapped])
    counts.sort_indices()
    totals = totals[filled]
    target_total = float(np.median(totals))
    labels = table.obs[label_key].astype(str).to_numpy()[filled] if label_key else np.full(len(filled), "")
    return ReferenceProfile(
        counts=counts,
        symbols=tuple(genes.canonical[column] for column in mapped),
        totals=totals,
        factors=_factors(counts, totals, target_total=target_total, n_factors=n_factors),
        target_total=target_total,
        labels=tuple(labels),
        organism=organism,
    )


def _factors(counts: csr_matrix, totals: np.ndarray, *, target_total: float, n_factors: int) -> np.ndarray:
    if counts.shape[1] > MAX_FACTOR_GENES:
        sd = gene_moments(counts, totals, target_total=target_total).sd
        counts = csr_matrix(counts[:, np.sort(np.argsort(-sd, kind="stable")[:MAX_FACTOR_GENES])])
    return scaled_components(counts, n_components=n_factors, target_total=target_total, clip=CLIP, totals=totals)


def run_panel(
    profile: ReferenceProfile, symbols: tuple[str, ...], *, settings: EmbedderConfig
) -> dict[str, np.ndarray]:
    """What one set of shared genes takes from the reference.

    Parameters
    ----------
    profile
        The reference.
    symbols
        Canonical symbols of the shared genes, in order.
    settings
        Embedder whose panel map is wanted.

    Returns
    -------
    `symbols`, `histogram` (n_shared + 1,) int64 of reference cells by number of non-zero shared genes,
    `histogram_all` (n_reference_genes + 1,) over all genes of the reference, and the embedder's own arrays for this
    panel.
    """
    counts = profile.columns(symbols)
    factors = ReferenceFactors(counts, profile.totals, profile.factors, profile.target_total)
    return {
        "symbols": np.array(symbols, dtype=np.str_),
        "histogram": sparsity_histogram(np.diff(counts.indptr).astype(np.int32), len(symbols)),
        "histogram_all": sparsity_histogram(np.diff(profile.counts.indptr).astype(np.int32), profile.counts.shape[1]),
        **embedder_factory(settings.name).fit_panel(settings, factors),
    }


def compute(reference_path: str, slice_path: str, settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """Task body: read the reference and the panel of a slice."""
    profile = read_reference(reference_path)
    symbols = shared_symbols(SliceStore(slice_path).symbols, profile.symbols)
    return run_panel(profile, symbols, settings=EmbedderConfig(**settings))


def plan_stage(catalog: Catalog, record: SliceRecord, keys: dict[str, str]) -> list[Task]:
    """One task per panel; slices that share a panel share it."""
    key = keys["reference"]
    reference_path = str(catalog.path("references", str(catalog.state.reference)))
    n_counts = int(read_arrays(reference_path, ["indptr"])["indptr"][-1])
    return [
        Task(
            name=f"reference/{key}",
            stage="reference",
            function="lloki_atlas.stages.reference:compute",
            arguments={
                "reference_path": reference_path,
                "slice_path": str(catalog.path("slices", keys["ingest"])),
                "settings": to_dict(atlas_config(catalog).embedder),
            },
            output=Output(
                path=str(catalog.path("panels", key)),
                staging=str(catalog.path("staging", key)),
                lineage={"stage": "reference", "reference": catalog.state.reference, "panel": record.panel},
                dims=PANEL_DIMS,
            ),
            # the whole reference is read (16 bytes a count, measured); the rest is what a panel takes of it
            projected_memory=n_counts * 20 + 512 * 2**20,
        )
    ]
