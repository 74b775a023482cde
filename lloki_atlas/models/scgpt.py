"""scGPT's cell embedding from an official checkpoint folder: deterministic, each cell by itself.

The forward pass is that of `scgpt.tasks.embed_data` (post-norm transformer over gene and value embeddings, the `<cls>`
row, unit length). On a CPU a cell's numbers are the same bytes in any batch and on any number of threads: what is
computed together depends on a cell's length alone, and every matrix product is one of a single cell. On a GPU they
agree within the rounding of the products.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear, relu

from lloki_atlas.errors import InputError, MemoryBudgetError
from lloki_atlas.models.batches import (
    CPU_TOKENS,
    Batch,
    bytes_per_token,
    packed_batches,
    padded_batches,
    to_device,
    tokens_that_fit,
)
from lloki_atlas.models.checkpoint import ScGPTSettings, read_checkpoint
from lloki_atlas.models.devices import torch_device
from lloki_atlas.models.threads import single_thread
from lloki_atlas.models.tokens import TokenRows, Vocabulary, lookup_genes, tokenize
from lloki_atlas.models.transformer import Affine, Layer, encode_packed, encode_padded, norm

# scGPT clips values before its value encoder
MAX_VALUE = 512.0
# what libraries keep on a GPU beside our tensors: workspaces of matrix products
_WORKSPACE = 96 * 2**20

_log = logging.getLogger("lloki_atlas")


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
    values: row 0 that of padding and `<cls>`, row d that of bin d; both float32. `dtype` is the type of the matrix
    products, `mode` and `random_state` decide tokens (`tokenize`). `batch_tokens` is the size of a batch; it is halved
    when a device runs out of memory.
    """

    digest: str
    settings: ScGPTSettings
    vocabulary: Vocabulary
    gene_table: torch.Tensor
    value_table: torch.Tensor
    layers: tuple[Layer, ...]
    dtype: torch.dtype = torch.float32
    mode: str = "default"
    random_state: int = 0
    batch_tokens: list[int] = field(default_factory=lambda: [CPU_TOKENS])

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.gene_table.device

    def tokens(self, rows: Any, genes: Sequence[str], *, n_threads: int = 1) -> TokenRows:
        """Tokens of cells: the host's part of the work, `embed_tokens` is the device's. Errors as for `embed_cells`."""
        columns = lookup_genes(self.vocabulary, genes)
        if not (columns >= 0).any():
            raise InputError(f"none of the {len(genes)} genes is in scGPT's vocabulary: give human gene symbols")
        return tokenize(
            rows,
            columns,
            n_bins=self.settings.n_bins,
            max_genes=self.settings.max_seq_len - 1,
            mode=self.mode,
            random_state=self.random_state,
            n_threads=n_threads,
        )

    def embed(self, rows: Any, genes: Sequence[str], *, n_threads: int = 1) -> np.ndarray:
        """Embed cells: `embed_cells` without the report, (n_cells, embsize) float32."""
        return embed_cells(self, rows, genes, n_threads=n_threads).values


