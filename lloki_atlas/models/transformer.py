"""The forward pass of scGPT's encoder down to the row of `<cls>`, on padded cells or on packed ones.

Post-norm layers: x ← norm(x + attention(x)), x ← norm(x + W₂ relu(W₁ x)). What the row of `<cls>` does not need is not
computed: of the last layer, one query a cell, and neither keys nor values: q · (W_k x_j) = (W_kᵀ q) · x_j, and
Σ a_j W_v x_j = W_v Σ a_j x_j. The bias of the keys shifts all scores of a query alike and drops out; that of the values
passes through attention, whose weights sum to 1, into the bias of the output.

In half precision the products are, and attention; what is added up along the layers and normalised is float32, and so
is the last layer, whose one row a cell is little work.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import layer_norm, linear, relu, scaled_dot_product_attention

Affine = tuple[torch.Tensor, torch.Tensor]


class Layer(NamedTuple):
    """Weights of one layer; matrices are (n_in, n_out).

    `qkv` (width, 3 width) has a bias for the queries alone, that of the values is part of the bias of `out`.
    """

    qkv: Affine
    out: Affine
    linear1: Affine
    linear2: Affine
    norm1: Affine
    norm2: Affine

    @classmethod
    def of(cls, qkv: Affine, out: Affine, linear1: Affine, linear2: Affine, norm1: Affine, norm2: Affine) -> Layer:
        """Fold the biases of keys and values of a published layer, whose matrices are (n_out, n_in)."""
        width = qkv[0].shape[1]
        query, value = qkv[1][:width], qkv[1][2 * width :]
        folded = (out[1].double() + out[0].double() @ value.double()).float()

        def turned(weight: torch.Tensor, bias: torch.Tensor) -> Affine:
            return weight.t().contiguous(), bias

        joint = torch.cat([query, torch.zeros(2 * width)])
        return cls(turned(qkv[0], joint), turned(out[0], folded), turned(*linear1), turned(*linear2), norm1, norm2)

    def to(self, device: torch.device, *, products: torch.dtype, rounded: torch.dtype) -> Layer:
        """Move to a device; what products read is rounded to one type and kept in another, norms are float32."""

        def moved(pair: Affine) -> Affine:
            weight, bias = (part.to(rounded).to(device, products) for part in pair)
            return weight, bias

        norms = ((weight.to(device), bias.to(device)) for weight, bias in (self.norm1, self.norm2))
        return Layer(*map(moved, self[:4]), *norms)


def encode_padded(
    layers: tuple[Layer, ...], x: torch.Tensor, keys: torch.Tensor | None, *, n_heads: int
) -> torch.Tensor:
    """Rows of `<cls>` of cells of one length.

    On a CPU every matrix product is one of a single cell: in a product over several, a row's arithmetic may depend on
    its place, and a cell's bytes on its batch.

    Parameters
    ----------
    layers
        At least one; the last is float32.
    x
        (n_cells, length, width) embedded tokens, `<cls>` first; float32.
    keys
        (n_cells, length) bool, true where there is a token; None where there is one everywhere.
    n_heads
        Heads.

    Returns
    -------
    torch.Tensor
        (n_cells, width) float32, before scaling to length 1.
    """
    *inner, last = layers
    mask = None if keys is None else keys[:, None, None, :]
    for layer in inner:
        q, k, v = (part.unflatten(2, (n_heads, -1)).transpose(1, 2) for part in _queries_keys_values(layer, x))
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        del q, k, v
        x = _mix(layer, x, attended)
    first = x[:, :1].contiguous()
    step = len(x) if x.is_cuda else 1
    parts = [slice(start, start + step) for start in range(0, len(x), step)]
    attended = torch.cat([_attend_first(last, x[p], None if keys is None else keys[p], n_heads) for p in parts])
    return _mix(last, first, attended)[:, 0]


def encode_packed(
    layers: tuple[Layer, ...],
    x: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    *,
    n_heads: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows of `<cls>` of cells that follow each other without padding; CUDA and half precision only.

    Parameters
    ----------
    layers
        At least one; the last is float32, its keys and values are made in `dtype`.
    x
        (n_tokens, width) embedded tokens, `<cls>` first in every cell; float32.
    offsets
        (n_cells + 1,) int32, where each cell begins.
    longest
        Most tokens of a cell.
    n_heads
        Heads.
    dtype
        Of attention.

    Returns
    -------
    torch.Tensor
        (n_cells, width) float32.
    """
    *inner, last = layers
    for layer in inner:
        q, k, v = (part.unflatten(1, (n_heads, -1)) for part in _queries_keys_values(layer, x))
        attended = variable_length_attention(q, k, v, offsets, offsets, longest, longest).flatten(1)
        del q, k, v
        x = _mix(layer, x, attended)
    width = x.shape[1]
    first = x[offsets[:-1]]
    weight, bias = last.qkv
    q = linear(first, weight[:, :width].t(), bias[:width]).to(dtype)
    k, v = (x.to(dtype) @ weight[:, width:].to(dtype)).split(width, dim=1)
    ones = torch.arange(len(offsets), dtype=torch.int32, device=x.device)
    q, k, v = (part.unflatten(1, (n_heads, -1)) for part in (q, k, v))
    attended = variable_length_attention(q, k, v, ones, offsets, 1, longest).flatten(1)
    return _mix(last, first, attended.float())


