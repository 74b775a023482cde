"""Tiles of a slice streamed through an embedder: read, mix, prepare → embed, encode → write, all at the same time.

The embedder and the frozen encoder live in the worker's process: the first task loads them, a restarted worker loads
them again. A task only says which tiles it wants, so it can be run again, anywhere.

Preparing is host work of any number of threads, finishing is the device's, one call at a time, and whoever asks for
the tiles writes them meanwhile. Tiles in between are bounded by `queue_depth`, which is part of a task's projected
memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lloki_atlas.config import EmbedderConfig
from lloki_atlas.engine.devices import host_threads
from lloki_atlas.engine.overlap import ahead
from lloki_atlas.models.embedders import Embedder, embedder_factory
from lloki_atlas.store.local import local_folder
from lloki_atlas.store.places import place

if TYPE_CHECKING:
    from lloki_atlas.models.encoder import FrozenEncoder

# tiles of one task: enough to keep a device busy while the host prepares the next, few enough to be shared by several
TILES_PER_TASK = 16
# of tiles between reading and writing; two more tiles than the queue is long are in memory at a time
QUEUE_BYTES = 512 * 2**20
MAX_DEPTH = 16
_IN_HAND = 2  # the tile that the device works on, and the next

Prepared = TypeVar("Prepared")
Finished = TypeVar("Finished")

_device = threading.Lock()


def uses_device(config: EmbedderConfig) -> bool:
    """Whether the embedder runs on a device where there is one; False of one that does not say."""
    asked = getattr(embedder_factory(config.name), "uses_device", None)
    return asked is not None and bool(asked(config))


def host_memory(config: EmbedderConfig) -> int:
    """Bytes of a worker that the embedder keeps, at most; 0 of one that does not say."""
    asked = getattr(embedder_factory(config.name), "host_memory", None)
    return 0 if asked is None else int(asked(config))


def queue_depth(tile_bytes: int) -> int:
    """Tiles that may be prepared ahead, when each takes so many bytes."""
    return min(MAX_DEPTH, max(1, QUEUE_BYTES // max(tile_bytes, 1) - _IN_HAND))


def queue_bytes(n_tiles: int, tile_bytes: int) -> int:
    """Most bytes that the tiles of one task take at a time."""
    return min(n_tiles, queue_depth(tile_bytes) + _IN_HAND) * tile_bytes


def stream(
    starts: Iterable[int],
    prepare: Callable[[int], Prepared],
    finish: Callable[[Prepared], Finished],
    *,
    depth: int,
) -> Iterator[Finished]:
    """Prepare tiles on the threads of this process, finish them on its device, in order.

    Parameters
    ----------
    starts
        First rows of the tiles.
    prepare
        Host work on one tile; called from several threads.
    finish
        Device work on what was prepared; called by one thread of the process at a time.
    depth
        Tiles that may be prepared ahead.
    """

    def one_at_a_time(prepared: Prepared) -> Finished:
        with _device:
            return finish(prepared)

    return ahead(ahead(starts, prepare, depth=depth, n_threads=host_threads()), one_at_a_time)


def prepare_rows(embedder: Embedder, rows: np.ndarray) -> Any:
    """Host work on diffused rows (n_cells, n_genes) float32: the embedder's `prepare`, nothing where it has none."""
    prepare = getattr(embedder, "prepare", None)
    return rows if prepare is None else prepare(rows)


def finish_rows(embedder: Embedder, prepared: Any) -> np.ndarray:
    """Embed what `prepare_rows` made: (n_cells, 512) float32."""
    finish = getattr(embedder, "finish", None)
    return embedder.embed(prepared) if finish is None else finish(prepared)


def finish_encoded(
    embedder: Embedder, prepared: Any, encoder: FrozenEncoder, platform: str
) -> tuple[np.ndarray, np.ndarray]:
    """Embed what `prepare_rows` made and encode it as it will be stored.

    Returns
    -------
    (n_cells, 512) float32 embeddings and (n_cells, 128) float32 latents of those embeddings in float16.
    """
    finish = getattr(embedder, "finish_encoded", None)
    if finish is not None:
        return finish(prepared, encoder, platform)
    embedding = finish_rows(embedder, prepared)
    return embedding, encoder.encode(embedding.astype(np.float16).astype(np.float32), platform)


def frozen_encoder(model_path: str) -> FrozenEncoder:
    """Load the encoder of a checkpoint, or take the one that this process already holds.

    The checkpoint is an autoencoder, or the token of a platform with the autoencoder beside it.
    """
    from lloki_atlas.models.autoencoder_files import weight_files

    folder = local_model(model_path)
    # size and time of the files: a checkpoint that was restored under a running worker is read again
    found = [file.stat() if file.exists() else None for file in weight_files(folder)]
    return _encoder(str(folder), tuple((stat.st_size, stat.st_mtime_ns) if stat else (0, 0) for stat in found))


def local_model(model_path: str) -> Path:
    """Return a checkpoint as a local folder; that of a token has the autoencoder beside it."""
    from lloki_atlas.models.autoencoder_files import base_of

    folder = local_folder(model_path)
    base = base_of(folder)
    if base is not None:
        local_folder(place(model_path).parent / base)
    return folder


# slices of several platforms take turns in a worker; an encoder is a few megabytes
@lru_cache(maxsize=8)
def _encoder(model_path: str, stamp: tuple[tuple[int, int], ...]) -> FrozenEncoder:
    from lloki_atlas.models.autoencoder_files import load_encoder

    return load_encoder(model_path)
