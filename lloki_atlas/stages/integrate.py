"""LLOKI-CAE, frozen: encode every tile of the 512-d embeddings to 128 numbers a cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lloki_atlas.engine.plan import Output, Task
from lloki_atlas.stages.filling import publish_task, tile_tasks, tiled_output
from lloki_atlas.stages.lineage import atlas_config, token_name
from lloki_atlas.stages.streaming import frozen_encoder
from lloki_atlas.store.arrays import read_rows
from lloki_atlas.store.catalog import Catalog
from lloki_atlas.store.records import SliceRecord

if TYPE_CHECKING:
    from lloki_atlas.models.encoder import FrozenEncoder

# torch loads where a task needs it: the driver, `status` and `plan` do without
LATENT_SIZE = 128


def run_tile(embedding: np.ndarray, platform: str, encoder: FrozenEncoder) -> np.ndarray:
    """Encode one tile: (n_cells, 512) float16 → (n_cells, 128) float32; NaN rows stay NaN."""
    return encoder.encode(embedding, platform)


def compute(embedding_path: str, model_path: str, platform: str, start: int, stop: int) -> dict[str, np.ndarray]:
    """Task body: read a tile's 512-d embedding, encode it."""
    rows = read_rows(embedding_path, "X_fp", start, stop)
    return {"X_lloki": run_tile(rows, platform, frozen_encoder(model_path))}


def plan_stage(
    catalog: Catalog,
    record: SliceRecord,
    keys: dict[str, str],
    *,
    model_key: str,
    encoded_by: tuple[str, ...] = (),
) -> list[Task]:
    """One task per tile, and one that publishes; that one alone when the tasks `encoded_by` encode while they embed.

    `model_key` is that of the autoencoder, or of the token of the slice's platform, which brings its autoencoder along.
    """
    output = _output(catalog, record, keys, model_key)
    if encoded_by:
        prefix = f"integrate/{record.slice_id}"
        return [
            publish_task(record, output, stage="integrate", prefix=prefix, requires=encoded_by, n_cells=record.n_cells)
        ]
    return tile_tasks(
        record,
        output,
        stage="integrate",
        function="lloki_atlas.stages.integrate:compute",
        arguments={
            "embedding_path": str(catalog.path("embeddings", keys["embed"])),
            **_encoding(catalog, record, model_key),
        },
        memory=lambda cells: cells * (512 * 4 * 2 + LATENT_SIZE * 8) + 128 * 2**20,
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
