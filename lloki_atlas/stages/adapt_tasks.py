"""Adapt LLOKI-CAE to a platform that it does not know: one task of the plan, which trains the platform's token."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from lloki_atlas.config import AutoencoderConfig, to_dict
from lloki_atlas.engine.outputs import Output
from lloki_atlas.engine.plan import Task
from lloki_atlas.stages.adapt_cells import N_EMBEDDING, read_sample
from lloki_atlas.stages.lineage import atlas_config, token_name
from lloki_atlas.stages.streaming import local_model
from lloki_atlas.stages.train_labels import label_codes
from lloki_atlas.store.catalog import Catalog
from lloki_atlas.store.records import SliceRecord
from lloki_atlas.store.slices import SliceStore

# models.autoencoder_files writes it; torch loads where a task needs it, the driver, `status` and `plan` do without
TOKEN_DESCRIPTION_FILE = "token.json"
# cells of the atlas that new ones are compared with, in all
ATLAS_CELLS = 50_000


def adapt(
    folder: str,
    model_path: str,
    platform: str,
    samples: list[dict[str, Any]],
    atlas: list[dict[str, Any]],
    settings: dict[str, Any],
    label_key: str | None,
    random_state: int,
) -> None:
    """Task body: train a token on samples of stored embeddings, write it into `folder`.

    Parameters
    ----------
    folder
        Filled with the token.
    model_path
        Checkpoint of the autoencoder.
    platform
        Name of the token.
    samples, atlas
        For each slice of the platform, and of those of the autoencoder, `slice_id`, `token`, `n_cells`,
        `embedding_key`, `embedding_path` and `slice_path`.
    settings
        Of the `AutoencoderConfig` of the autoencoder.
    label_key
        Column of cell types that the autoencoder was trained with, or None.
    random_state
        Seed.

    Raises
    ------
    InputError
        If the platform has too few cells, or shares no structure with the atlas.
    CheckpointError
        If the autoencoder cannot be read.
    """
    from lloki_atlas.models.adaptation import adapt_token
    from lloki_atlas.models.autoencoder_files import load_model, load_settings, save_token

    # a search may have chosen another weight than the atlas asked for
    model_folder = local_model(model_path)
    weight = load_settings(model_folder).conservation_weight
    config = dataclasses.replace(AutoencoderConfig(**settings), conservation_weight=weight)
    model = load_model(model_folder)
    labels = None
    if label_key is not None:
        labels, _ = label_codes([SliceStore(part["slice_path"]) for part in [*samples, *atlas]], label_key)
    cells = read_sample(
        samples,
        [platform],
        size=config.max_cells_per_technology,
        random_state=random_state,
        labels=None if labels is None else labels[: len(samples)],
    )
    known = read_sample(
        atlas,
        model.platforms,
        size=_cells_of_each(len(model.platforms), config),
        random_state=random_state,
        labels=None if labels is None else labels[len(samples) :],
    )
    found = adapt_token(model, platform, cells, known, config=config, random_state=random_state)
    save_token(
        folder,
        found.token,
        model=model_folder,
        settings={"random_state": random_state},
        history=found.history,
        evidence=found.evidence,
        lineage={
            "slices": {part["slice_id"]: part["embedding_key"] for part in samples},
            "atlas": {part["slice_id"]: part["embedding_key"] for part in atlas},
            "label_key": label_key,
        },
    )


def token_description(catalog: Catalog, key: str) -> dict[str, Any]:
    """Return the JSON beside a token's numbers: platform, autoencoder, losses, what was measured, lineage."""
    description: dict[str, Any] = json.loads((catalog.path("models", key) / TOKEN_DESCRIPTION_FILE).read_bytes())
    return description


def autoencoder_of(catalog: Catalog, key: str) -> str:
    """Key of the autoencoder that a token belongs to, or the same key where it is that of an autoencoder."""
    if not (catalog.path("models", key) / TOKEN_DESCRIPTION_FILE).exists():
        return key
    return str(token_description(catalog, key)["model"])


def plan_adaptation(
    catalog: Catalog,
    records: Sequence[SliceRecord],
    atlas: Sequence[SliceRecord],
    keys: dict[str, dict[str, str]],
    *,
    platform: str,
    token_key: str,
    model_key: str,
    label_key: str | None,
    random_state: int,
) -> Task:
    """One task: train the token of a platform.

    Parameters
    ----------
    catalog
        The atlas.
    records, atlas
        Slices of the platform to adapt on, and slices of the autoencoder.
    keys
        Keys of the objects of all these, by stage.
    platform
        Name of the token.
    token_key, model_key
        Keys of the token and of the autoencoder.
    label_key
        Column of cell types that the autoencoder was trained with, or None.
    random_state
        Seed.
    """
    config = atlas_config(catalog).autoencoder
    samples, known = (
        [_sample(catalog, record, keys[record.slice_id], config) for record in _in_order(part)]
        for part in (records, atlas)
    )
    n_cells = min(sum(record.n_cells for record in records), config.max_cells_per_technology)
    n_tokens = len({part["token"] for part in known})
    n_known = min(sum(record.n_cells for record in atlas), n_tokens * _cells_of_each(n_tokens, config))
    n_labelled = sum(record.n_cells for record in [*records, *atlas]) if label_key is not None else 0
    return Task(
        name=f"adapt/{token_key}",
        stage="adapt",
        function="lloki_atlas.stages.adapt_tasks:adapt",
        arguments={
            "model_path": str(catalog.path("models", model_key)),
            "platform": platform,
            "samples": samples,
            "atlas": known,
            "settings": to_dict(config),
            "label_key": label_key,
            "random_state": random_state,
        },
        output=Output(
            path=str(catalog.path("models", token_key)),
            staging=str(catalog.path("staging", token_key)),
            lineage={
                "stage": "adapt",
                "model": model_key,
                "embeddings": {part["slice_id"]: part["embedding_key"] for part in samples},
            },
            folder=True,
        ),
        n_cells=n_cells,
        projected_memory=(
            (n_cells + n_known) * N_EMBEDDING * 4 * 2  # as they are read, and put together
            + config.chunk_cells**2 * 4
            + config.chunk_cells * N_EMBEDDING * 4 * 4
            + n_labelled * 2
            + 256 * 2**20
        ),
    )


def _cells_of_each(n_tokens: int, config: AutoencoderConfig) -> int:
    return min(config.max_cells_per_technology, max(1, ATLAS_CELLS // n_tokens))


def _in_order(records: Sequence[SliceRecord]) -> list[SliceRecord]:
    return sorted(records, key=lambda record: record.slice_id)


def _sample(catalog: Catalog, record: SliceRecord, keys: dict[str, str], config: AutoencoderConfig) -> dict[str, Any]:
    return {
        "slice_id": record.slice_id,
        "token": token_name(record, config.token_by),
        "n_cells": record.n_cells,
        "embedding_key": keys["embed"],
        "embedding_path": str(catalog.path("embeddings", keys["embed"])),
        "slice_path": str(catalog.path("slices", record.objects["ingest"])),
    }
