"""Train an embedder of scGPT's architecture on a scRNA-seq reference: data, folder, lineage, progress."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lloki_atlas.config import canonical_json, digest
from lloki_atlas.errors import CheckpointError, InputError
from lloki_atlas.models.pretraining import export, train
from lloki_atlas.models.pretraining_steps import PretrainingConfig
from lloki_atlas.stages.create import reference_key
from lloki_atlas.stages.pretrain_cells import known_panels, training_cells
from lloki_atlas.stages.pretrain_report import Progress, loss_curve
from lloki_atlas.stages.reference import fit_reference
from lloki_atlas.store.durable import write_durable
from lloki_atlas.store.references import ReferenceProfile

VERSION = 1
STATE_FILE, REPORT_FILE, CURVE_FILE, LAST_FILE = "unfinished.pt", "training.json", "loss.svg", "best_model.pt"
N_LATENT = 30


def pretrain(
    reference: Any,
    out: str | Path,
    *,
    organism: str | None = None,
    panels: Sequence[Any] = (),
    layer: str | None = None,
    gene_map: str | Path | None = None,
    minutes: float | None = None,
    device: str = "auto",
    n_threads: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Train a model that `scgpt:OUT` embeds with; the same call again goes on where an interrupted one stopped.

    Parameters
    ----------
    reference
        scRNA-seq counts: path of an h5ad file, an AnnData, or a `ReferenceProfile`.
    out
        Folder of the checkpoint; made if missing.
    organism
        `mouse` or `human`, of the reference and the panels; not needed for a `ReferenceProfile`.
    panels
        Slices that will be embedded (paths or AnnData): of each, the names of its genes and their mean counts are
        used, so that training sees genes with the efficiency that they have on its platform. No label is read.
    layer
        Layer of the reference that holds the counts; `X` when None.
    gene_map
        A table (source symbol, canonical symbol) that wins over the built-in ones.
    minutes
        No epoch is begun that would end after this time. How many epochs that is depends on the machine.
    device
        A torch device, or `auto`: CUDA where there is one.
    n_threads
        Threads of torch on the CPU; all cores when None. Another number changes the last digits of the weights.
    progress
        Show it on standard error.
    settings
        Fields of `PretrainingConfig`, such as `n_layers`, `width`, `n_epochs`, `random_state`.

    Returns
    -------
    What `training.json` says: settings, lineage, losses of every epoch.

    Raises
    ------
    InputError
        If the reference, a panel or a setting cannot be used.
    CheckpointError
        If the folder holds a checkpoint, or an unfinished training, of other settings or data.
    """
    config = _config(settings)
    profile = _profile(reference, organism=organism, layer=layer, gene_map=gene_map)
    known = known_panels(panels, profile, gene_map=gene_map)
    lineage = {
        "version": VERSION,
        "reference": reference_key(profile),
        "n_cells": profile.counts.shape[0],
        "n_genes": profile.counts.shape[1],
        "organism": profile.organism,
        "panels": [
            {
                "symbols": [profile.symbols[column] for column in panel.columns],
                "log_gain": panel.log_gain.tolist(),
                "depth": panel.depth,
            }
            for panel in known
        ],
    }
    # as JSON has it, so that it compares with what was written
    described = json.loads(canonical_json({"settings": dataclasses.asdict(config), "lineage": lineage}))
    key = digest(described)
    folder = Path(out)
    state = folder / STATE_FILE
    finished = _finished(folder, key)
    if finished is not None:
        state.unlink(missing_ok=True)
        return finished
    n_latent = min(N_LATENT, config.width)
    cells = training_cells(profile, known, n_latent=n_latent, random_state=config.random_state)
    with Progress(config.n_epochs, profile.counts.shape[0], enabled=progress) as bar:
        training = train(
            cells,
            config,
            key=key,
            state=state,
            write=write_durable,
            device=device,
            n_threads=n_threads or os.cpu_count() or 1,
            max_seconds=None if minutes is None else 60 * minutes,
            report=bar.show,
        )
    report = {"key": key, **described, "n_epochs_done": len(training.history), "history": training.history}
    write_durable(folder / REPORT_FILE, json.dumps(report, indent=1).encode() + b"\n")
    write_durable(folder / CURVE_FILE, loss_curve(training.history).encode())
    export(folder, training, profile.symbols, config, write=write_durable)
    state.unlink(missing_ok=True)
    return report


def _config(settings: dict[str, Any]) -> PretrainingConfig:
    known = {field.name for field in dataclasses.fields(PretrainingConfig)}
    for name in settings:
        if name not in known:
            raise InputError(f"there is no setting '{name}' of a training: choose from {', '.join(sorted(known))}")
    return PretrainingConfig(**settings)


def _profile(
    reference: Any, *, organism: str | None, layer: str | None, gene_map: str | Path | None
) -> ReferenceProfile:
    if isinstance(reference, ReferenceProfile):
        return reference
    if organism is None:
        raise InputError("say the organism of the reference: organism='mouse' or 'human'")
    return fit_reference(reference, organism=organism, layer=layer, gene_map=gene_map)


def _finished(folder: Path, key: str) -> dict[str, Any] | None:
    """The report of a training that ended here, None where none did."""
    if not (folder / LAST_FILE).exists():
        return None
    try:
        report: dict[str, Any] = json.loads((folder / REPORT_FILE).read_bytes())
        same = report["key"] == key
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise CheckpointError(
            f"{folder} holds a checkpoint that was made otherwise: choose another folder, or delete that one"
        )
    return report
