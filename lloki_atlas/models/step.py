"""One update of the conditional autoencoder on one chunk of cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from lloki_atlas.config import AutoencoderConfig
from lloki_atlas.kernels.edges import Incidence, incidence
from lloki_atlas.models.autoencoder import ConditionalAutoencoder
from lloki_atlas.models.losses import conservation_loss, pair_loss, reconstruction_scale, squared_error, triplet_loss
from lloki_atlas.models.means import neighborhood_means, neighborhood_weights
from lloki_atlas.models.mutual import Index, MutualNeighbors, mutual_neighbors
from lloki_atlas.models.pairs import chunk_neighbors, distant_cells, find_triplets, in_order, nearest_pairs
from lloki_atlas.models.threads import single_thread
from lloki_atlas.models.workers import Workers, parts

# cells that go through the model at a time: fewer would leave more gradients to add up
MODEL_ROWS = 1000
LOSSES = ("total", "reconstruction", "triplet", "conservation")

Gradients = Sequence[torch.Tensor | None]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Cells that are trained on together.

    `embeddings` (n, 512) float32; the token (`platform`), slice and, where known, label of each cell, (n,) int64;
    -1 is an unknown label.
    """

    embeddings: NDArray[np.float32]
    platform: Index
    slice_codes: Index
    labels: Index | None = None


@dataclass(frozen=True)
class _Fixed:
    """What of a chunk does not change while the model does: whose distances are conserved, who is averaged with whom,
    and, where they are searched among embeddings, mutual neighbours.
    """

    neighbors: torch.Tensor
    distances: torch.Tensor
    ends: Incidence
    means: sparse.csr_array | None
    mutual: list[MutualNeighbors] | None


@dataclass(frozen=True)
class _Part:
    """Some cells on their way through the model; without gradients where only the losses are asked for."""

    latents: torch.Tensor
    squared_error: float
    weights: Gradients = ()
    pull: torch.Tensor | None = None


