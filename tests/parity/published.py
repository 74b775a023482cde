"""Feature propagation with the published code's choices, put together from the engine's kernels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from lloki_atlas.kernels.bandwidth import cross_bandwidth
from lloki_atlas.kernels.diffusion import diffuse
from lloki_atlas.kernels.graph import Graph, build_graph
from lloki_atlas.kernels.hashing import mix
from lloki_atlas.kernels.neighbors import nearest_neighbors
from lloki_atlas.kernels.propagation import Propagated
from lloki_atlas.kernels.row_propagation import propagate_rows
from lloki_atlas.kernels.transport import assigned_targets


class Assembly(NamedTuple):
    """What the two graphs, the budgets and the denoised rows of one slice came out as."""

    budget: np.ndarray
    first: Graph
    propagated: Propagated
    second: Graph
    denoised: np.ndarray


def max_scaled(values: sp.csr_matrix) -> sp.csr_matrix:
    """Values divided by the largest one, in float32."""
    scaled = values.astype(np.float32)
    scaled.data /= scaled.data.max()
    return scaled


def published_budget(values: sp.csr_matrix, reference_nonzeros: np.ndarray, n_reference_genes: int) -> np.ndarray:
    """(n_cells,) int32, the reference counted over all of its genes."""
    nonzeros = np.diff(values.indptr)
    sizes = {"n_genes": values.shape[1], "n_reference_genes": n_reference_genes}
    targets = assigned_targets(nonzeros, reference_nonzeros, **sizes, cdf="linspace", match="argsort")
    return np.maximum(targets - nonzeros, 0).astype(np.int32)


def expression_graph(rows: np.ndarray, xy: np.ndarray, *, bandwidth_um: float, n_neighbors: int = 40) -> Graph:
    """The graph on the cosine neighbours of dense rows."""
    return build_graph(nearest_neighbors(rows, n_neighbors=n_neighbors), xy, bandwidth_um=bandwidth_um)


def propagate_as_published(
    values: sp.csr_matrix,
    xy: np.ndarray,
    budget: np.ndarray,
    *,
    key: int,
    n_neighbors: int = 40,
    max_iterations: int = 40,
    n_threads: int = 1,
) -> Assembly:
    """First graph, propagation of a support redrawn at every iteration, second graph, diffusion; σ anew per graph."""
    scaled = max_scaled(values)
    sigmas = [cross_bandwidth(xy, key=mix(key, part)) for part in (0, 1)]
    first = expression_graph(scaled.toarray(), xy, bandwidth_um=sigmas[0], n_neighbors=n_neighbors)
    propagated = propagate_rows(
        first,
        scaled,
        budget,
        key=mix(key, 2),
        support="redrawn",
        stopping="absolute",
        max_iterations=max_iterations,
        n_threads=n_threads,
    )
    second = expression_graph(propagated.values, xy, bandwidth_um=sigmas[1], n_neighbors=n_neighbors)
    denoised = diffuse(second, scaled, start=0, stop=second.n_cells, alpha=1.0)
    return Assembly(budget, first, propagated, second, denoised)
