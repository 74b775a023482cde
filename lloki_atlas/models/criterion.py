"""How good a trained encoder is, on cells that it was not trained on: biology kept and platforms mixed.

Biology: of a cell's nearest cells of its own slice among the embeddings, the share that is among as many nearest in
the latent space; with labels, the share of its nearest cells, of whatever slice, that have its label, each label
counting the same. Batch: how many platforms the nearest cells of a cell are of (inverse Simpson index, as in LISI),
between 0, its own alone, and 1, as many as among all cells. Score: 0.6 biology + 0.4 batch, the weights of scib.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lloki_atlas.models.pairs import Index

N_NEIGHBORS = 15
BIOLOGY_WEIGHT = 0.6


def integration_score(
    embeddings: NDArray[np.float32],
    latents: NDArray[np.float32],
    *,
    platform: Index,
    slice_codes: Index,
    labels: Index | None = None,
    n_neighbors: int = N_NEIGHBORS,
) -> dict[str, float]:
    """Score latents of cells beside the embeddings they were made of.

    Parameters
    ----------
    embeddings : (n, 512) float32
    latents : (n, d) float32
    platform, slice_codes : (n,) int64
    labels : (n,) int64, optional
        Cell types, -1 where unknown.
    n_neighbors : int
        Nearest cells (cosine) that are looked at, at most half of a slice's.

    Returns
    -------
    dict
        `biology`, `batch` and `score`, between 0 and 1; `batch` is 0 of one platform.
    """
    before, after = _cosines(embeddings), _cosines(latents)
    if labels is not None and len(np.unique(labels[labels >= 0])) > 1:
        biology = label_agreement(after, labels, n_neighbors)
    else:
        biology = kept_neighbors(before, after, slice_codes, n_neighbors)
    batch = platform_mixing(after, platform, n_neighbors)
    score = BIOLOGY_WEIGHT * biology + (1 - BIOLOGY_WEIGHT) * batch
    return {"biology": biology, "batch": batch, "score": score}


def kept_neighbors(
    before: NDArray[np.float32], after: NDArray[np.float32], slice_codes: Index, n_neighbors: int
) -> float:
    """Share of the nearest cells within the slice that stay among them, from two (n, n) matrices of cosines."""
    kept, asked = 0, 0
    for code in np.unique(slice_codes):
        rows = np.flatnonzero(slice_codes == code)
        k = min(n_neighbors, len(rows) // 2)
        if k < 1:
            continue
        near = _nearest(before[np.ix_(rows, rows)], k), _nearest(after[np.ix_(rows, rows)], k)
        in_both = np.zeros((len(rows), len(rows)), np.int8)
        for part in near:
            np.put_along_axis(in_both, part, np.take_along_axis(in_both, part, axis=1) + 1, axis=1)
        kept += int((in_both == len(near)).sum())
        asked += len(rows) * k
    return kept / asked if asked else 1.0


def label_agreement(cosines: NDArray[np.float32], labels: Index, n_neighbors: int) -> float:
    """Mean over labels of the share of a cell's nearest labelled cells with its label."""
    rows = np.flatnonzero(labels >= 0)
    near = _nearest(cosines[np.ix_(rows, rows)], min(n_neighbors, len(rows) - 1))
    own = labels[rows]
    agreed = (own[near] == own[:, None]).mean(axis=1)
    return float(np.mean([agreed[own == label].mean() for label in np.unique(own)]))


def platform_mixing(cosines: NDArray[np.float32], platform: Index, n_neighbors: int) -> float:
    """Effective number of platforms among the nearest cells, less one, over that among all cells, less one."""
    codes, counts = np.unique(platform, return_counts=True)
    if len(codes) < 2:
        return 0.0
    near = platform[_nearest(cosines, min(n_neighbors, len(platform) - 1))]
    shares = np.stack([(near == code).mean(axis=1) for code in codes], axis=1)
    found = (1 / (shares**2).sum(axis=1)).mean() - 1
    expected = 1 / ((counts / len(platform)) ** 2).sum() - 1
    return float(min(1.0, found / expected))


def _cosines(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosines of all pairs, -2 on the diagonal: (n, n)."""
    values = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))
    directions = torch.nn.functional.normalize(values, dim=1, eps=1e-12)
    cosines: NDArray[np.float32] = (directions @ directions.T).fill_diagonal_(-2).numpy()
    return cosines


def _nearest(cosines: NDArray[np.float32], k: int) -> Index:
    np.fill_diagonal(cosines, -2)
    chosen: Index = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
    return chosen