class TrainingStep:
    """Updates of a model by Adam.

    A chunk goes through the model in parts, whose gradients are added in their order: the bytes do not depend on the
    number of threads. What is known of a chunk for good is kept as long as the chunk: a chunk that is shown again is
    not searched again.

    Parameters
    ----------
    model : ConditionalAutoencoder
        Updated in place.
    config : AutoencoderConfig
    n_threads : int

    Attributes
    ----------
    optimizer : torch.optim.Adam
    """

    def __init__(self, model: ConditionalAutoencoder, config: AutoencoderConfig, *, n_threads: int = 1) -> None:
        self.model = model
        self.config = config
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self._weights = list(model.parameters())
        self._workers = Workers(n_threads)
        self._fixed: WeakKeyDictionary[Chunk, _Fixed] = WeakKeyDictionary()

    def update(self, chunk: Chunk, generator: np.random.Generator) -> dict[str, float]:
        """Update the weights once; returns the losses before it, as `losses` does.

        Parameters
        ----------
        chunk : Chunk
        generator : numpy.random.Generator
            Source of the random negatives.
        """
        return self._run(chunk, generator, update=True)

    def losses(self, chunk: Chunk, generator: np.random.Generator) -> dict[str, float]:
        """Losses as the weights are.

        Parameters
        ----------
        chunk : Chunk
        generator : numpy.random.Generator
            Source of the random negatives.

        Returns
        -------
        dict
            `total`; `reconstruction`, `triplet` and `conservation` before weighting; `n_triplets`.
        """
        return self._run(chunk, generator, update=False)

    def close(self) -> None:
        """End the threads."""
        self._workers.close()

    def __enter__(self) -> TrainingStep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, chunk: Chunk, generator: np.random.Generator, *, update: bool) -> dict[str, float]:
        config, each = self.config, self._workers.each
        embeddings, platform = torch.from_numpy(chunk.embeddings), torch.from_numpy(chunk.platform)
        n, n_dimensions = embeddings.shape
        scale = reconstruction_scale(n, n_dimensions, config.equations)

        def forward(part: slice) -> _Part:
            with torch.set_grad_enabled(update):
                latents = self.model.encode(embeddings[part], platform[part])
                # the decoder's gradients are taken here: nothing later changes them
                leaf = latents.detach().requires_grad_(update)
                error = squared_error(self.model.decode(leaf, platform[part]), embeddings[part])
                if not update:
                    return _Part(latents, error.item())
                slope = torch.tensor(config.reconstruction_weight * scale)
                pull, *weights = torch.autograd.grad(error, [leaf, *self._weights], slope, allow_unused=True)
                return _Part(latents, error.item(), weights, pull)

        def backward(task: tuple[_Part, torch.Tensor]) -> Gradients:
            part, pull = task
            return torch.autograd.grad(part.latents, self._weights, part.pull + pull, allow_unused=True)

        with single_thread():
            fixed = self._find_fixed(chunk, embeddings)
            cells = each(forward, parts(n, MODEL_ROWS))
            latents = torch.cat([part.latents.detach() for part in cells]).requires_grad_(update)
            with torch.set_grad_enabled(update):
                triplet, conservation, n_triplets = self._pair_losses(chunk, latents, fixed, generator)
                pairs = config.triplet_weight * triplet + config.conservation_weight * conservation
            reconstruction = scale * sum(part.squared_error for part in cells)
            if update:
                # without pairs there is nothing to differentiate
                pull = torch.autograd.grad(pairs, latents)[0] if pairs.requires_grad else torch.zeros_like(latents)
                encoder = each(backward, zip(cells, pull.split([len(part.latents) for part in cells]), strict=True))
                self._apply([part.weights for part in cells] + encoder)
        total = config.reconstruction_weight * reconstruction + pairs.item()
        values = (total, reconstruction, triplet.item(), conservation.item())
        return {**dict(zip(LOSSES, values, strict=True)), "n_triplets": n_triplets}

    def _find_fixed(self, chunk: Chunk, embeddings: torch.Tensor) -> _Fixed:
        if chunk not in self._fixed:
            config, each = self.config, self._workers.each
            n_mean, n_near = config.n_neighbors_mean, config.n_neighbors_conservation
            nearest, distances = chunk_neighbors(
                embeddings, groups=chunk.slice_codes, n_neighbors=max(n_mean, n_near), each=each
            )
            if n_mean:
                nearest, distances = in_order(nearest, distances)
            means = neighborhood_weights(nearest[:, :n_mean]) if n_mean else None
            neighbors, distances = nearest[:, :n_near], distances[:, :n_near]
            if config.n_distant:
                # keyed, not drawn from the step's generator: a chunk that is shown again has the same
                draws = np.random.default_rng([config.random_state % 2**63, len(embeddings)])
                distant, far = distant_cells(
                    chunk.embeddings, groups=chunk.slice_codes, n_cells=config.n_distant, generator=draws, each=each
                )
                neighbors, distances = np.hstack([neighbors, distant]), np.hstack([distances, far])
            mutual = self._mutual(_averaged(embeddings, means), chunk) if config.pair_space == "embedding" else None
            ends = incidence(np.arange(len(embeddings)), neighbors, len(embeddings))
            self._fixed[chunk] = _Fixed(torch.from_numpy(neighbors), torch.from_numpy(distances), ends, means, mutual)
        return self._fixed[chunk]

    def _mutual(self, rows: torch.Tensor, chunk: Chunk) -> list[MutualNeighbors]:
        k = self.config.n_neighbors_mutual
        return mutual_neighbors(rows, platform=chunk.platform, n_neighbors=k, each=self._workers.each)

    def _pair_losses(
        self, chunk: Chunk, latents: torch.Tensor, fixed: _Fixed, generator: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        conservation = conservation_loss(
            latents,
            fixed.neighbors,
            fixed.distances,
            equations=self.config.equations,
            ends=fixed.ends,
            each=self._workers.each,
        )
        rows = _averaged(latents, fixed.means)
        mutual = self._mutual(rows.detach(), chunk) if fixed.mutual is None else fixed.mutual
        triplet, n_triplets = self._triplet_loss(chunk, rows, mutual, generator)
        return triplet, conservation, n_triplets

    def _triplet_loss(
        self, chunk: Chunk, rows: torch.Tensor, mutual: list[MutualNeighbors], generator: np.random.Generator
    ) -> tuple[torch.Tensor, int]:
        config, each = self.config, self._workers.each
        if config.negatives == "none":
            both = config.pairing == "symmetric"
            pairs = nearest_pairs(mutual, len(rows), labels=chunk.labels, both=both)
            anchors, positives = (torch.from_numpy(column) for column in pairs)
            return pair_loss(rows, anchors, positives, equations=config.equations, each=each), len(anchors)
        triplets = find_triplets(
            rows.detach(),
            platform=chunk.platform,
            slice_codes=chunk.slice_codes,
            n_neighbors=config.n_neighbors_mutual,
            generator=generator,
            labels=chunk.labels,
            pairing=config.pairing,
            mutual=mutual,
            each=each,
        )
        ends = [torch.from_numpy(column) for column in (triplets.anchors, triplets.positives, triplets.negatives)]
        loss = triplet_loss(rows, *ends, margin=config.margin, equations=config.equations, each=each)
        return loss, len(triplets)

    def _apply(self, gradients: list[Gradients]) -> None:
        """Add the parts' gradients in their order, and update the weights."""
        for weight, total in zip(self._weights, self._workers.each(_sum, zip(*gradients, strict=True)), strict=True):
            weight.grad = total
        self.optimizer.step()


def _sum(gradients: Gradients) -> torch.Tensor | None:
    known = [gradient for gradient in gradients if gradient is not None]
    if len(known) < 2:
        return known[0] if known else None
    total = known[0] + known[1]
    for gradient in known[2:]:
        total += gradient
    return total


def _averaged(rows: torch.Tensor, means: sparse.csr_array | None) -> torch.Tensor:
    return rows if means is None else neighborhood_means(rows, means)
