"""The equations of the method written down plainly: dense float64 numpy, whole matrices, one cell at a time.

Nothing here is fast and nothing is shared with the package, save that random choices are given as an array of
hashes, so that both sides keep the same entries.
"""

from __future__ import annotations

import numpy as np

WORD = (1 << 64) - 1


def splitmix(*words: int) -> int:
    """Chain of splitmix64 steps over words, in Python integers."""
    state = 0
    for word in words:
        z = ((state ^ (word & WORD)) + 0x9E3779B97F4A7C15) & WORD
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
        state = z ^ (z >> 31)
    return state


def hashes(key: int, n_cells: int, n_genes: int) -> np.ndarray:
    """The (n_cells, n_genes) uint64 hashes that rank a cell's unknown genes."""
    values = [[splitmix(key, i, g) for g in range(n_genes)] for i in range(n_cells)]
    return np.array(values, dtype=np.uint64).reshape(n_cells, n_genes)


def cosine_similarity(rows: np.ndarray) -> np.ndarray:
    """The full n × n matrix, −inf on the diagonal and for rows without a direction."""
    rows = rows.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    unit = rows / np.where(norms > 0, norms, 1.0)[:, None]
    similarity = unit @ unit.T
    empty = norms == 0
    similarity[empty, :] = similarity[:, empty] = -np.inf
    np.fill_diagonal(similarity, -np.inf)
    return similarity


def nearest(similarity: np.ndarray, k: int) -> list[list[int]]:
    """Per row the k largest positive similarities, equal ones by smaller index."""
    lists = []
    for row in similarity:
        order = np.lexsort((np.arange(row.size), -row))
        lists.append([int(j) for j in order[:k] if row[j] > 0])
    return lists


def union_graph(lists: list[list[int]], xy: np.ndarray, sigma: float, *, self_loops: bool = True) -> np.ndarray:
    """Dense D^-1/2 W D^-1/2 of the union of neighbour lists with Gaussian weights on distance in space."""
    n = len(lists)
    xy = xy.astype(np.float64)
    joined = np.zeros((n, n), dtype=bool)
    for i, row in enumerate(lists):
        joined[i, row] = True
    joined |= joined.T
    np.fill_diagonal(joined, self_loops)
    squared = ((xy[:, None, :] - xy[None, :, :]) ** 2).sum(axis=2)
    weights = np.where(joined, np.exp(-squared / (2 * sigma**2)) if sigma > 0 else 1.0, 0.0)
    degree = weights.sum(axis=1)
    inverse_root = np.diag(np.where(degree > 0, 1.0 / np.sqrt(np.where(degree > 0, degree, 1.0)), 0.0))
    return inverse_root @ weights @ inverse_root


def quantile_targets(nonzeros: np.ndarray, reference_nonzeros: np.ndarray, n_genes: int) -> np.ndarray:
    """Target number of non-zero genes per cell: F_ref^-1(F(s)), F by mid-ranks (doubled ranks, so integers)."""
    sparsity, reference = n_genes - nonzeros.astype(int), np.sort(n_genes - reference_nonzeros.astype(int))
    n, m = sparsity.size, reference.size
    targets = np.empty(n, dtype=int)
    for i, s in enumerate(sparsity):
        doubled_rank = 2 * int((sparsity < s).sum()) + int((sparsity == s).sum())
        for reached, value in enumerate(reference, start=1):
            if 2 * reached * n >= doubled_rank * m:
                targets[i] = n_genes - value
                break
    return targets


def propagate(
    A: np.ndarray, X0: np.ndarray, budget: np.ndarray, ranks: np.ndarray, *, max_iterations: int, tolerance: float
) -> tuple[np.ndarray, int]:
    """X ← (1 − M)∘(A X) + M∘X0; a cell's support is drawn when it first exceeds its budget, then kept."""
    observed = X0 != 0
    support: list[np.ndarray | None] = [None] * X0.shape[0]
    X = X0.astype(np.float64)
    n_iterations, relative = 0, np.inf
    while n_iterations < max_iterations and relative >= tolerance:
        n_iterations += 1
        Y = np.where(observed, X0, A @ X)
        for i in range(X.shape[0]):
            filled = np.flatnonzero(~observed[i] & (Y[i] != 0))
            if support[i] is None and filled.size > budget[i]:
                support[i] = filled[np.argsort(ranks[i, filled])[: budget[i]]]
            if support[i] is not None:
                closed = ~observed[i]
                closed[support[i]] = False
                Y[i, closed] = 0.0
        change, size = np.linalg.norm((Y - X)[~observed]), np.linalg.norm(Y[~observed])
        relative = change / size if size > 0 else 0.0
        X = Y
    return X, n_iterations


def diffuse(A: np.ndarray, V: np.ndarray, *, alpha: float = 1.0) -> np.ndarray:
    """α A V + (1 − α) V."""
    return alpha * (A @ V.astype(np.float64)) + (1 - alpha) * V


def scaled_components(
    X: np.ndarray, k: int, *, target_total: float = 100.0, clip: float = 5.0, smallest_total: float = 0.0
) -> np.ndarray:
    """Principal components of clipped z-scores of log counts by a full SVD, largest loading positive."""
    X = X.astype(np.float64)
    totals = np.maximum(X.sum(axis=1, keepdims=True), smallest_total)
    logged = np.log1p(np.divide(X * target_total, totals, out=np.zeros_like(X), where=totals > 0))
    z = np.clip((logged - logged.mean(axis=0)) / (logged.std(axis=0) + 0.001), -clip, clip)
    centered = z - z.mean(axis=0)
    _, _, rows = np.linalg.svd(centered, full_matrices=False)
    loadings = rows[:k].T
    signs = np.sign(loadings[np.abs(loadings).argmax(axis=0), np.arange(loadings.shape[1])])
    return centered @ (loadings * signs)
