"""LLOKI-FP of one slice: neighbours → graph → budget → propagation → the second graph, which diffusion walks.

The propagated matrix only chooses the neighbours of the second graph (equation 5 mixes counts, not propagated
values), so the graph is what is stored: about 75 entries a cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from lloki_atlas.config import PropagationConfig, to_dict
from lloki_atlas.engine.plan import Output, Task
from lloki_atlas.kernels.graph import Graph, build_graph
from lloki_atlas.kernels.neighbors import nearest_neighbors
from lloki_atlas.kernels.propagation import propagate
from lloki_atlas.kernels.scaling import scaled_components
from lloki_atlas.kernels.transport import imputation_budget, target_nonzeros
from lloki_atlas.stages.lineage import atlas_config
from lloki_atlas.stages.panels import PanelCounts, panel_counts, reference_symbols, slice_random_key, task_memory
from lloki_atlas.store.arrays import read_arrays
from lloki_atlas.store.catalog import Catalog
from lloki_atlas.store.records import SliceRecord
from lloki_atlas.store.slices import SliceStore

DIMS: dict[str, tuple[str, ...]] = {
    "indptr": ("cell_bound",),
    "indices": ("entry",),
    "weights": ("entry",),
    "budget": ("cell",),
    "target_nonzeros": ("cell",),
    "achieved_nonzeros": ("cell",),
    "n_iterations": ("one",),
    "relative_change": ("one",),
}


@dataclass(frozen=True)
class PropagatedSlice:
    """What LLOKI-FP makes of one slice.

    Parameters
    ----------
    graph
        The second graph, A_imp of equation 5.
    first_graph
        The graph that propagation walked.
    values
        (n_cells, n_shared) float32, propagated counts: observed values and at most `budget` filled in per cell.
    budget
        (n_cells,) int32, how many unknown genes a cell may fill in.
    target_nonzeros
        (n_cells,) int32, non-zero genes that optimal transport assigns to the cell.
    n_iterations, relative_change
        How propagation ended.
    """

    graph: Graph
    first_graph: Graph
    values: np.ndarray
    budget: np.ndarray
    target_nonzeros: np.ndarray
    n_iterations: int
    relative_change: float


def run_slice(
    panel: PanelCounts,
    coordinates: np.ndarray,
    *,
    own_histogram: np.ndarray,
    reference_histogram: np.ndarray,
    bandwidth_um: float,
    settings: PropagationConfig,
    key: int,
) -> PropagatedSlice:
    """Run equations 1 to 4 on one slice, exactly.

    Parameters
    ----------
    panel
        Counts of the slice.
    coordinates
        (n_cells, 2) float32, µm.
    own_histogram, reference_histogram
        (n_shared + 1,) int64, cells by number of non-zero shared genes.
    bandwidth_um
        σ of equation 1.
    settings
        Graph and stopping rule.
    key
        Key of the slice's random stream, which draws the support of over-full cells.
    """

    def graph_of(values: csr_matrix) -> Graph:
        space = _neighbor_space(values, panel, settings)
        neighbors = nearest_neighbors(space, n_neighbors=settings.n_neighbors)
        return build_graph(neighbors, coordinates, bandwidth_um=bandwidth_um, self_loops=settings.self_loops)

    counts = panel.shared_counts
    nonzeros = np.diff(counts.indptr).astype(np.int32)
    targets = target_nonzeros(own_histogram, reference_histogram)
    budget = imputation_budget(nonzeros, targets)
    first = graph_of(counts)
    propagated = propagate(
        first, counts, budget, key=key, max_iterations=settings.max_iterations, tolerance=settings.tolerance
    )
    # nothing filled in: the second graph would be the first again
    second = first if not budget.any() else graph_of(csr_matrix(propagated.values))
    return PropagatedSlice(
        graph=second,
        first_graph=first,
        values=propagated.values,
        budget=budget,
        target_nonzeros=targets[nonzeros].astype(np.int32),
        n_iterations=propagated.n_iterations,
        relative_change=propagated.relative_change,
    )


def _neighbor_space(shared: csr_matrix, panel: PanelCounts, settings: PropagationConfig) -> np.ndarray:
    """Where expression neighbours are searched: (n_cells, d) float32."""
    if settings.graph_space == "counts":
        return np.ascontiguousarray(shared.toarray(), dtype=np.float32)
    return scaled_components(_replace_columns(panel.counts, shared, panel.shared), n_components=settings.n_components)


def _replace_columns(counts: csr_matrix, replacement: csr_matrix, columns: np.ndarray) -> csr_matrix:
    """Counts with the shared genes' columns taken from another matrix; unshared genes help to find neighbours."""
    keep = np.ones(counts.shape[1], dtype=bool)
    keep[columns] = False
    rest = counts.tocoo()
    kept = keep[rest.col]
    other = replacement.tocoo()
    rows = np.concatenate([rest.row[kept], other.row])
    cols = np.concatenate([rest.col[kept], columns[other.col]])
    data = np.concatenate([rest.data[kept], other.data]).astype(np.float32)
    merged = csr_matrix((data, (rows, cols)), shape=counts.shape)
    merged.sort_indices()
    return merged


