"""What turns a diffused cell into 512 numbers: the protocol, the registry, and the closed-form `reference` embedder.

An embedder sees a cell twice: `transform` puts counts on its own input scale *before* diffusion (equation 5 mixes
values on that scale), `embed` turns diffused rows into unit vectors. Both are row by row, so that the embedding of a
cell depends on nothing but the cell, its neighbours and the slice's statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

import numpy as np
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits

from lloki_atlas.config import EmbedderConfig, digest
from lloki_atlas.errors import InputError

EMBEDDING_SIZE = 512
ENTRY_POINT_GROUP = "lloki_atlas.embedders"
BLOCK_ROWS = 256
BLOCK_COLUMNS = 64  # in products with fewer than 12 columns the bits of a row follow from its place in the block
CLIP = 8.0
SD_FLOOR = 1e-3

Arrays = Mapping[str, np.ndarray]


class Embedder(Protocol):
    """One embedder made ready for the shared genes of one slice.

    Implementations are deterministic and row-independent: equal rows give equal bytes at any position of any batch.
    """

    def transform(self, counts: csr_matrix, totals: np.ndarray) -> tuple[csr_matrix, np.ndarray]:
        """Put counts on the embedder's input scale.

        Parameters
        ----------
        counts
            (n_cells, n_genes) CSR float32, genes shared with the reference in canonical order.
        totals
            (n_cells,) float32, counts of the cell over its whole panel.

        Returns
        -------
        The sparse part (n_cells, n_genes) and the baseline (n_genes,): a cell's value is their sum.
        """
        ...

    def embed(self, rows: np.ndarray) -> np.ndarray:
        """Turn diffused rows (n_cells, n_genes) float32 into unit vectors (n_cells, 512) float32."""
        ...


class EmbedderFactory(Protocol):
    """What an entry point of the group `lloki_atlas.embedders` provides.

    One may also have `uses_device(config) -> bool`, whether its embedders want a worker with a GPU, and
    `host_memory(config) -> int`, the bytes that one keeps in a worker. Embedders may split `embed` into
    `prepare(rows)`, on the host and in any thread, and `finish(prepared)`, on the device.
    """

    def fit_panel(self, config: EmbedderConfig, reference: ReferenceFactors) -> dict[str, np.ndarray]:
        """Return the arrays that map one panel; stored once per panel and handed to `open`."""
        ...

    def open(self, config: EmbedderConfig, symbols: tuple[str, ...], panel: Arrays, statistics: Arrays) -> Embedder:
        """Make the embedder ready for one slice."""
        ...

    def digest(self, config: EmbedderConfig) -> str:
        """Return the content digest of everything that decides the embedder's output.

        Asked when a catalog is created, and by every task that embeds; weights that `open` could not use are refused.
        """
        ...


class ReferenceFactors:
    """The scRNA-seq reference as a panel map sees it.

    Parameters
    ----------
    counts
        (n_cells, n_genes) CSR float32 over the shared genes.
    totals
        (n_cells,) float32, counts over the whole transcriptome of the reference.
    factors
        (n_cells, n_factors) float32, principal components of the whole reference.
    target_total
        Library size that counts are scaled to.
    """

    def __init__(self, counts: csr_matrix, totals: np.ndarray, factors: np.ndarray, target_total: float) -> None:
        self.counts = counts
        self.totals = totals
        self.factors = factors
        self.target_total = target_total


class ReferenceEmbedder:
    """Closed-form map from a panel to the principal components of the scRNA-seq reference.

    Counts are library-normalised over the whole panel, log1p, z-scored with the slice's own mean and standard
    deviation and clipped; a ridge regression fitted on the reference, z-scored with *its* own, takes them to the
    reference's components. Slice-wise scaling removes most of a platform's gain and offset before any training.
    """

    def __init__(self, weights: np.ndarray, mean: np.ndarray, sd: np.ndarray, target_total: float) -> None:
        self._weights = np.ascontiguousarray(weights, dtype=np.float32)  # (n_genes, n_factors)
        self._mean = mean.astype(np.float64)
        self._sd = sd.astype(np.float64) + SD_FLOOR
        self._target_total = target_total

    def transform(self, counts: csr_matrix, totals: np.ndarray) -> tuple[csr_matrix, np.ndarray]:
        """z-scored log counts as sparse deviations from the value of an absent gene."""
        baseline = np.clip(-self._mean / self._sd, -CLIP, CLIP)
        values = self._scaled(counts, totals)
        values.data = (values.data - baseline[values.indices]).astype(np.float32)
        return values, baseline.astype(np.float32)

    def _scaled(self, counts: csr_matrix, totals: np.ndarray) -> csr_matrix:
        logs = log_normalized(counts, totals, self._target_total)
        scaled = np.clip((logs.data - self._mean[logs.indices]) / self._sd[logs.indices], -CLIP, CLIP)
        return csr_matrix((scaled, logs.indices, logs.indptr), shape=logs.shape)

    def embed(self, rows: np.ndarray) -> np.ndarray:
        """Project rows on the reference's components and scale each to length 1."""
        latent = blockwise_product(rows, self._weights)
        embedding = np.zeros((rows.shape[0], EMBEDDING_SIZE), dtype=np.float32)
        embedding[:, : latent.shape[1]] = unit_rows(latent)
        return embedding


