"""Slice statistics, one pass over the cells: what every later chunk of the slice needs to know about the whole."""

from __future__ import annotations

from typing import Any

import numpy as np

from lloki_atlas.config import PropagationConfig, to_dict
from lloki_atlas.engine.outputs import Output
from lloki_atlas.engine.plan import Task
from lloki_atlas.kernels.bandwidth import sample_bandwidth
from lloki_atlas.kernels.scaling import gene_moments
from lloki_atlas.kernels.transport import sparsity_histogram
from lloki_atlas.stages.lineage import atlas_config
from lloki_atlas.stages.panels import PanelCounts, panel_counts, reference_symbols, slice_random_key, streamed_memory
from lloki_atlas.store.catalog import Catalog
from lloki_atlas.store.records import SliceRecord
from lloki_atlas.store.slices import SliceStore

DIMS: dict[str, tuple[str, ...]] = {
    "totals": ("cell",),
    "nonzeros": ("cell",),
    "histogram": ("n_nonzero",),
    "mean": ("gene",),
    "sd": ("gene",),
    "target_total": ("one",),
    "bandwidth_um": ("one",),
}


def run_slice(
    panel: PanelCounts, coordinates: np.ndarray, *, settings: PropagationConfig, key: int
) -> dict[str, np.ndarray]:
    """Compute the statistics of one slice.

    Parameters
    ----------
    panel
        Counts of the slice.
    coordinates
        (n_cells, 2) float32, µm.
    settings
        Number of cell pairs for the bandwidth.
    key
        Key of the slice's random stream.

    Returns
    -------
    `totals` (n_cells,) float32 over the whole panel without controls, `nonzeros` (n_cells,) int32 over shared genes,
    `histogram` (n_shared + 1,) int64 of `nonzeros`, `mean` and `sd` (n_shared,) of log-normalised counts,
    `target_total` (1,) the median total of non-empty cells, `bandwidth_um` (1,) σ of equation 1.
    """
    totals, nonzeros = panel.row_sums()
    filled = totals[totals > 0]
    target_total = float(np.median(filled)) if len(filled) else 1.0
    moments = gene_moments(panel.shared_counts, totals, target_total=target_total)
    bandwidth = sample_bandwidth(coordinates, n_pairs=settings.n_bandwidth_pairs, key=key)
    return {
        "totals": totals,
        "nonzeros": nonzeros,
        "histogram": sparsity_histogram(nonzeros, len(panel.symbols)),
        "mean": moments.mean,
        "sd": moments.sd,
        "target_total": np.array([target_total]),
        "bandwidth_um": np.array([bandwidth]),
    }


def compute(slice_path: str, reference_path: str, settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """Task body: read a slice, compute its statistics."""
    config = PropagationConfig(**settings)
    store = SliceStore(slice_path)
    return run_slice(
        panel_counts(store, reference_symbols(reference_path), in_memory=False),
        store.coordinates(),
        settings=config,
        key=slice_random_key(store.metadata["slice_id"], config),
    )


def plan_stage(catalog: Catalog, record: SliceRecord, keys: dict[str, str]) -> list[Task]:
    """One task: the statistics of the slice."""
    key = keys["tile"]
    return [
        Task(
            name=f"tile/{record.slice_id}",
            stage="tile",
            function="lloki_atlas.stages.tile:compute",
            arguments={
                "slice_path": str(catalog.path("slices", keys["ingest"])),
                "reference_path": str(catalog.path("references", str(catalog.state.reference))),
                "settings": to_dict(atlas_config(catalog).propagation),
            },
            output=Output(
                path=str(catalog.path("statistics", key)),
                staging=str(catalog.path("staging", key)),
                lineage={"stage": "tile", "slice": keys["ingest"], "reference": catalog.state.reference},
                dims=DIMS,
                attributes={"slice_id": record.slice_id},
            ),
            n_cells=record.n_cells,
            projected_memory=streamed_memory(SliceStore(catalog.path("slices", keys["ingest"]))),
            slice_id=record.slice_id,
        )
    ]