def compute(
    slice_path: str, reference_path: str, statistics_path: str, panel_path: str, settings: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Task body: read a slice, run LLOKI-FP, return the second graph and the sparsity report."""
    config = PropagationConfig(**settings)
    store = SliceStore(slice_path)
    statistics = read_arrays(statistics_path)
    result = run_slice(
        panel_counts(store, reference_symbols(reference_path)),
        store.coordinates(),
        own_histogram=statistics["histogram"],
        reference_histogram=read_arrays(panel_path, ["histogram"])["histogram"],
        bandwidth_um=float(statistics["bandwidth_um"][0]),
        settings=config,
        key=slice_random_key(store.metadata["slice_id"], config),
    )
    return {
        "indptr": result.graph.indptr,
        "indices": result.graph.indices,
        "weights": result.graph.weights,
        "budget": result.budget,
        "target_nonzeros": result.target_nonzeros,
        "achieved_nonzeros": np.count_nonzero(result.values, axis=1).astype(np.int32),
        "n_iterations": np.array([result.n_iterations], dtype=np.int32),
        "relative_change": np.array([result.relative_change]),
    }


def plan_stage(catalog: Catalog, record: SliceRecord, keys: dict[str, str]) -> list[Task]:
    """One task: LLOKI-FP of the whole slice."""
    key = keys["propagate"]
    return [
        Task(
            name=f"propagate/{record.slice_id}",
            stage="propagate",
            function="lloki_atlas.stages.propagate:compute",
            arguments={
                "slice_path": str(catalog.path("slices", keys["ingest"])),
                "reference_path": str(catalog.path("references", str(catalog.state.reference))),
                "statistics_path": str(catalog.path("statistics", keys["tile"])),
                "panel_path": str(catalog.path("panels", keys["reference"])),
                "settings": to_dict(atlas_config(catalog).propagation),
            },
            output=Output(
                path=str(catalog.path("graphs", key)),
                staging=str(catalog.path("staging", key)),
                lineage={"stage": "propagate", "statistics": keys["tile"]},
                dims=DIMS,
                attributes={"slice_id": record.slice_id},
            ),
            n_cells=record.n_cells,
            projected_memory=_projected_memory(
                SliceStore(catalog.path("slices", keys["ingest"])), atlas_config(catalog).propagation
            ),
            slice_id=record.slice_id,
        )
    ]


def _projected_memory(store: SliceStore, settings: PropagationConfig) -> int:
    """Counts, dense (n_cells, n_shared) values with up to a third filled in, two graphs of at most 2k + 1 a cell."""
    graphs = 2 * store.n_cells * (2 * settings.n_neighbors + 1) * 8 * 2
    # values, and 48 bytes for each of those filled in: no less than the two float32 and the byte of an iteration
    return graphs + task_memory(store, dense_cells=store.n_cells, matrices=5)
