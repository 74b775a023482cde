"""Train a small model of scGPT's architecture on a scRNA-seq reference, resumably, and write it as a checkpoint folder.

Two views of the same cells are drawn in every step (`pretraining_batches`). Of the first, a share of the values is
masked and predicted. In both, the row of `<cls>` has to say which cell it is: its unit vector begins with the direction
of the reference's latent, its cosines across the two views rank the other cells of the batch as the latent does, and
`cls_decoder` reads the latent off it.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lloki_atlas.errors import CheckpointError, InputError
from lloki_atlas.models.devices import torch_device
from lloki_atlas.models.pretraining_batches import TrainingCells
from lloki_atlas.models.pretraining_model import N_CLS_LAYERS, PretrainingModel, Shape
from lloki_atlas.models.pretraining_steps import PretrainingConfig, Training, run_epoch
from lloki_atlas.models.threads import torch_threads
from lloki_atlas.models.tokens import SPECIAL_TOKENS

PAD_VALUE, MASK_VALUE = -2, -1
GENE_NOISE, GENE_SCALE = 0.3, 0.06  # gene embeddings start as correlations with the latent, and a little noise

Write = Callable[[Path, bytes], None]
Report = Callable[[dict[str, float]], None]


def train(
    cells: TrainingCells,
    config: PretrainingConfig,
    *,
    key: str,
    state: Path,
    write: Write,
    device: str = "auto",
    n_threads: int = 1,
    max_seconds: float | None = None,
    report: Report | None = None,
) -> Training:
    """Train to the last epoch, from where `state` says.

    Every random number is keyed by seed, epoch and step, so that an interrupted training that goes on gives the same
    bytes as one that was not, on the same device and number of threads.

    Parameters
    ----------
    cells
        The reference.
    config
        Settings.
    key
        Names this training; a state of another one is refused.
    state
        File of the training between two epochs.
    write
        Replaces a file as a whole and durably.
    device
        A torch device, or `auto`: CUDA where there is one.
    n_threads
        Threads of torch on the CPU.
    max_seconds
        No epoch is begun that would end after this time, interrupted runs included; at least one is done.
    report
        Called with the losses of each epoch, and `seconds` so far.

    Raises
    ------
    InputError
        If the device does not exist, or the losses diverge.
    CheckpointError
        If `state` belongs to another training.
    """
    target = torch_device(device)
    if len(cells.latent) < 2 or cells.latent.shape[1] > config.width:
        raise InputError(
            f"a width of {config.width} does not hold the {cells.latent.shape[1]} numbers of a latent of "
            f"{len(cells.latent)} cells: give a wider model and at least two cells"
        )
    with torch_threads(n_threads), torch.enable_grad():
        training = _start(cells, config, target)
        if state.exists():
            _restore(training, state, key)
        while len(training.history) < config.n_epochs and _time_left(training, max_seconds):
            started = time.monotonic()
            losses = run_epoch(training, cells, config, len(training.history) + 1)
            training.history.append(losses)
            training.seconds += time.monotonic() - started
            write(state, _saved(training, key))
            if report is not None:
                report({**losses, "seconds": training.seconds})
    return training


def export(
    folder: Path, training: Training, symbols: Sequence[str], config: PretrainingConfig, *, write: Write
) -> None:
    """Write the three files of a checkpoint; `best_model.pt` comes last, a folder without it is none."""
    args = {
        "embsize": config.width,
        "nheads": config.n_heads,
        "d_hid": config.width,
        "nlayers": config.n_layers,
        "n_layers_cls": N_CLS_LAYERS,
        "n_cls": training.model.shape.n_outputs,
        "dropout": 0.0,
        "pad_token": SPECIAL_TOKENS[0],
        "pad_value": PAD_VALUE,
        "mask_value": MASK_VALUE,
        "n_bins": config.n_bins,
        "max_seq_len": config.max_seq_len,
        "input_style": "binned",
        "input_emb_style": "continuous",
        "fast_transformer": False,
    }
    tokens = {token: row for row, token in enumerate([*symbols, *SPECIAL_TOKENS])}
    weights = {name: value.cpu().clone() for name, value in training.average.state_dict().items()}
    write(folder / "args.json", json.dumps(args, indent=1).encode() + b"\n")
    write(folder / "vocab.json", json.dumps(tokens, indent=0).encode() + b"\n")
    write(folder / "best_model.pt", _bytes(weights))


def _start(cells: TrainingCells, config: PretrainingConfig, device: torch.device) -> Training:
    n_genes = cells.counts.shape[1]
    shape = Shape(
        n_tokens=n_genes + len(SPECIAL_TOKENS),
        width=config.width,
        n_heads=config.n_heads,
        n_hidden=config.width,
        n_layers=config.n_layers,
        n_bins=config.n_bins,
        n_outputs=cells.latent.shape[1],
        pad=n_genes,
        pad_value=PAD_VALUE,
        mask_value=MASK_VALUE,
    )
    model = PretrainingModel(shape, random_state=config.random_state)
    generator = np.random.default_rng([config.random_state % 2**63, 0])
    turned = np.linalg.qr(generator.normal(size=(config.width, cells.latent.shape[1])))[0]
    genes = cells.gene_latent @ turned.T
    genes *= GENE_SCALE / max(float(genes.std()), 1e-12)
    with torch.no_grad():
        table = model.encoder.embedding.weight
        table[:n_genes] = table[:n_genes] * GENE_NOISE + torch.from_numpy(genes).to(table.dtype)
    average = PretrainingModel(shape, random_state=config.random_state)
    average.load_state_dict(model.state_dict())
    model.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98)
    )
    return Training(model, average.to(device).requires_grad_(False), optimizer, [])


def _time_left(training: Training, max_seconds: float | None) -> bool:
    done = len(training.history)
    return max_seconds is None or not done or training.seconds * (done + 1) / done <= max_seconds


def _saved(training: Training, key: str) -> bytes:
    parts = {name: getattr(training, name).state_dict() for name in ("model", "average", "optimizer")}
    return _bytes({"key": key, "history": training.history, "seconds": training.seconds, **parts})


def _restore(training: Training, state: Path, key: str) -> None:
    try:
        saved = torch.load(io.BytesIO(state.read_bytes()), map_location="cpu", weights_only=True)
        found = saved["key"]
        if found == key:
            for name in ("model", "average", "optimizer"):
                getattr(training, name).load_state_dict(saved[name])
            training.history, training.seconds = saved["history"], saved["seconds"]
    except Exception as error:  # a damaged file ends in any of a dozen kinds
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"cannot go on from {state}, it is damaged: delete it to start anew ({reason})"
        ) from error
    if found != key:
        raise CheckpointError(
            f"{state} is an unfinished training with other settings or data: give those again, delete the file, or "
            "choose another folder"
        )


def _bytes(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
