"""Call the published LLOKI-CAE from a checkout, by path, with our weights and our chunks."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from lloki_atlas.models.autoencoder import HIDDEN, N_EMBEDDING, N_LATENT, ConditionalAutoencoder

FOLDER = Path("lloki") / "cae"


def import_published(checkout: Path) -> SimpleNamespace:
    """`conditional_autoencoder` and `train` of the checkout; figures are drawn nowhere."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    return SimpleNamespace(
        **{name: _load(checkout / FOLDER / f"{name}.py") for name in ("conditional_autoencoder", "train")}
    )


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"published_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published_model(published: SimpleNamespace, model: ConditionalAutoencoder, token_size: int) -> torch.nn.Module:
    """Their model with the weights of ours."""
    ours = model.state_dict()
    theirs = published.conditional_autoencoder.ConditionalAutoencoderML(
        enc_in_channels=N_EMBEDDING,
        batch_dim=token_size,
        latent_dim=N_LATENT,
        hidden_dims=list(HIDDEN),
        num_batches=len(ours["encoder_tokens.weight"]),
    )
    weights = {}
    for side in ("encoder", "decoder"):
        weights[f"{side}.batch_embedding.weight"] = ours[f"{side}_tokens.weight"]
        for name, value in ours.items():
            if name.startswith(f"{side}."):
                weights[f"{side}.fc_layers.{name.removeprefix(f'{side}.')}"] = value
    theirs.load_state_dict({name: value.clone() for name, value in weights.items()})
    return theirs


def train_published(
    published: SimpleNamespace,
    model: torch.nn.Module,
    embeddings: np.ndarray,
    batch: np.ndarray,
    *,
    chunks: Sequence[np.ndarray],
    epochs: int,
    negatives: Any = None,
    **settings: Any,
) -> dict[str, list[float]]:
    """Run their training loop on fixed chunks of rows.

    `negatives` stands in for `torch.randint` in their triplet loss. Returns for each epoch their `reconstruction`,
    `triplet` (weighted) and `conservation` (not weighted), means over chunks, and their sum as `total`.
    """
    found: dict[str, list[float]] = {}

    def keep(_: int, total: list, reconstruction: list, triplet: list, conservation: list) -> None:
        found.update(total=total, reconstruction=reconstruction, triplet=triplet, conservation=conservation)

    data = SimpleNamespace(
        x=torch.from_numpy(embeddings), batch=torch.from_numpy(batch), cell=torch.zeros(len(batch), dtype=torch.long)
    )
    rows = [torch.from_numpy(chunk) for chunk in chunks]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(published.train, "create_chunks", return_value=rows))
        stack.enter_context(mock.patch.object(published.train, "plot_losses", keep))
        if negatives is not None:
            stack.enter_context(injected(published, negatives))
        published.train.train_autoencoder_mnn_triplet_prechunk(
            model,
            SimpleNamespace(device=torch.device("cpu"), checkpoint_dir=None),
            data,
            epochs=epochs,
            # the number of chunks that their means are over
            chunk_size=-(-len(batch) // len(rows)),
            pretrain_epochs=0,
            update_interval=1,
            checkpoint_interval=epochs + 1,
            **settings,
        )
    return found


@contextlib.contextmanager
def injected(published: SimpleNamespace, negatives: Any) -> Iterator[None]:
    """Replace the random draws of their triplet loss by `negatives(low, high, shape, device=...)`."""

    class Torch:
        """`torch`, but for one function."""

        randint = staticmethod(negatives)

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    with mock.patch.object(published.train, "torch", Torch()):
        yield