def variable_length_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offsets: torch.Tensor,
    k_offsets: torch.Tensor,
    q_longest: int,
    k_longest: int,
) -> torch.Tensor:
    """Attention within each cell of a packed batch, (n_tokens, n_heads, head width): torch's flash kernel."""
    from torch.nn.attention.varlen import varlen_attn

    attended = varlen_attn(q, k, v, q_offsets, k_offsets, q_longest, k_longest)
    assert isinstance(attended, torch.Tensor)
    return attended


def norm(x: torch.Tensor, parameters: Affine) -> torch.Tensor:
    """Layer norm over the last dimension."""
    return layer_norm(x, x.shape[-1:], *parameters)


def _queries_keys_values(layer: Layer, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weight, bias = layer.qkv
    width, x = x.shape[-1], x.to(weight.dtype)
    if x.is_cuda:  # the bias comes with the product for nothing
        return linear(x, weight.t(), bias).split(width, dim=-1)
    # apart: attention then reads rows that lie closer together
    q, k, v = (_product(x, part) for part in weight.split(width, dim=1))
    return q.add_(bias[:width]), k, v


def _attend_first(layer: Layer, x: torch.Tensor, keys: torch.Tensor | None, n_heads: int) -> torch.Tensor:
    """Attention of the first row to all rows, (n_cells, 1, width), without keys and values of the others."""
    weight, bias = layer.qkv
    n_cells, _, width = x.shape
    to_query, to_key, to_value = (part.unflatten(1, (n_heads, -1)) for part in weight.split(width, dim=1))
    q = _affine(x[:, :1].contiguous(), (to_query.flatten(1), bias[:width])).view(n_cells, n_heads, -1).transpose(0, 1)
    q = (q @ to_key.permute(1, 2, 0)).transpose(0, 1)  # (n_cells, n_heads, width)
    scores = (q @ x.transpose(1, 2)).float() * (width // n_heads) ** -0.5
    if keys is not None:
        scores = scores.masked_fill(~keys[:, None, :], -torch.inf)
    mixed = (scores.softmax(dim=2).to(x.dtype) @ x).transpose(0, 1)
    return (mixed @ to_value.transpose(0, 1)).transpose(0, 1).reshape(n_cells, 1, width)


def _mix(layer: Layer, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    x = norm(_plus(x, attended, layer.out), layer.norm1)
    hidden = relu(_affine(x.to(attended.dtype), layer.linear1), inplace=True)
    return norm(_plus(x, hidden, layer.linear2), layer.norm2)


def _affine(x: torch.Tensor, parameters: Affine) -> torch.Tensor:
    weight, bias = parameters
    return linear(x, weight.t(), bias) if x.is_cuda else _product(x, weight).add_(bias)


def _plus(x: torch.Tensor, y: torch.Tensor, parameters: Affine) -> torch.Tensor:
    """Sum of x, y W and b, float32."""
    weight, bias = parameters
    if x.is_cuda or weight.dtype != x.dtype:
        return _affine(y, parameters).float().add_(x)
    if len(x) == 1:
        return torch.addmm(x[0], y[0], weight).add_(bias)[None]
    return torch.baddbmm(x, y, weight.expand(len(x), -1, -1)).add_(bias)


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x, weight.expand(len(x), -1, -1)) if len(x) > 1 else torch.mm(x[0], weight)[None]
