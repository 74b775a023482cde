"""One epoch of training: views of cells, the losses, the update, and the running mean of the weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.functional import log_softmax, mse_loss, normalize, smooth_l1_loss, softmax

from lloki_atlas.errors import InputError
from lloki_atlas.models.pretraining_batches import Augmentation, Batch, TrainingCells, batches, draw_view
from lloki_atlas.models.pretraining_model import PretrainingModel
from lloki_atlas.models.tokens import TokenRows

LOSSES = ("total", "bins", "direction", "neighbors", "latent")
N_PARTS = 4


@dataclass(frozen=True)
class PretrainingConfig:
    """Everything that decides the weights, but for the data and the number of threads.

    `max_seq_len` counts `<cls>`. The total loss is `bins_weight` times the squared error of masked bins (in standard
    deviations of a uniform one), plus `direction_weight`, `neighbors_weight` and `latent_weight` times the other three.
    `average` is the share of the running mean of the weights, which is what is kept, that a step leaves.
    """

    n_layers: int = 3
    width: int = 128
    n_heads: int = 4
    n_epochs: int = 100
    batch_cells: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    average: float = 0.999
    mask_share: float = 0.25
    bins_weight: float = 0.1
    direction_weight: float = 2.0
    neighbors_weight: float = 1.0
    latent_weight: float = 0.25
    temperature: float = 0.1
    n_bins: int = 51
    max_seq_len: int = 1200
    precision: str = "float32"
    random_state: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        if min(self.n_layers, self.width, self.n_heads, self.n_epochs) < 1 or self.width % self.n_heads:
            raise InputError(
                f"a model of {self.n_layers} layers, width {self.width} and {self.n_heads} heads cannot be trained for "
                f"{self.n_epochs} epochs: each has to be positive, and the width a multiple of the heads"
            )
        if self.batch_cells < 2:
            raise InputError(f"batch_cells is {self.batch_cells}: cells are compared within a batch, give at least 2")
        if self.precision not in ("float32", "bfloat16"):
            raise InputError(f"precision is '{self.precision}': choose float32 or bfloat16")


@dataclass(eq=False)
class Training:
    """A training between two epochs; `average` is the running mean of the weights, `seconds` the time spent."""

    model: PretrainingModel
    average: PretrainingModel
    optimizer: torch.optim.Optimizer
    history: list[dict[str, float]]
    seconds: float = 0.0


def run_epoch(training: Training, cells: TrainingCells, config: PretrainingConfig, epoch: int) -> dict[str, float]:
    """Update the weights once for every batch of an epoch (from 1); the means of the losses over its steps.

    Every random number is keyed by seed, epoch and step.
    """
    n_steps = steps_per_epoch(len(cells.latent), config)
    latent = torch.from_numpy(cells.latent).to(training.model.values.device)
    scaled = (latent - latent.mean(0)) / (latent.std(0) + 1e-6)
    sums = dict.fromkeys(LOSSES, 0.0)
    for step in range(n_steps):
        generator = np.random.default_rng([config.random_state % 2**63, epoch, step])
        losses = _step(training, cells, (latent, scaled), config, generator, (epoch - 1) * n_steps + step + 1)
        for name, value in losses.items():
            sums[name] += value / n_steps
    if not np.isfinite(sums["total"]):
        raise InputError(f"training diverged in epoch {epoch}: lower the learning rate")
    return {"epoch": epoch, **sums}


def _step(
    training: Training,
    cells: TrainingCells,
    latents: tuple[torch.Tensor, torch.Tensor],
    config: PretrainingConfig,
    generator: np.random.Generator,
    number: int,
) -> dict[str, float]:
    size = min(config.batch_cells, len(cells.latent))
    rows = generator.choice(len(cells.latent), size=size, replace=False, p=cells.cell_weights)
    first, second = (_view(cells, rows, config, generator) for _ in range(2))
    kept = np.flatnonzero((np.diff(first.indptr) > 0) & (np.diff(second.indptr) > 0))
    if len(kept) < 2:
        return dict.fromkeys(LOSSES, 0.0)
    for group in training.optimizer.param_groups:
        group["lr"] = config.learning_rate * min(1.0, number / config.warmup_steps)
    device = training.model.values.device
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16" and device.type == "cuda"):
        masked, bins = _masked_rows(training.model, first, kept, config, generator)
        whole = _cls_rows(training.model, second, kept)
        places = torch.from_numpy(rows[kept]).to(device)
        wanted, scaled = (z[places] for z in latents)
        direction, neighbors = cell_losses(masked, whole, wanted, temperature=config.temperature)
        read = [smooth_l1_loss(training.model.predict_latent(rows), scaled) for rows in (masked, whole)]
        losses = {"bins": bins, "direction": direction, "neighbors": neighbors, "latent": (read[0] + read[1]) / 2}
    total = sum(getattr(config, f"{name}_weight") * value for name, value in losses.items())
    training.optimizer.zero_grad()
    total.backward()
    torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
    training.optimizer.step()
    with torch.no_grad():
        share = 1 - min(config.average, (1 + number) / (10 + number))
        for mean, value in zip(training.average.parameters(), training.model.parameters(), strict=True):
            mean.lerp_(value, share)
    return {"total": total.item(), **{name: value.item() for name, value in losses.items()}}


def steps_per_epoch(n_cells: int, config: PretrainingConfig) -> int:
    """Steps in which as many cells are drawn as there are."""
    return -(-n_cells // config.batch_cells)


def cell_losses(
    first: torch.Tensor, second: torch.Tensor, latent: torch.Tensor, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far `<cls>` rows of two views are from telling which cell they show.

    Parameters
    ----------
    first, second : (n, width) float32
        Rows of the same cells.
    latent : (n, n_latent) float32
        What they should tell, n_latent at most the width.
    temperature : float
        Cosines are divided by it before they are compared.

    Returns
    -------
    `direction`: mean of 1 − cosine between the first n_latent numbers of the unit row and the latent.
    `neighbors`: Kullback-Leibler divergence from the soft ranking of the cells by the latent to the one by the rows
    across views, mean over cells and both directions.
    """
    a, b, wanted = (normalize(rows, dim=1) for rows in (first, second, latent))
    n_latent = latent.shape[1]
    direction = 1 - ((a + b)[:, :n_latent] * wanted).sum(dim=1).mean() / 2
    share = softmax(wanted @ wanted.T / temperature, dim=1)
    found = a @ b.T / temperature
    cross = (share * (log_softmax(found, dim=1) + log_softmax(found.T, dim=1))).sum(dim=1).mean() / 2
    entropy = (share * torch.log(share + 1e-9)).sum(dim=1).mean()
    return direction, entropy - cross