def load_scgpt(
    folder: str | Path,
    *,
    device: str = "auto",
    precision: str = "float32",
    device_memory_mb: int = 2048,
    mode: str = "default",
    random_state: int = 0,
) -> ScGPT:
    """Load a checkpoint folder, refusing whatever does not fit.

    Parameters
    ----------
    folder
        Folder of `args.json`, `vocab.json` and `best_model.pt`.
    device
        A torch device, or `auto`: CUDA where there is one.
    precision
        `float32`, `bfloat16` or `float16`: what weights are rounded to, and the type of the matrix products where the
        processor has instructions for it; elsewhere they are float32 products of the rounded weights, which is faster
        than emulating the type.
    device_memory_mb
        Most that may be taken of a GPU, in 2^20 bytes.
    mode, random_state
        How tokens are made of equal and of too many values (`tokenize`).

    Returns
    -------
    ScGPT
        The model on its device.

    Raises
    ------
    InputError
        If the folder, a file or the device is missing or cannot be read.
    CheckpointError
        If the three files do not fit each other.
    MemoryBudgetError
        If the weights and one cell take more of the GPU than is allowed.
    """
    target = torch_device(device)
    checkpoint = read_checkpoint(folder)
    settings, weights = checkpoint.settings, checkpoint.weights
    with _full_products(), single_thread(), torch.inference_mode():
        # both tables are made on the CPU, so that they are the same on every device
        genes = norm(weights["encoder.embedding.weight"], _pair(weights, "encoder.enc_norm."))
        values = _value_table(weights, settings)
    rounded: torch.dtype = getattr(torch, precision)
    dtype = rounded if _multiplies(target, rounded) else torch.float32
    *inner, last = (_layer(weights, f"transformer_encoder.layers.{i}.") for i in range(settings.nlayers))
    layers = [layer.to(target, products=dtype, rounded=rounded) for layer in inner]
    layers.append(last.to(target, products=torch.float32, rounded=torch.float32))
    size = sum(part.numel() * part.itemsize for layer in layers for pair in layer for part in pair)
    batch_tokens = CPU_TOKENS
    if target.type != "cpu":
        batch_tokens = tokens_that_fit(
            device_memory=device_memory_mb * 2**20,
            resident=_WORKSPACE + (genes.numel() + values.numel()) * 4 + size,
            per_token=bytes_per_token(embsize=settings.embsize, d_hid=settings.d_hid, itemsize=dtype.itemsize),
            longest=settings.max_seq_len,
        )
    return ScGPT(
        checkpoint.digest,
        settings,
        checkpoint.vocabulary,
        genes.to(target),
        values.to(target),
        tuple(layers),
        dtype,
        mode,
        random_state,
        [batch_tokens],
    )


def embed_cells(model: ScGPT, rows: Any, genes: Sequence[str], *, n_threads: int = 1) -> Embedded:
    """Embed cells from their non-zero values.

    Parameters
    ----------
    model
        A loaded checkpoint.
    rows
        (n_cells, n_genes) expression, dense or CSR; read as float32.
    genes
        Canonical symbol of each column; those without a token are left out.
    n_threads
        Threads; on a CPU they change no bit.

    Returns
    -------
    Embedded
        Rows of length 1, and what was left out.

    Raises
    ------
    InputError
        If no gene has a token, the columns do not fit the genes, or a value is not finite.
    """
    tokens = model.tokens(rows, genes, n_threads=n_threads)
    n_genes = int(np.count_nonzero(lookup_genes(model.vocabulary, genes) >= 0))
    values = embed_tokens(model, tokens, n_threads=n_threads).cpu().numpy()
    n_empty = int(np.count_nonzero(np.diff(tokens.indptr) == 0))
    return Embedded(values, n_genes, n_empty, tokens.n_truncated, tokens.n_dropped)


def embed_tokens(model: ScGPT, tokens: TokenRows, *, n_threads: int = 1) -> torch.Tensor:
    """Embed tokenised cells.

    Parameters
    ----------
    model
        A loaded checkpoint.
    tokens
        Of its vocabulary.
    n_threads
        Threads of a CPU, each with cells of its own.

    Returns
    -------
    torch.Tensor
        (n_cells, embsize) float32 on the model's device: rows of length 1, NaN where a cell has no token.

    Raises
    ------
    MemoryBudgetError
        If a GPU has no room for a single cell.
    """
    shape = (len(tokens.indptr) - 1, model.settings.embsize)
    values = torch.full(shape, torch.nan, device=model.device)
    with _full_products():
        if model.device.type == "cpu":
            batches = padded_batches(tokens, model.vocabulary, batch_tokens=CPU_TOKENS, fill=True)
            if n_threads == 1:
                for batch in batches:
                    _encode_into(values, model, batch)
            else:
                with ThreadPoolExecutor(n_threads) as pool:
                    list(pool.map(lambda batch: _encode_into(values, model, batch), batches))
            return values
        waiting = np.flatnonzero(np.diff(tokens.indptr))
        while len(waiting):
            waiting = _encode_until_full(values, model, tokens, waiting)
    return values


