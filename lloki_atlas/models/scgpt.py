"""scGPT's cell embedding from an official checkpoint folder: deterministic, each cell by itself.

The forward pass is that of `scgpt.tasks.embed_data` (post-norm transformer over gene and value embeddings, the `<cls>`
row, unit length) in float32. A cell's numbers are the same bytes in any batch: every cell is padded to a multiple of 32
tokens, the size of a batch depends on that length alone, and every matrix product is one of a single cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import layer_norm, linear, relu, scaled_dot_product_attention

from lloki_atlas.errors import InputError
from lloki_atlas.models.checkpoint import ScGPTSettings, read_checkpoint
from lloki_atlas.models.threads import single_thread
from lloki_atlas.models.tokens import TokenRows, Vocabulary, lookup_genes, tokenize

# scGPT clips values before its value encoder
_MAX_VALUE = 512.0
_PAD_MULTIPLE = 32
# tokens in one batch: enough to keep the device busy; what the last batch of a length leaves empty is computed too
_BATCH_TOKENS = {"cpu": 512, "cuda": 8192}

_Affine = tuple[torch.Tensor, torch.Tensor]


class _Layer(NamedTuple):
    """Weights and biases of one layer; matrices are (n_in, n_out)."""

    qkv: _Affine
    out: _Affine
    linear1: _Affine
    linear2: _Affine
    norm1: _Affine
    norm2: _Affine


@dataclass(frozen=True)
class Embedded:
    """Embeddings, and what was left out on the way.

    `values` is (n_cells, embsize) float32, NaN for the `n_empty` cells without a token; `n_genes` columns have a
    token; `n_truncated` cells had more genes than fit, which left `n_dropped` values out.
    """

    values: np.ndarray
    n_genes: int
    n_empty: int
    n_truncated: int
    n_dropped: int


@dataclass(frozen=True, eq=False)
class ScGPT:
    """A loaded checkpoint; `digest` is the content of its three files.

    `gene_table` (n_tokens, embsize) has the normalised gene embeddings, `value_table` (n_bins, embsize) the encoded
    values: row 0 that of padding and `<cls>`, row d that of bin d.
    """

    digest: str
    settings: ScGPTSettings
    vocabulary: Vocabulary
    gene_table: torch.Tensor
    value_table: torch.Tensor
    layers: tuple[_Layer, ...]

    def embed(self, rows: Any, genes: Sequence[str]) -> np.ndarray:
        """Embed cells: `embed_cells` without the report, (n_cells, embsize) float32."""
        return embed_cells(self, rows, genes).values


def load_scgpt(folder: str | Path, *, device: str = "auto") -> ScGPT:
    """Load a checkpoint folder, refusing whatever does not fit.

    Parameters
    ----------
    folder
        Folder of `args.json`, `vocab.json` and `best_model.pt`.
    device
        A torch device, or `auto`: CUDA where there is one.

    Returns
    -------
    ScGPT
        The model, float32.

    Raises
    ------
    InputError
        If the folder, a file or the device is missing or cannot be read.
    CheckpointError
        If the three files do not fit each other.
    """
    target = _device(device)
    checkpoint = read_checkpoint(folder)
    settings, weights = checkpoint.settings, checkpoint.weights
    with _fixed_arithmetic():
        # both tables are made on the CPU, so that they are the same on every device
        genes = _norm(weights["encoder.embedding.weight"], _pair(weights, "encoder.enc_norm."))
        values = _value_table(weights, settings)
    layers = tuple(_layer(weights, f"transformer_encoder.layers.{i}.", target) for i in range(settings.nlayers))
    return ScGPT(checkpoint.digest, settings, checkpoint.vocabulary, genes.to(target), values.to(target), layers)


def embed_cells(model: ScGPT, rows: Any, genes: Sequence[str]) -> Embedded:
    """Embed cells from their non-zero values.

    Parameters
    ----------
    model
        A loaded checkpoint.
    rows
        (n_cells, n_genes) expression, dense or CSR; read as float32.
    genes
        Canonical symbol of each column; those without a token are left out.

    Returns
    -------
    Embedded
        Rows of length 1, and what was left out.

    Raises
    ------
    InputError
        If no gene has a token, the columns do not fit the genes, or a value is not finite.
    """
    columns = lookup_genes(model.vocabulary, genes)
    n_genes = int(np.count_nonzero(columns >= 0))
    if n_genes == 0:
        raise InputError(f"none of the {len(genes)} genes is in scGPT's vocabulary: give human gene symbols")
    settings = model.settings
    tokens = tokenize(rows, columns, n_bins=settings.n_bins, max_genes=settings.max_seq_len - 1)
    lengths = np.diff(tokens.indptr)
    # a multiple of 32 keeps every cell's block aligned alike in memory
    padded = np.where(lengths > 0, -(-(lengths + 1) // _PAD_MULTIPLE) * _PAD_MULTIPLE, 0)
    batch_tokens = _BATCH_TOKENS.get(model.gene_table.device.type, _BATCH_TOKENS["cuda"])
    values = np.full((len(lengths), settings.embsize), np.nan, dtype=np.float32)
    with _fixed_arithmetic():
        for length in np.unique(padded[padded > 0]).tolist():
            cells = np.flatnonzero(padded == length)
            size = max(1, batch_tokens // length)
            for start in range(0, len(cells), size):
                batch = cells[start : start + size]
                values[batch] = _encode(model, *_batch(model, tokens, batch, (size, length)))[: len(batch)]
    return Embedded(values, n_genes, int(np.count_nonzero(lengths == 0)), tokens.n_truncated, tokens.n_dropped)


def _batch(
    model: ScGPT, tokens: TokenRows, cells: np.ndarray, shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gene tokens, value bins and mask (True: a token) of one batch; rows past the last cell hold `<cls>` alone."""
    genes = np.full(shape, model.vocabulary.pad, dtype=np.int64)
    digits = np.zeros(shape, dtype=np.int64)
    mask = np.zeros(shape, dtype=bool)
    genes[:, 0] = model.vocabulary.cls
    mask[:, 0] = True
    for row, cell in enumerate(cells):
        start, stop = tokens.indptr[cell], tokens.indptr[cell + 1]
        genes[row, 1 : 1 + stop - start] = tokens.genes[start:stop]
        digits[row, 1 : 1 + stop - start] = tokens.digits[start:stop]
        mask[row, 1 : 1 + stop - start] = True
    device = model.gene_table.device
    return torch.from_numpy(genes).to(device), torch.from_numpy(digits).to(device), torch.from_numpy(mask).to(device)


