"""scGPT as an embedder of the engine: one model a process, host and device work apart, the encoder behind it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix

from lloki_atlas.config import EmbedderConfig
from lloki_atlas.errors import CheckpointError
from lloki_atlas.models.checkpoint import read_checkpoint
from lloki_atlas.models.embedders import EMBEDDING_SIZE
from lloki_atlas.models.encoder import FrozenEncoder
from lloki_atlas.models.scgpt import ScGPT, embed_tokens, load_scgpt
from lloki_atlas.models.tokens import TokenRows

_resident: dict[tuple[str, ...], ScGPT] = {}


def resident_model(config: EmbedderConfig) -> ScGPT:
    """Return the model this process holds, or load it; a worker that was started again loads it again.

    Raises
    ------
    InputError
        If the checkpoint or the device is missing.
    CheckpointError
        If the checkpoint does not fit, or embeds in more than 512 dimensions.
    MemoryBudgetError
        If it takes more of the device than is allowed.
    """
    settings = (config.device, config.device_memory_mb, config.precision, config.mode, config.random_state)
    place = (str(config.checkpoint), str(_stamps(config)), str(settings))
    if place not in _resident:
        _resident.clear()  # one model a process: a worker serves one atlas at a time
        checkpoint_digest(config)
        _resident[place] = load_scgpt(
            str(config.checkpoint),
            device=config.device,
            precision=config.precision,
            device_memory_mb=config.device_memory_mb,
            mode=config.mode,
            random_state=config.random_state,
        )
    return _resident[place]


def checkpoint_digest(config: EmbedderConfig) -> str:
    """Return the digest of a checkpoint's content, refused if it could not be used; no device is touched.

    Raises
    ------
    InputError
        If the checkpoint is missing.
    CheckpointError
        If it does not fit, or embeds in more than 512 dimensions.
    """
    return _digest(str(config.checkpoint), _stamps(config))


@lru_cache(maxsize=1)
def _digest(folder: str, stamps: tuple[tuple[str, int, int], ...]) -> str:
    checkpoint = read_checkpoint(folder)
    if checkpoint.settings.embsize > EMBEDDING_SIZE:
        raise CheckpointError(
            f"{folder} embeds in {checkpoint.settings.embsize} dimensions: the store holds at most {EMBEDDING_SIZE}"
        )
    return checkpoint.digest


def _stamps(config: EmbedderConfig) -> tuple[tuple[str, int, int], ...]:
    # size and time of the files: a checkpoint that was replaced under a running worker is read again
    entries = sorted(Path(str(config.checkpoint)).glob("*"))
    return tuple((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries)


class ScGPTEmbedder:
    """A loaded model made ready for one panel."""

    def __init__(self, model: ScGPT, symbols: tuple[str, ...]) -> None:
        self._model = model
        self._symbols = symbols

    def transform(self, counts: csr_matrix, totals: np.ndarray) -> tuple[csr_matrix, np.ndarray]:
        """Counts as they are: scGPT bins the values of a cell by their own quantiles."""
        return counts, np.zeros(counts.shape[1], dtype=np.float32)

    def embed(self, rows: np.ndarray) -> np.ndarray:
        """Embed rows (n_cells, n_genes): (n_cells, 512) float32, zeros past the model's width."""
        return self.finish(self.prepare(rows))

    def prepare(self, rows: np.ndarray) -> TokenRows:
        """The host's part: tokens; any number of threads may call it."""
        return self._model.tokens(rows, self._symbols)

    def finish(self, prepared: TokenRows) -> np.ndarray:
        """The device's part."""
        return self._embedding(prepared).cpu().numpy()

    def finish_encoded(
        self, prepared: TokenRows, encoder: FrozenEncoder, platform: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """The device's part and the encoder behind it.

        The embedding is rounded to float16, as it is stored, before it is encoded; on a GPU it is encoded where it
        is.

        Returns
        -------
        The embedding (n_cells, 512) and the latents (n_cells, 128), float32.
        """
        embedding = self._embedding(prepared)
        stored = embedding.half().float()
        if embedding.device.type == "cpu":
            return embedding.numpy(), encoder.encode(stored.numpy(), platform)
        latents = encoder.encode_tensor(stored, platform)
        return embedding.cpu().numpy(), latents.cpu().numpy()

    def _embedding(self, prepared: TokenRows) -> torch.Tensor:
        values = embed_tokens(self._model, prepared)
        padded = torch.zeros((len(values), EMBEDDING_SIZE), device=values.device)
        padded[:, : values.shape[1]] = values
        padded[values[:, 0].isnan()] = torch.nan
        return padded
