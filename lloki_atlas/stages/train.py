"""Train LLOKI-CAE on the 512-d embeddings of slices: one task of the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lloki_atlas.config import AutoencoderConfig, to_dict
from lloki_atlas.engine.plan import Output, Task
from lloki_atlas.errors import InputError
from lloki_atlas.kernels.hashing import text_key
from lloki_atlas.stages.lineage import atlas_config
from lloki_atlas.store.arrays import read_arrays
from lloki_atlas.store.catalog import Catalog
from lloki_atlas.store.records import SliceRecord
from lloki_atlas.store.slices import SliceStore

NO_LABEL = ("", "nan", "None", "Unassigned", "unlabelled")


def platform_name(record: SliceRecord) -> str:
    """What a condition token stands for: technology and panel."""
    return f"{record.technology}|{record.panel}"


def train(folder: str, samples: list[dict[str, Any]], settings: dict[str, Any], label_key: str | None) -> None:
    """Task body: draw the sample, train, write the checkpoint into `folder`."""
    from lloki_atlas.models.autoencoder_files import save_checkpoint
    from lloki_atlas.models.training import train_autoencoder_on

    config = AutoencoderConfig(**settings)
    platforms = sorted({sample["platform"] for sample in samples})
    share = {name: sum(sample["platform"] == name for sample in samples) for name in platforms}
    parts, platform_codes, slice_codes, labels = [], [], [], []
    for code, sample in enumerate(samples):
        rows = read_arrays(sample["embedding_path"], ["X_fp"])["X_fp"]
        chosen = sample_cells(
            np.flatnonzero(np.isfinite(rows[:, 0])),
            size=max(1, config.max_cells_per_technology // share[sample["platform"]]),
            key=f"{sample['slice_id']}/{config.random_state}",
        )
        parts.append(rows[chosen].astype(np.float32))
        platform_codes.append(np.full(len(chosen), platforms.index(sample["platform"])))
        slice_codes.append(np.full(len(chosen), code))
        if label_key is not None:
            column = _labels(SliceStore(sample["slice_path"]), label_key)
            labels.append(column[chosen])
    model, history = train_autoencoder_on(
        np.concatenate(parts),
        np.concatenate(platform_codes),
        np.concatenate(slice_codes),
        platforms,
        config=config,
        labels=label_codes(np.concatenate(labels)) if labels else None,
    )
    lineage = {
        "slices": {sample["slice_id"]: sample["embedding_key"] for sample in samples},
        "label_key": label_key,
        "n_cells": int(sum(len(part) for part in parts)),
    }
    save_checkpoint(folder, model, config=config, history=history, lineage=lineage)


def _labels(store: SliceStore, label_key: str) -> np.ndarray:
    """Labels of a slice as text; a slice without the column has none."""
    if label_key not in store.metadata["label_columns"]:
        return np.full(store.n_cells, "", dtype=object)
    return store.obs([label_key])[label_key].astype(str).to_numpy(dtype=object)


def label_codes(labels: np.ndarray) -> np.ndarray:
    """Number the labels in alphabetical order; -1 where a cell has none."""
    known = ~np.isin(labels, NO_LABEL)
    codes = np.full(len(labels), -1, dtype=np.int64)
    codes[known] = np.unique(labels[known], return_inverse=True)[1]
    return codes


def sample_cells(candidates: np.ndarray, *, size: int, key: str) -> np.ndarray:
    """Draw at most `size` rows of a slice without replacement, keyed by the slice, in ascending order."""
    if len(candidates) <= size:
        return candidates
    generator = np.random.default_rng(text_key(key))
    return np.sort(generator.choice(candidates, size=size, replace=False))


def checkpoint_description(catalog: Catalog, key: str) -> dict[str, Any]:
    """Return the JSON beside a checkpoint's weights: settings, platforms, loss history, lineage."""
    with open(Path(catalog.path("models", key)) / "autoencoder.json", "rb") as handle:
        return json.load(handle)


def plan_training(
    catalog: Catalog,
    records: list[SliceRecord],
    keys: dict[str, dict[str, str]],
    *,
    model_key: str,
    label_key: str | None,
) -> Task:
    """One task: train on the embeddings of these slices."""
    config = atlas_config(catalog).autoencoder
    samples = [
        {
            "slice_id": record.slice_id,
            "platform": platform_name(record),
            "embedding_key": keys[record.slice_id]["embed"],
            "embedding_path": str(catalog.path("embeddings", keys[record.slice_id]["embed"])),
            "slice_path": str(catalog.path("slices", record.objects["ingest"])),
        }
        for record in sorted(records, key=lambda record: record.slice_id)
    ]
    if not samples:
        raise InputError("there is no slice to train the autoencoder on: ingest some first")
    columns = sorted({column for record in records for column in record.label_columns})
    if label_key is not None and label_key not in columns:
        known = ", ".join(columns) or "none, ingest slices with label_key"
        raise InputError(f"no slice to train on has the label column '{label_key}': choose from {known}")
    n_platforms = len({sample["platform"] for sample in samples})
    n_cells = min(sum(record.n_cells for record in records), n_platforms * config.max_cells_per_technology)
    return Task(
        name=f"train/{model_key}",
        stage="train",
        function="lloki_atlas.stages.train:train",
        arguments={"samples": samples, "settings": to_dict(config), "label_key": label_key},
        output=Output(
            path=str(catalog.path("models", model_key)),
            staging=str(catalog.path("staging", model_key)),
            lineage={"stage": "train", "embeddings": {s["slice_id"]: s["embedding_key"] for s in samples}},
            folder=True,
        ),
        n_cells=n_cells,
        projected_memory=(
            n_cells * 512 * 4 * 3
            + max(record.n_cells for record in records) * 512 * 2  # a slice's embedding is read whole
            + config.chunk_cells**2 * 4 * 3
            + 256 * 2**20
        ),
    )
