"""Train LLOKI-CAE on the 512-d embeddings of slices: one task of the plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lloki_atlas.config import AutoencoderConfig, digest, to_dict
from lloki_atlas.engine.outputs import Output
from lloki_atlas.engine.plan import Task
from lloki_atlas.errors import InputError, NotFoundError
from lloki_atlas.stages.lineage import atlas_config, platform_name, token_name
from lloki_atlas.stages.train_cells import StoredCells, most_cells
from lloki_atlas.stages.train_labels import NO_LABEL, Codes, label_codes
from lloki_atlas.stages.train_memory import training_memory
from lloki_atlas.stages.train_report import EpochReport, loss_curves
from lloki_atlas.stages.train_search import Trained, search
from lloki_atlas.store.catalog import Catalog
from lloki_atlas.store.durable import write_durable
from lloki_atlas.store.local import local_file
from lloki_atlas.store.places import place
from lloki_atlas.store.records import SliceRecord
from lloki_atlas.store.slices import SliceStore

__all__ = ["NO_LABEL", "checkpoint_description", "plan_training", "platform_name", "token_name", "train"]

CURVES_FILE = "loss_curves.svg"
# of the file that keeps a training between two epochs
STATE_VERSION = 1
# models.training_chunks.BLOCK_ROWS: what cells are held out by; a plan does without torch
BLOCK_CELLS = 256


def train(
    folder: str,
    samples: list[dict[str, Any]],
    settings: dict[str, Any],
    label_key: str | None,
    state: str | None = None,
    hold_out: bool | None = None,
    n_threads: int | None = None,
) -> None:
    """Task body: train on chunks of the stored embeddings, write the checkpoint and the loss curves into `folder`.

    Parameters
    ----------
    folder
        Filled with the checkpoint.
    samples
        For each slice `slice_id`, `platform`, `token`, `n_cells`, `embedding_key`, `embedding_path` and `slice_path`.
    settings
        Of `AutoencoderConfig`.
    label_key
        Column of cell types; None trains without labels.
    state
        File of the training between two epochs: a task that was killed goes on from it. It is left for who publishes
        the folder to remove.
    hold_out
        Whether cells are left out for validation; when None, if `patience` is above 0 or `search` is on.
    n_threads
        At most 4 of the machine's cores when None.

    Raises
    ------
    InputError
        If no platform has two cells, no cell of a platform has an embedding, or the losses diverge.
    CheckpointError
        If `state` is damaged, or belongs to another training.
    """
    from lloki_atlas.models import training
    from lloki_atlas.models.autoencoder_files import save_checkpoint

    config = AutoencoderConfig(**settings)
    hold_out = config.patience > 0 or config.search if hold_out is None else hold_out
    slices = {sample["slice_id"]: sample["embedding_key"] for sample in samples}
    labels = None if label_key is None else _labels(samples, label_key)
    source = StoredCells(samples, config=config, labels=labels, hold_out=hold_out)

    def trained(candidate: AutoencoderConfig, suffix: str) -> Trained:
        key = {
            "version": STATE_VERSION,
            "settings": to_dict(candidate),
            "slices": slices,
            "label_key": label_key,
            "tokens": source.tokens,
            "hold_out": hold_out,
        }
        return training.train(
            source,
            candidate,
            key=digest(key),
            state=None if state is None else local_file(state + suffix),
            write=write_durable,
            n_threads=n_threads,
            progress=EpochReport(None if state is None else place(f"{state}.progress")),
        )

    lineage: dict[str, Any] = {"slices": slices, "label_key": label_key, "n_cells": sum(source.sizes)}
    if config.search:
        config, (model, history), lineage["search"] = search(config, trained)
    else:
        model, history = trained(config, "")
    if source.n_held_out:
        lineage["n_held_out"] = source.n_held_out
    save_checkpoint(folder, model, config=config, history=history, lineage=lineage)
    (Path(folder) / CURVES_FILE).write_text(loss_curves(history), encoding="utf-8")


def checkpoint_description(catalog: Catalog, key: str) -> dict[str, Any]:
    """Return the JSON beside a checkpoint's weights: settings, platforms, loss history, lineage.

    Raises
    ------
    NotFoundError
        If it is gone.
    """
    path = catalog.path("models", key) / "autoencoder.json"
    try:
        description: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise NotFoundError(
            f"the autoencoder {path} is gone: restore it from a copy, or train anew with `lloki-atlas train`"
        ) from None
    return description


def plan_training(
    catalog: Catalog,
    records: list[SliceRecord],
    keys: dict[str, dict[str, str]],
    *,
    model_key: str,
    label_key: str | None,
    hold_out: bool | None = None,
    n_threads: int | None = None,
) -> Task:
    """One task: train on the embeddings of these slices.

    Parameters
    ----------
    catalog, records, keys
        The atlas, the slices, and the keys of their objects by stage.
    model_key
        Key of the model.
    label_key
        Column of cell types; None trains without labels.
    hold_out, n_threads
        As for `train`; threads change no byte.
    """
    config = atlas_config(catalog).autoencoder
    samples = [
        {
            "slice_id": record.slice_id,
            "platform": platform_name(record),
            "token": token_name(record, config.token_by),
            "n_cells": record.n_cells,
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
    n_cells = sum(record.n_cells for record in records)
    if config.search and max(record.n_cells for record in records) <= BLOCK_CELLS:
        raise InputError(
            f"a search needs a slice of more than {BLOCK_CELLS} cells, to hold some out and choose settings by them: "
            "leave autoencoder.search off"
        )
    token_cells = [cells for _, cells in most_cells(samples, config.max_cells_per_technology)]
    return Task(
        name=f"train/{model_key}",
        stage="train",
        function="lloki_atlas.stages.train:train",
        arguments={
            "samples": samples,
            "settings": to_dict(config),
            "label_key": label_key,
            "state": str(catalog.path("staging", f"{model_key}.training")),
            "hold_out": hold_out,
            "n_threads": n_threads,
        },
        output=Output(
            path=str(catalog.path("models", model_key)),
            staging=str(catalog.path("staging", model_key)),
            lineage={"stage": "train", "embeddings": {s["slice_id"]: s["embedding_key"] for s in samples}},
            folder=True,
        ),
        n_cells=sum(token_cells),
        projected_memory=training_memory(token_cells, n_cells, config, labelled=label_key is not None),
    )


def _labels(samples: Sequence[dict[str, Any]], label_key: str) -> list[Codes] | None:
    """Labels of the slices' cells, None where they would refine nothing."""
    from lloki_atlas.models.training_chunks import labels_refine

    codes, n_labels = label_codes([SliceStore(sample["slice_path"]) for sample in samples], label_key)
    return codes if labels_refine(n_labels) else None
