"""LLOKI-FP against its dense textbook form, on simulated slices and on two published ones.

Tolerances: 1e-5 absolute on graph weights, propagated and diffused values, of counts divided by the slice's maximum
(the unit in which the method's authors work); budgets equal as integers; neighbour sets equal where similarities
differ by more than 1e-6 from the last one kept. Components: 1e-4 absolute.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from parity import textbook

from lloki_atlas.kernels.bandwidth import sample_bandwidth
from lloki_atlas.kernels.diffusion import diffuse
from lloki_atlas.kernels.graph import build_graph
from lloki_atlas.kernels.hashing import text_key
from lloki_atlas.kernels.neighbors import nearest_neighbors
from lloki_atlas.kernels.propagation import propagate
from lloki_atlas.kernels.scaling import scaled_components
from lloki_atlas.kernels.transport import imputation_budget, sparsity_histogram, target_nonzeros

TOLERANCE = 1e-5
N_NEIGHBORS = 40
KEY = text_key("parity")


def simulated(n_cells: int, n_genes: int, seed: int):
    rng = np.random.default_rng(seed)
    profiles = rng.gamma(0.3, 2.0, size=(5, n_genes))
    kinds = rng.integers(0, 5, n_cells)
    depth = rng.lognormal(-0.5, 0.5, size=(n_cells, 1))
    counts = rng.poisson(profiles[kinds] * depth).astype(np.float32)
    counts[0] = 0
    counts[2] = counts[1]
    return counts, (rng.random((n_cells, 2)) * 500).astype(np.float32)


def published(folder, file: str, *, select=None, n_cells: int | None = None):
    path = folder / file
    if not path.exists():
        pytest.skip(f"{path} is missing")
    import anndata

    adata = anndata.read_h5ad(path)
    if select is not None:
        adata = adata[adata.obs["slice"] == select]
    adata = adata[:n_cells]
    return adata.X.toarray().astype(np.float32), np.asarray(adata.obsm["spatial"], dtype=np.float32)


SLICES = {
    "simulated_small": lambda _: simulated(60, 25, 0),
    "simulated": lambda _: simulated(300, 60, 1),
    "starmap_BZ5": lambda request: published(
        request.getfixturevalue("data_folder"), "starmap_mpfc_wang2018.h5ad", select="starmap_BZ5"
    ),
    "osmfish_part": lambda request: published(
        request.getfixturevalue("data_folder"), "osmfish_ssp_codeluppi2018.h5ad", n_cells=1000
    ),
}


class Run:
    """One slice through the kernels; the textbook form of each step is given the kernels' input to that step."""

    def __init__(self, counts, xy):
        self.dense, self.xy = counts / counts.max(), xy
        self.counts = sp.csr_matrix(self.dense)
        n_genes = counts.shape[1]
        self.space = scaled_components(sp.csr_matrix(counts), n_components=20)
        self.neighbors = nearest_neighbors(self.space, n_neighbors=N_NEIGHBORS)
        self.sigma = sample_bandwidth(xy, n_pairs=1000, key=KEY)
        self.graph = build_graph(self.neighbors, xy, bandwidth_um=self.sigma)
        self.nonzeros = (counts > 0).sum(axis=1)
        rng = np.random.default_rng(3)
        self.reference = rng.binomial(n_genes, rng.uniform(0.3, 0.6, 500))
        targets = target_nonzeros(
            sparsity_histogram(self.nonzeros, n_genes), sparsity_histogram(self.reference, n_genes)
        )
        self.budget = imputation_budget(self.nonzeros, targets)
        self.A = dense_graph(self.graph)
        self.raw = counts


def dense_graph(graph) -> np.ndarray:
    return sp.csr_array((graph.weights, graph.indices, graph.indptr)).toarray().astype(np.float64)


@pytest.fixture(scope="module", params=list(SLICES))
def run(request):
    return Run(*SLICES[request.param](request))


