"""The encoder of a trained autoencoder, frozen for use."""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from lloki_atlas.errors import InputError
from lloki_atlas.models.autoencoder import N_EMBEDDING, N_LATENT, ConditionalAutoencoder
from lloki_atlas.models.threads import single_thread

# rows of a product have to be many and always equally many for its bits not to depend on the batch
BLOCK_ROWS = 256


class FrozenEncoder:
    """The encoder of a trained model, for use only; the model given is copied.

    Parameters
    ----------
    model : ConditionalAutoencoder
    """

    def __init__(self, model: ConditionalAutoencoder) -> None:
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        self.platforms: tuple[str, ...] = self._model.platforms
        self._elsewhere: dict[torch.device, ConditionalAutoencoder] = {}

    def encode_tensor(self, embeddings: torch.Tensor, platform: str | int) -> torch.Tensor:
        """Latents of cells whose embeddings are on a device, computed there; equal to `encode` within rounding.

        Parameters
        ----------
        embeddings : (n, 512) float32
            On any device; rows that are not finite give NaN.
        platform : str or int
            As for `encode`.

        Returns
        -------
        (n, 128) float32, on the same device

        Raises
        ------
        InputError
            If the platform is not among those of the model.
        """
        code = torch.full((len(embeddings),), self._code(platform), device=embeddings.device)
        if embeddings.device not in self._elsewhere:
            self._elsewhere[embeddings.device] = copy.deepcopy(self._model).to(embeddings.device)
        with torch.no_grad():
            finite = embeddings.isfinite().all(dim=1, keepdim=True)
            latents = self._elsewhere[embeddings.device].encode(embeddings.where(finite, 0.0), code)
            return latents.where(finite, torch.nan)

    def encode(self, embeddings: ArrayLike, platform: str | int) -> NDArray[np.float32]:
        """Latents of the cells of one platform.

        The bytes of a cell's row depend on its embedding and platform alone: cells pass in blocks of 256 rows, the
        last one filled up with zeros, on one thread.

        Parameters
        ----------
        embeddings : (n, 512) float
        platform : str or int
            "technology|panel", or its number.

        Returns
        -------
        (n, 128) float32
            NaN in the rows of cells whose embedding is not finite.

        Raises
        ------
        InputError
            If the platform is not among those of the model, or rows are not 512 long.
        """
        values = np.asarray(embeddings, dtype=np.float32)
        if values.ndim != 2 or values.shape[1] != N_EMBEDDING:
            raise InputError(f"embeddings are of shape {values.shape}: give (n_cells, {N_EMBEDDING})")
        code = torch.full((BLOCK_ROWS,), self._code(platform))
        latents = np.empty((len(values), N_LATENT), np.float32)
        block = np.zeros((BLOCK_ROWS, N_EMBEDDING), np.float32)
        with single_thread(), torch.no_grad():
            for start in range(0, len(values), BLOCK_ROWS):
                rows = values[start : start + BLOCK_ROWS]
                finite = np.all(np.isfinite(rows), axis=1, keepdims=True)
                block[: len(rows)] = np.where(finite, rows, np.float32(0))
                block[len(rows) :] = 0
                found = self._model.encode(torch.from_numpy(block), code).numpy()[: len(rows)]
                latents[start : start + len(rows)] = np.where(finite, found, np.float32(np.nan))
        return latents

    def _code(self, platform: str | int) -> int:
        if isinstance(platform, str):
            if platform in self.platforms:
                return self.platforms.index(platform)
        elif 0 <= platform < len(self.platforms):
            return int(platform)
        raise InputError(
            f"this encoder has no platform {platform!r}, it knows {', '.join(self.platforms)}: "
            "to add one, train the autoencoder on a sample that holds cells of it"
        )