class ReferenceFactory:
    """Makes `ReferenceEmbedder`s; needs no downloaded weights and takes any panel."""

    def fit_panel(self, config: EmbedderConfig, reference: ReferenceFactors) -> dict[str, np.ndarray]:
        """Ridge regression from the panel's z-scored genes to the reference's components: (Q'Q + λI) W = Q'F."""
        logs = log_normalized(reference.counts, reference.totals, reference.target_total)
        n_cells, n_genes = logs.shape
        mean = np.asarray(logs.sum(axis=0)).ravel() / n_cells
        squares = np.asarray(logs.multiply(logs).sum(axis=0)).ravel() / n_cells
        sd = np.sqrt(np.maximum(squares - mean**2, 0.0)) + SD_FLOOR
        gram = np.zeros((n_genes, n_genes))
        cross = np.zeros((n_genes, reference.factors.shape[1]))
        with threadpool_limits(1):
            for start in range(0, n_cells, 1024):
                block = np.clip((logs[start : start + 1024].toarray() - mean) / sd, -CLIP, CLIP)
                gram += block.T @ block
                cross += block.T @ reference.factors[start : start + 1024].astype(np.float64)
            weights = np.linalg.solve(gram + config.ridge * np.eye(n_genes), cross)
        return {"weights": weights.astype(np.float32)}

    def open(self, config: EmbedderConfig, symbols: tuple[str, ...], panel: Arrays, statistics: Arrays) -> Embedder:
        """Join the panel's map with the slice's own moments."""
        return ReferenceEmbedder(
            panel["weights"], statistics["mean"], statistics["sd"], float(statistics["target_total"][0])
        )

    def digest(self, config: EmbedderConfig) -> str:
        """Digest of the settings; the reference itself has its own key."""
        return digest({"name": "reference", "n_factors": config.n_factors, "ridge": config.ridge, "version": 1})


class ScGPTFactory:
    """Makes scGPT embedders from an official checkpoint folder; the model is loaded once per process."""

    def fit_panel(self, config: EmbedderConfig, reference: ReferenceFactors) -> dict[str, np.ndarray]:
        """ScGPT reads gene names; there is nothing to fit."""
        return {}

    def open(self, config: EmbedderConfig, symbols: tuple[str, ...], panel: Arrays, statistics: Arrays) -> Embedder:
        """Load the checkpoint, or take the one this process already holds."""
        from lloki_atlas.models.streaming import ScGPTEmbedder, resident_model

        return ScGPTEmbedder(resident_model(config), symbols)

    def digest(self, config: EmbedderConfig) -> str:
        """Digest of the checkpoint's content, wherever it lies, and of the settings that decide its output."""
        from lloki_atlas.models.streaming import checkpoint_digest

        content = {"checkpoint": checkpoint_digest(config), "precision": config.precision, "mode": config.mode}
        if config.mode == "reference":
            content["random_state"] = str(config.random_state)
        return digest({"name": "scgpt", **content, "version": 2})

    def uses_device(self, config: EmbedderConfig) -> bool:
        """Whether a worker with a GPU should have the work."""
        return config.device != "cpu"

    def host_memory(self, config: EmbedderConfig) -> int:
        """Bytes of host memory at the peak: loading a checkpoint holds its file, its state and both tables."""
        weights = Path(str(config.checkpoint)) / "best_model.pt"
        # a plan needs no checkpoint: whoever embeds says what is missing
        return 4 * weights.stat().st_size + 128 * 2**20 if weights.exists() else 0


_BUILT_IN: dict[str, Callable[[], EmbedderFactory]] = {"reference": ReferenceFactory, "scgpt": ScGPTFactory}


def embedder_factory(name: str) -> EmbedderFactory:
    """Find an embedder by name: built in, or an entry point of the group `lloki_atlas.embedders`.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]()
    plugins = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name in plugins:
        return plugins[name].load()()
    known = ", ".join(sorted([*_BUILT_IN, *plugins]))
    raise InputError(f"there is no embedder '{name}': choose from {known}, or install one that offers it")


def log_normalized(counts: csr_matrix, totals: np.ndarray, target_total: float) -> csr_matrix:
    """log1p of counts scaled to `target_total` a cell: (n_cells, n_genes) CSR float64, same pattern."""
    scale = target_total / np.maximum(totals.astype(np.float64), 1e-12)
    per_entry = np.repeat(scale, np.diff(counts.indptr))
    data = np.log1p(counts.data.astype(np.float64) * per_entry)
    return csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape)


def blockwise_product(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`rows @ weights` in blocks of one fixed shape on one thread, so that a row's result depends on that row alone."""
    import torch

    from lloki_atlas.models.threads import single_thread

    n_rows, (n_genes, n_columns) = rows.shape[0], weights.shape
    out = np.empty((n_rows, n_columns), dtype=np.float32)
    block = np.zeros((BLOCK_ROWS, n_genes), dtype=np.float32)
    right = torch.zeros((n_genes, -(-n_columns // BLOCK_COLUMNS) * BLOCK_COLUMNS))
    right[:, :n_columns] = torch.from_numpy(weights)
    with single_thread():
        for start in range(0, n_rows, BLOCK_ROWS):
            part = rows[start : start + BLOCK_ROWS]
            block[: len(part)] = part
            block[len(part) :] = 0.0
            out[start : start + len(part)] = (torch.from_numpy(block) @ right).numpy()[: len(part), :n_columns]
    return out


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Scale every row to length 1; rows of zeros stay zero."""
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    return (rows / np.maximum(lengths, 1e-12)[:, None]).astype(np.float32)