def test_components_equal_those_of_a_full_svd(run):
    k = run.space.shape[1]
    singular = np.linalg.svd(run.space.astype(np.float64), compute_uv=False)
    expected = textbook.scaled_components(run.raw, k)
    # components of nearly equal variance are only defined together
    apart = np.flatnonzero(np.append(-np.diff(singular) > 1e-3 * singular[0], False))
    np.testing.assert_allclose(run.space[:, apart], expected[:, apart], atol=1e-4)
    np.testing.assert_allclose(
        np.linalg.norm(run.space, axis=0), np.linalg.norm(expected, axis=0), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("space", ["scaled", "counts"])
def test_neighbour_sets_equal_the_full_similarity_matrix(run, space):
    rows = run.space if space == "scaled" else run.dense
    found = run.neighbors if space == "scaled" else nearest_neighbors(rows, n_neighbors=N_NEIGHBORS)
    similarity = textbook.cosine_similarity(rows)
    for i, row in enumerate(textbook.nearest(similarity, N_NEIGHBORS)):
        mine = found.indices[i][found.indices[i] >= 0]
        last = similarity[i, row[-1]] if len(row) == N_NEIGHBORS else 0.0
        disputed = np.setxor1d(mine, row).astype(int)
        assert len(mine) == len(row) or last == 0.0
        assert (np.abs(similarity[i, disputed] - last) < 1e-6).all(), f"row {i}"


def test_graph_weights_equal_dense_products(run):
    lists = [row[row >= 0].tolist() for row in run.neighbors.indices]
    expected = textbook.union_graph(lists, run.xy, run.sigma)
    np.testing.assert_array_equal(run.A > 0, expected > 0)
    np.testing.assert_allclose(run.A, expected, atol=TOLERANCE)


def test_budgets_equal_the_quantile_map_exactly(run):
    n_genes = run.dense.shape[1]
    targets = textbook.quantile_targets(run.nonzeros, run.reference, n_genes)
    np.testing.assert_array_equal(run.budget, np.maximum(targets - run.nonzeros, 0))


@pytest.mark.parametrize("max_iterations", [1, 5, 40])
def test_propagated_values_equal_the_textbook(run, max_iterations):
    settings = {"max_iterations": max_iterations, "tolerance": 1e-3}
    mine = propagate(run.graph, run.counts, run.budget, key=KEY, **settings)
    ranks = textbook.hashes(KEY, *run.dense.shape)
    expected, n_iterations = textbook.propagate(run.A, run.dense, run.budget, ranks, **settings)
    np.testing.assert_array_equal(mine.values != 0, expected != 0)
    np.testing.assert_allclose(mine.values, expected, atol=TOLERANCE)
    assert mine.n_iterations == n_iterations


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_diffused_values_equal_the_textbook(run, alpha):
    mine = diffuse(run.graph, run.counts, start=0, stop=run.dense.shape[0], alpha=alpha)
    np.testing.assert_allclose(mine, textbook.diffuse(run.A, run.dense, alpha=alpha), atol=TOLERANCE)


def test_diffusion_over_a_baseline_equals_diffusion_of_the_dense_matrix(run):
    baseline = -np.linspace(0.0, 2.0, run.dense.shape[1])
    mine = diffuse(run.graph, run.counts, start=0, stop=run.dense.shape[0], alpha=0.7, baseline=baseline)
    expected = textbook.diffuse(run.A, run.dense + baseline, alpha=0.7)
    np.testing.assert_allclose(mine, expected, atol=TOLERANCE)


def test_the_whole_stage_equals_the_textbook_from_neighbours_to_diffusion(run):
    """Second graph from the propagated matrix: the same neighbours in, the same diffused rows out."""
    filled = propagate(run.graph, run.counts, run.budget, key=KEY).values
    second = nearest_neighbors(filled, n_neighbors=N_NEIGHBORS)
    graph = build_graph(second, run.xy, bandwidth_um=run.sigma)
    mine = diffuse(graph, run.counts, start=0, stop=run.dense.shape[0])
    lists = [row[row >= 0].tolist() for row in second.indices]
    expected = textbook.diffuse(textbook.union_graph(lists, run.xy, run.sigma), run.dense)
    np.testing.assert_allclose(mine, expected, atol=TOLERANCE)