def _view(
    cells: TrainingCells, rows: np.ndarray, config: PretrainingConfig, generator: np.random.Generator
) -> TokenRows:
    return draw_view(
        cells,
        rows,
        tokens=np.arange(cells.counts.shape[1]),
        n_bins=config.n_bins,
        max_genes=config.max_seq_len - 1,
        settings=config.augmentation,
        generator=generator,
    )


def _parts(model: PretrainingModel, view: TokenRows, kept: np.ndarray) -> list[Batch]:
    pad = model.shape.pad
    return batches(view, kept, pad=pad, cls=pad + 1, n_parts=N_PARTS)


def _cls_rows(model: PretrainingModel, view: TokenRows, kept: np.ndarray) -> torch.Tensor:
    """Rows of `<cls>` in the order of `kept`."""
    parts = _parts(model, view, kept)
    found = [model(*_tensors(model, part.genes, part.digits), cls_only=True)[:, 0] for part in parts]
    return _ordered(found, parts)


def _masked_rows(
    model: PretrainingModel,
    view: TokenRows,
    kept: np.ndarray,
    config: PretrainingConfig,
    generator: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of `<cls>` with a share of the values masked, and the error of the bins predicted for those."""
    parts = _parts(model, view, kept)
    found, errors, n_masked = [], torch.zeros((), device=model.values.device), 0
    for part in parts:
        masked = (generator.random(part.genes.shape) < config.mask_share) & (part.digits > 0)
        shown = np.where(masked, config.n_bins, part.digits)
        rows = model(*_tensors(model, part.genes, shown), cls_only=False)
        # a uniform bin has this spread, so that the error is 1 for who only knows the mean
        wanted = torch.from_numpy(part.digits[masked] / (config.n_bins / 12**0.5)).to(rows)
        errors = errors + mse_loss(model.predict_bins(rows[torch.from_numpy(masked)]), wanted, reduction="sum")
        n_masked += int(masked.sum())
        found.append(rows[:, 0])
    return _ordered(found, parts), errors / max(n_masked, 1)


def _tensors(model: PretrainingModel, *arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array).to(model.values.device) for array in arrays]


def _ordered(found: list[torch.Tensor], parts: list[Batch]) -> torch.Tensor:
    back = np.argsort(np.concatenate([part.rows for part in parts]), kind="stable")
    rows = torch.cat(found)
    return rows[torch.from_numpy(back).to(rows.device)].float()