def _encode_until_full(values: torch.Tensor, model: ScGPT, tokens: TokenRows, cells: np.ndarray) -> np.ndarray:
    """Encode cells on a GPU; return those left when it ran out of memory, batches being half as large from then on."""
    done = np.zeros(len(tokens.indptr) - 1, dtype=bool)
    part = _only(tokens, cells)
    size = model.batch_tokens[0]
    packed = model.dtype != torch.float32  # torch's kernel for packed cells has no float32
    batches = (
        packed_batches(part, model.vocabulary, batch_tokens=size)
        if packed
        else padded_batches(part, model.vocabulary, batch_tokens=size, fill=False)
    )
    for batch in batches:
        try:
            _encode_into(values, model, to_device(batch, model.device))
        except torch.OutOfMemoryError as error:
            if len(batch.cells) == 1:
                raise MemoryBudgetError(
                    f"{model.device} has no memory left for one cell of {batch.genes.numel()} tokens: "
                    "free it of other programs, or embed on another device"
                ) from error
            model.batch_tokens[0] = max(1, batch.genes.numel() // 2)
            _log.warning(
                "%s ran out of memory with %d tokens a batch: going on with %d",
                model.device,
                batch.genes.numel(),
                model.batch_tokens[0],
            )
            break
        done[batch.cells] = True
    else:
        return cells[:0]
    torch.cuda.empty_cache()
    return cells[~done[cells]]


def _only(tokens: TokenRows, cells: np.ndarray) -> TokenRows:
    """The same rows with the tokens of some cells alone."""
    lengths = np.zeros(len(tokens.indptr) - 1, dtype=np.int64)
    lengths[cells] = np.diff(tokens.indptr)[cells]
    kept = np.repeat(lengths > 0, np.diff(tokens.indptr))
    return TokenRows(np.append(0, np.cumsum(lengths)), tokens.genes[kept], tokens.digits[kept], 0, 0)


def _encode_into(values: torch.Tensor, model: ScGPT, batch: Batch) -> None:
    # both settings belong to the thread
    with single_thread(), torch.inference_mode():
        rows = _encode(model, batch)[: len(batch.cells)]
        rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        values[torch.from_numpy(batch.cells).to(values.device)] = rows


def _encode(model: ScGPT, batch: Batch) -> torch.Tensor:
    x = model.gene_table[batch.genes]
    x += model.value_table[batch.digits]
    if batch.offsets is None:
        return encode_padded(model.layers, x, batch.mask, n_heads=model.settings.nheads)
    return encode_packed(
        model.layers, x, batch.offsets, batch.longest, n_heads=model.settings.nheads, dtype=model.dtype
    )


def _value_table(weights: dict[str, torch.Tensor], settings: ScGPTSettings) -> torch.Tensor:
    """Encode every value that occurs, (n_bins, embsize): row 0 the pad value, row d the bin d."""
    values = torch.arange(settings.n_bins, dtype=torch.float32)
    values[0] = settings.pad_value
    hidden = relu(linear(values.clamp(max=MAX_VALUE)[:, None], *_pair(weights, "value_encoder.linear1.")))
    return norm(linear(hidden, *_pair(weights, "value_encoder.linear2.")), _pair(weights, "value_encoder.norm."))


def _layer(weights: dict[str, torch.Tensor], prefix: str) -> Layer:
    names = ("self_attn.in_proj_", "self_attn.out_proj.", "linear1.", "linear2.", "norm1.", "norm2.")
    return Layer.of(*(_pair(weights, prefix + name) for name in names))


def _pair(weights: dict[str, torch.Tensor], prefix: str) -> Affine:
    return weights[f"{prefix}weight"], weights[f"{prefix}bias"]


def _multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device has instructions for products of a type."""
    if device.type != "cpu" or dtype == torch.float32:
        return True
    wanted = "_is_avx512_bf16_supported" if dtype == torch.bfloat16 else "_is_amx_fp16_supported"
    return bool(getattr(torch.cpu, wanted, bool)())


@contextmanager
def _full_products() -> Iterator[None]:
    """Full float32 products inside the block, the caller's setting afterwards."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
