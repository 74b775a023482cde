"""LLOKI-CAE, frozen: encode every tile of the 512-d embeddings to 128 numbers a cell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lloki_atlas.engine.outputs import Output
from lloki_atlas.engine.overlap import ahead
from lloki_atlas.engine.plan import Task
from lloki_atlas.stages.filling import publish_task, stream_tasks, tile_cells, tiled_output
from lloki_atlas.stages.lineage import atlas_config, token_name
from lloki_atlas.stages.streaming import TILES_PER_TASK, frozen_encoder
from lloki_atlas.store.arrays import open_rows
from lloki_atlas.store.catalog import Catalog
from lloki_atlas.store.records import SliceRecord

if TYPE_CHECKING:
    from lloki_atlas.models.encoder import FrozenEncoder

# torch loads where a task needs it: the driver, `status` and `plan` do without
LATENT_SIZE = 128


def run_tile(embedding: np.ndarray, platform: str, encoder: FrozenEncoder) -> np.ndarray:
    """Encode one tile: (n_cells, 512) float16 → (n_cells, 128) float32; NaN rows stay NaN."""
    return encoder.encode(embedding, platform)


def compute_tiles(
    embedding_path: str, model_path: str, platform: str, starts: list[int], tile_cells: int, n_cells: int
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Task body: read tiles of 512-d embeddings and encode them, the next while one is written."""
    encoder, embedding = frozen_encoder(model_path), open_rows(embedding_path, "X_fp")

    def read(start: int) -> tuple[int, np.ndarray]:
        return start, embedding.read(start, min(start + tile_cells, n_cells))

    def encode(tile: tuple[int, np.ndarray]) -> tuple[int, dict[str, np.ndarray]]:
        start, rows = tile
        return start, {"X_lloki": run_tile(rows, platform, encoder)}

    return ahead(ahead(starts, read), encode)


def plan_stage(
    catalog: Catalog,
    record: SliceRecord,
    keys: dict[str, str],
    *,
    model_key: str,
    encoded_by: tuple[str, ...] = (),
) -> list[Task]:
    """Tasks of several tiles, and one that publishes; that alone when the tasks `encoded_by` encode while they embed.

    `model_key` is that of the autoencoder, or of the token of the slice's platform, which brings its autoencoder along.
    """
    output = _output(catalog, record, keys, model_key)
    if encoded_by:
        prefix = f"integrate/{record.slice_id}"
        return [
            publish_task(record, output, stage="integrate", prefix=prefix, requires=encoded_by, n_cells=record.n_cells)
        ]
    size = min(tile_cells(catalog, record), record.n_cells)
    return stream_tasks(
        record,
        output,
        stage="integrate",
        function="lloki_atlas.stages.integrate:compute_tiles",
        arguments={
            "embedding_path": str(catalog.path("embeddings", keys["embed"])),
            "tile_cells": size,
            "n_cells": record.n_cells,
            **_encoding(catalog, record, model_key),
        },
        # tiles that are read or encoded ahead, and the one that is written
        memory=lambda n_tiles: min(n_tiles, 5) * size * (512 * 2 + LATENT_SIZE * 8) + 128 * 2**20,
        tiles_per_task=TILES_PER_TASK,
        device=False,
    )


def plan_encoding(
    catalog: Catalog, record: SliceRecord, keys: dict[str, str], *, model_key: str
) -> tuple[dict[str, str], Output]:
    """What a task that embeds needs to encode its tiles as well, and where they go."""
    return _encoding(catalog, record, model_key), _output(catalog, record, keys, model_key)


def _encoding(catalog: Catalog, record: SliceRecord, model_key: str) -> dict[str, str]:
    name = token_name(record, atlas_config(catalog).autoencoder.token_by)
    return {"model_path": str(catalog.path("models", model_key)), "platform": name}


def _output(catalog: Catalog, record: SliceRecord, keys: dict[str, str], model_key: str) -> Output:
    return tiled_output(
        catalog,
        record,
        keys["integrate"],
        array=("X_lloki", LATENT_SIZE, "float32"),
        lineage={"stage": "integrate", "embedding": keys["embed"], "model": model_key},
    )
