"""The tasks that embed a slice: one a tile, several tiles for a device, or two steps when embeddings are diffused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lloki_atlas.config import AtlasConfig, EmbedderConfig, PropagationConfig, to_dict
from lloki_atlas.engine.outputs import Output
from lloki_atlas.engine.plan import Task
from lloki_atlas.kernels.diffusion import READ_ROWS
from lloki_atlas.models.embedders import EMBEDDING_SIZE
from lloki_atlas.stages import streaming
from lloki_atlas.stages.filling import stream_tasks, tile_tasks, tiled_output
from lloki_atlas.stages.lineage import atlas_config
from lloki_atlas.stages.panels import CELL_BYTES, ENTRY_BYTES, read_entries, streamed_memory
from lloki_atlas.store.catalog import Catalog
from lloki_atlas.store.objects import is_complete
from lloki_atlas.store.records import SliceRecord
from lloki_atlas.store.slices import SliceStore


def plan_stage(
    catalog: Catalog,
    record: SliceRecord,
    keys: dict[str, str],
    *,
    embedder_digest: str,
    device_memory_mb: int | None = None,
    encoding: tuple[dict[str, str], Output] | None = None,
) -> list[Task]:
    """Tasks of one tile, or of several for a device, and one that publishes the slice's embedding.

    Parameters
    ----------
    catalog, record, keys
        The slice and the keys of its stages.
    embedder_digest
        Of the embedder that the catalog was created with.
    device_memory_mb
        Most that may be taken of a GPU, in 2^20 bytes; what the settings say when None.
    encoding
        Of an embedder that uses a device: what the tasks need to encode the tiles as well, and where that goes.
    """
    config = atlas_config(catalog)
    store = SliceStore(catalog.path("slices", keys["ingest"]))
    inputs = {
        "slice": str(catalog.path("slices", keys["ingest"])),
        "reference": str(catalog.path("references", str(catalog.state.reference))),
        "statistics": str(catalog.path("statistics", keys["tile"])),
        "panel": str(catalog.path("panels", keys["reference"])),
        "graph": str(catalog.path("graphs", keys["propagate"])),
    }
    embedder = config.embedder
    if device_memory_mb is not None:
        embedder = replace(embedder, device_memory_mb=device_memory_mb)
    settings = {"settings": to_dict(config.propagation)}
    ready = {"embedder": to_dict(embedder), "embedder_digest": embedder_digest}
    lineage = {"stage": "embed", "graph": keys["propagate"], "panel": keys["reference"], "embedder": embedder_digest}
    output = tiled_output(catalog, record, keys["embed"], array=("X_fp", EMBEDDING_SIZE, "float16"), lineage=lineage)
    if config.propagation.diffuse == "embedding":
        return _plan_embedding_first(catalog, record, output, inputs=inputs, settings=settings, ready=ready)
    fused = {"encoding": encoding[0] if encoding else None} if streaming.uses_device(embedder) else {}
    return _embedder_tasks(
        record,
        output,
        store,
        config,
        embedder,
        functions=("compute", "compute_tiles"),
        arguments={"inputs": inputs, **settings, **ready, **fused},
        also=(encoding[1],) if encoding else (),
    )


def _plan_embedding_first(
    catalog: Catalog,
    record: SliceRecord,
    output: Output,
    *,
    inputs: dict[str, str],
    settings: dict[str, Any],
    ready: dict[str, Any],
) -> list[Task]:
    """Tasks that embed single cells, and tasks that diffuse what those made."""
    if is_complete(output.path):  # embeddings without diffusion are no longer there
        return []
    config, store = atlas_config(catalog), SliceStore(inputs["slice"])
    plain = f"{output.staging}.plain"
    array = ("plain", EMBEDDING_SIZE, "float32")
    first = _embedder_tasks(
        record,
        tiled_output(catalog, record, "", array=array, lineage=dict(output.lineage), path=plain),
        store,
        config,
        EmbedderConfig(**ready["embedder"]),
        functions=("compute_plain", "compute_plain_tiles"),
        arguments={"inputs": inputs, **ready},
        until=output.path,
        step="plain",
    )
    read = READ_ROWS * EMBEDDING_SIZE * 20  # dense embeddings as sparse rows
    second = tile_tasks(
        record,
        output,
        stage="embed",
        function="lloki_atlas.stages.embed:compute_diffused",
        arguments={"inputs": inputs, **settings, "plain": plain},
        memory=lambda cells: streamed_memory(store) + _tile_memory(store, cells, config.propagation) + read,
    )
    return [*first, *second]


def _embedder_tasks(
    record: SliceRecord,
    output: Output,
    store: SliceStore,
    config: AtlasConfig,
    embedder: EmbedderConfig,
    *,
    functions: tuple[str, str],
    arguments: dict[str, Any],
    also: tuple[Output, ...] = (),
    **place: Any,
) -> list[Task]:
    """Tasks of the first function, one tile each, or of the second, several each for a device."""
    model, propagation = streaming.host_memory(embedder), config.propagation
    if not streaming.uses_device(embedder):
        return tile_tasks(
            record,
            output,
            stage="embed",
            function=f"lloki_atlas.stages.embed:{functions[0]}",
            arguments=arguments,
            memory=lambda cells: streamed_memory(store) + _tile_memory(store, cells, propagation) + model,
            **place,
        )
    in_memory = store.n_counts * ENTRY_BYTES <= config.tile.slice_memory_mb * 2**20
    held = store.n_counts if in_memory else read_entries(store.n_cells, store.n_genes, store.n_counts)
    once, each = (held, 0) if in_memory else (0, held)
    tile_bytes = _tile_memory(store, min(store.tile_cells, record.n_cells), propagation) + each * ENTRY_BYTES
    shared = once * ENTRY_BYTES + record.n_cells * CELL_BYTES + 64 * 2**20 + model
    return stream_tasks(
        record,
        output,
        stage="embed",
        function=f"lloki_atlas.stages.embed:{functions[1]}",
        arguments={**arguments, "in_memory": in_memory, "depth": streaming.queue_depth(tile_bytes)},
        memory=lambda n_tiles: shared + streaming.queue_bytes(n_tiles, tile_bytes),
        tiles_per_task=streaming.TILES_PER_TASK,
        also=also,
        **place,
    )


def _tile_memory(store: SliceStore, cells: int, settings: PropagationConfig) -> int:
    """Bytes of one tile between reading and writing: rows, sums, vectors, its part of the graph."""
    sums = cells * max(store.n_genes, EMBEDDING_SIZE) * 12
    edges = cells * (2 * settings.n_neighbors + 1) * 8 * 2 + store.n_cells * 24
    return cells * store.n_genes * 12 + sums + cells * EMBEDDING_SIZE * 12 + edges
