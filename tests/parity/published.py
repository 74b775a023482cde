"""LLOKI-FP in `reference` mode on plain arrays, to be laid beside the published code."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from lloki_atlas.config import PropagationConfig
from lloki_atlas.kernels.diffusion import diffuse
from lloki_atlas.kernels.graph import Graph, build_graph
from lloki_atlas.kernels.neighbors import nearest_neighbors
from lloki_atlas.kernels.transport import sparsity_histogram
from lloki_atlas.stages.panels import select_panel
from lloki_atlas.stages.propagate import run_slice


class Run(NamedTuple):
    """What the budgets, the second graph and the denoised rows of one slice came out as."""

    budget: np.ndarray
    n_iterations: int
    second: Graph
    denoised: np.ndarray


def max_scaled(values: sp.csr_matrix) -> sp.csr_matrix:
    """Values divided by the largest one, in float32."""
    scaled = values.astype(np.float32)
    scaled.data /= scaled.data.max()
    return scaled


def expression_graph(rows: np.ndarray, xy: np.ndarray, *, bandwidth_um: float, n_neighbors: int = 40) -> Graph:
    """The graph on the cosine neighbours of dense rows."""
    return build_graph(nearest_neighbors(rows, n_neighbors=n_neighbors), xy, bandwidth_um=bandwidth_um)


def run_reference_mode(values: sp.csr_matrix, xy: np.ndarray, reference: np.ndarray, *, key: int) -> Run:
    """Run a slice whose genes are the first ones of the reference (cells, genes)."""
    n_genes = values.shape[1]
    genes = [f"gene{gene:04d}" for gene in range(n_genes)]
    panel = select_panel(values.astype(np.float32), genes, ["exact"] * n_genes, tuple(genes))
    found = run_slice(
        panel,
        xy,
        own_histogram=sparsity_histogram(np.diff(values.indptr), n_genes),
        reference_histogram=sparsity_histogram((reference[:, :n_genes] != 0).sum(axis=1), n_genes),
        reference_histogram_all=sparsity_histogram((reference != 0).sum(axis=1), reference.shape[1]),
        bandwidth_um=np.nan,  # drawn anew for each graph
        settings=PropagationConfig(mode="reference"),
        key=key,
    )
    denoised = diffuse(found.graph, max_scaled(values), start=0, stop=found.graph.n_cells, alpha=1.0)
    return Run(found.filled.budget, found.filled.n_iterations, found.graph, denoised)
