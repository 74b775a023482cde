"""Cells of a new platform beside cells of the atlas: which are drawn together, and which of them are pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from lloki_atlas.config import AutoencoderConfig
from lloki_atlas.models.autoencoder import ConditionalAutoencoder
from lloki_atlas.models.encoder import FrozenEncoder
from lloki_atlas.models.means import neighborhood_means, neighborhood_weights
from lloki_atlas.models.mutual import Index, MutualNeighbors, mutual_neighbors
from lloki_atlas.models.pairs import MIN_PLATFORM_CELLS, chunk_neighbors, distant_cells, in_order, nearest_pairs
from lloki_atlas.models.step import Chunk


class Anchored(NamedTuple):
    """Cells of the atlas and their latents (n, 128), which never change."""

    cells: Chunk
    latents: torch.Tensor


@dataclass(frozen=True, eq=False)
class Drawn:
    """Cells that are used together, and what of them does not depend on the token.

    `cells` are new ones; `conserved` (n, k) are the cells to which they keep their `distances`, -1 where there is none;
    `own_means` and `atlas_means` say who is averaged with whom, None where nobody is; `fixed_pairs` are the pairs where
    they are searched among embeddings.
    """

    cells: Chunk
    atlas: Anchored
    conserved: Index
    distances: NDArray[np.float32]
    own_means: sparse.csr_array | None
    atlas_means: sparse.csr_array | None
    fixed_pairs: tuple[Index, Index] | None = None

    def pairs(self, latents: torch.Tensor, config: AutoencoderConfig) -> tuple[Index, Index]:
        """As `find_pairs`, which is not asked again for what does not change."""
        return self.fixed_pairs or find_pairs(latents, self, config)


def anchored(model: ConditionalAutoencoder, atlas: Chunk) -> Anchored:
    """Encode cells of the platforms that a model knows.

    Parameters
    ----------
    model : ConditionalAutoencoder
    atlas : Chunk
        At least one cell.
    """
    encoder = FrozenEncoder(model)
    groups = [np.flatnonzero(atlas.platform == code) for code in np.unique(atlas.platform)]
    found = np.concatenate([encoder.encode(atlas.embeddings[rows], int(atlas.platform[rows[0]])) for rows in groups])
    latents = np.empty_like(found)
    latents[np.concatenate(groups)] = found
    return Anchored(atlas, torch.from_numpy(latents))


def choose(cells: Chunk, rows: Index) -> Chunk:
    """Cells of a chunk, in the order of `rows`."""
    return replace(
        cells,
        embeddings=np.ascontiguousarray(cells.embeddings[rows], dtype=np.float32),
        platform=cells.platform[rows],
        slice_codes=cells.slice_codes[rows],
        labels=None if cells.labels is None else cells.labels[rows],
    )


def draw(cells: Chunk, atlas: Anchored, config: AutoencoderConfig, generator: np.random.Generator) -> Drawn:
    """Draw a chunk in which the new platform and each of the atlas have equally many cells, as far as there are.

    Parameters
    ----------
    cells : Chunk
        Of the new platform.
    atlas : Anchored
    config : AutoencoderConfig
        Its `chunk_cells` are drawn in all, and at least 50 of each platform.
    generator : numpy.random.Generator
    """
    groups = [np.flatnonzero(atlas.cells.platform == code) for code in np.unique(atlas.cells.platform)]
    share = max(MIN_PLATFORM_CELLS, config.chunk_cells // (len(groups) + 1))
    drawn = choose(cells, generator.permutation(len(cells.embeddings))[:share])
    rows = np.concatenate([generator.permutation(group)[:share] for group in groups])
    known = Anchored(choose(atlas.cells, rows), atlas.latents[torch.from_numpy(rows)])
    n_mean, n_near = config.n_neighbors_mean, config.n_neighbors_conservation
    neighbors, distances = _neighbors(drawn, max(n_mean, n_near))
    conserved, kept = neighbors[:, :n_near], distances[:, :n_near]
    if config.n_distant:
        distant, far = distant_cells(
            drawn.embeddings, groups=drawn.slice_codes, n_cells=config.n_distant, generator=generator
        )
        conserved, kept = np.hstack([conserved, distant]), np.hstack([kept, far])
    own_means = neighborhood_weights(neighbors[:, :n_mean]) if n_mean else None
    atlas_means = neighborhood_weights(_neighbors(known.cells, n_mean)[0]) if n_mean else None
    found = Drawn(drawn, known, conserved, kept, own_means, atlas_means)
    if config.pair_space == "latent":
        return found
    return replace(found, fixed_pairs=find_pairs(torch.empty(0), found, config))


def pair_latents(latents: torch.Tensor, drawn: Drawn) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents between which pairs are pulled, of new cells and of those of the atlas; the gradient goes to `latents`.

    Parameters
    ----------
    latents : (n, 128) float32
        Of the new cells.
    drawn : Drawn
    """
    return _averaged(latents, drawn.own_means), _averaged(drawn.atlas.latents, drawn.atlas_means)


def pair_rows(latents: torch.Tensor, drawn: Drawn, space: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of new cells and of those of the atlas in the space in which pairs are searched.

    Parameters
    ----------
    latents : (n, 128) float32
        Of the new cells; not looked at where the space is that of the embedding.
    drawn : Drawn
    space : {"latent", "embedding"}
    """
    if space == "latent":
        return pair_latents(latents, drawn)
    own, others = (torch.from_numpy(part.embeddings) for part in (drawn.cells, drawn.atlas.cells))
    return _averaged(own, drawn.own_means), _averaged(others, drawn.atlas_means)


def find_pairs(latents: torch.Tensor, drawn: Drawn, config: AutoencoderConfig) -> tuple[Index, Index]:
    """Find the nearest mutual neighbour of each new cell in each platform of the atlas.

    Parameters
    ----------
    latents : (n, 128) float32
        Of the new cells.
    drawn : Drawn
    config : AutoencoderConfig
        With labels on both sides, neighbours of another label are none.

    Returns
    -------
    anchors, positives : (m,) int64
        Rows of the new cells, rows of those of the atlas.
    """
    new, old = pair_rows(latents, drawn, config.pair_space)
    known, n, mutual = drawn.atlas.cells, len(new), []
    for code in np.unique(known.platform):
        members = np.flatnonzero(known.platform == code)
        both, sides = torch.cat([new, old[torch.from_numpy(members)]]), np.repeat([0, 1], [n, len(members)])
        for left, right, cosines in mutual_neighbors(both, platform=sides, n_neighbors=config.n_neighbors_mutual):
            mutual.append(MutualNeighbors(left, n + members[right - n], cosines))
    labels = None
    if drawn.cells.labels is not None and known.labels is not None:
        labels = np.concatenate([drawn.cells.labels, known.labels])
    anchors, positives = nearest_pairs(mutual, n + len(old), labels=labels, both=False)
    return anchors, positives - n


def _neighbors(cells: Chunk, k: int) -> tuple[Index, NDArray[np.float32]]:
    """Nearest cells of each in its slice, from the nearest on."""
    found = chunk_neighbors(torch.from_numpy(cells.embeddings), groups=cells.slice_codes, n_neighbors=k)
    return in_order(*found)


def _averaged(rows: torch.Tensor, means: sparse.csr_array | None) -> torch.Tensor:
    return rows if means is None else neighborhood_means(rows, means)