def _encode(model: ScGPT, genes: torch.Tensor, digits: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    x = model.gene_table[genes] + model.value_table[digits]
    keys = mask[:, None, None, :]
    for layer in model.layers[:-1]:
        x = _apply(layer, x, x, keys, model.settings.nheads)
    # of the last layer, only the row of <cls> is read
    x = _apply(model.layers[-1], x[:, :1].contiguous(), x, keys, model.settings.nheads)[:, 0]
    return (x / torch.linalg.vector_norm(x, dim=1, keepdim=True)).cpu().numpy()


def _apply(layer: _Layer, x: torch.Tensor, context: torch.Tensor, keys: torch.Tensor, n_heads: int) -> torch.Tensor:
    """One post-norm layer for the rows `x`, which attend to the rows `context`."""
    weight, bias = layer.qkv
    width = x.shape[2]
    q = _affine(x, (weight[:, :width], bias[:width]))
    k, v = _affine(context, (weight[:, width:], bias[width:])).split(width, dim=2)
    q, k, v = (part.unflatten(2, (n_heads, -1)).transpose(1, 2) for part in (q, k, v))
    attended = scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2).flatten(2)
    x = _norm(x + _affine(attended, layer.out), layer.norm1)
    return _norm(x + _affine(relu(_affine(x, layer.linear1)), layer.linear2), layer.norm2)


def _affine(x: torch.Tensor, parameters: _Affine) -> torch.Tensor:
    # one product a cell: in a product over all cells, a row's arithmetic may depend on its place
    weight, bias = parameters
    return torch.baddbmm(bias, x, weight.expand(len(x), -1, -1))


def _norm(x: torch.Tensor, parameters: _Affine) -> torch.Tensor:
    return layer_norm(x, x.shape[-1:], *parameters)


def _value_table(weights: dict[str, torch.Tensor], settings: ScGPTSettings) -> torch.Tensor:
    """Encode every value that occurs, (n_bins, embsize): row 0 the pad value, row d the bin d."""
    values = torch.arange(settings.n_bins, dtype=torch.float32)
    values[0] = settings.pad_value
    hidden = relu(linear(values.clamp(max=_MAX_VALUE)[:, None], *_pair(weights, "value_encoder.linear1.")))
    return _norm(linear(hidden, *_pair(weights, "value_encoder.linear2.")), _pair(weights, "value_encoder.norm."))


def _layer(weights: dict[str, torch.Tensor], prefix: str, device: torch.device) -> _Layer:
    names = ("self_attn.in_proj_", "self_attn.out_proj.", "linear1.", "linear2.", "norm1.", "norm2.")
    pairs = (_pair(weights, prefix + name) for name in names)
    return _Layer(*((weight.t().contiguous().to(device), bias.to(device)) for weight, bias in pairs))


def _pair(weights: dict[str, torch.Tensor], prefix: str) -> _Affine:
    return weights[f"{prefix}weight"], weights[f"{prefix}bias"]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise InputError(f"torch cannot use the device '{name}' here: say 'auto', 'cpu', or one that exists") from error
    return device


@contextmanager
def _fixed_arithmetic() -> Iterator[None]:
    """One thread and full float32 products inside the block, the caller's settings afterwards."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with single_thread(), torch.inference_mode():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
