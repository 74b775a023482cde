"""scGPT's architecture as a module to train: its parameters have the names, shapes and meaning of official ones.

Post-norm transformer over gene and value embeddings, `<cls>` first; `decoder` reads value bins off the rows of genes,
`cls_decoder` the reference's latent off the row of `<cls>`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import embedding, scaled_dot_product_attention

from lloki_atlas.models.scgpt import MAX_VALUE

N_CLS_LAYERS = 3
EMBEDDING_RANGE = 0.1


@dataclass(frozen=True)
class Shape:
    """Size of a model: `n_tokens` rows of the vocabulary, `n_outputs` numbers that `cls_decoder` predicts."""

    n_tokens: int
    width: int
    n_heads: int
    n_hidden: int
    n_layers: int
    n_bins: int
    n_outputs: int
    pad: int
    pad_value: float
    mask_value: float


class PretrainingModel(nn.Module):
    """Encoder and the two heads that are trained.

    Parameters
    ----------
    shape : Shape
    random_state : int
        Seeds the weights; the global random state of torch is neither read nor changed.
    """

    def __init__(self, shape: Shape, *, random_state: int = 0) -> None:
        super().__init__()
        self.shape = shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_state % 2**63)
            self._build(shape)
        values = torch.arange(shape.n_bins + 1, dtype=torch.float32).clamp(max=MAX_VALUE)
        values[0], values[-1] = shape.pad_value, shape.mask_value
        self.register_buffer("values", values, persistent=False)

    def _build(self, shape: Shape) -> None:
        width = shape.width
        self.encoder = nn.Module()
        self.encoder.embedding = nn.Embedding(shape.n_tokens, width, padding_idx=shape.pad)
        nn.init.uniform_(self.encoder.embedding.weight, -EMBEDDING_RANGE, EMBEDDING_RANGE)
        self.encoder.enc_norm = nn.LayerNorm(width)
        self.value_encoder = nn.Module()
        self.value_encoder.linear1 = nn.Linear(1, width)
        self.value_encoder.linear2 = nn.Linear(width, width)
        self.value_encoder.norm = nn.LayerNorm(width)
        layers = (
            nn.TransformerEncoderLayer(width, shape.n_heads, shape.n_hidden, dropout=0.0, batch_first=True)
            for _ in range(shape.n_layers)
        )
        self.transformer_encoder = nn.Module()
        self.transformer_encoder.layers = nn.ModuleList(layers)
        self.decoder = nn.Module()
        self.decoder.fc = nn.Sequential(
            nn.Linear(width, width), nn.LeakyReLU(), nn.Linear(width, width), nn.LeakyReLU(), nn.Linear(width, 1)
        )
        self.cls_decoder = nn.Module()
        hidden = [
            part for _ in range(N_CLS_LAYERS - 1) for part in (nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width))
        ]
        self.cls_decoder._decoder = nn.ModuleList(hidden)
        self.cls_decoder.out_layer = nn.Linear(width, shape.n_outputs)

    def forward(self, genes: torch.Tensor, digits: torch.Tensor, *, cls_only: bool) -> torch.Tensor:
        """Rows of the last layer.

        Parameters
        ----------
        genes : (n, length) int64
            Tokens, `<cls>` first, filled up with the padding token.
        digits : (n, length) int64
            Value bins: 0 for `<cls>` and padding, 1 to n_bins - 1, n_bins for a masked value.
        cls_only : bool
            Compute the last layer for `<cls>` alone.

        Returns
        -------
        (n, length, width) float32, or (n, 1, width)
        """
        encode = self.value_encoder
        table = encode.norm(encode.linear2(torch.relu(encode.linear1(self.values[:, None]))))
        x = self.encoder.enc_norm(self.encoder.embedding(genes)) + embedding(digits, table)
        keys = (genes != self.shape.pad)[:, None, None, :]
        for layer in self.transformer_encoder.layers[:-1]:
            x = self._rows_of(layer, x, x, keys)
        return self._rows_of(self.transformer_encoder.layers[-1], x[:, :1] if cls_only else x, x, keys)

    def _rows_of(
        self, layer: nn.TransformerEncoderLayer, x: torch.Tensor, context: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        """One post-norm layer for the rows `x`, which attend to the rows `context`."""
        attention, width = layer.self_attn, self.shape.width
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        q = nn.functional.linear(x, weight[:width], bias[:width])
        k, v = nn.functional.linear(context, weight[width:], bias[width:]).split(width, dim=2)
        q, k, v = (part.unflatten(2, (self.shape.n_heads, -1)).transpose(1, 2) for part in (q, k, v))
        attended = scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2).flatten(2)
        x = layer.norm1(x + attention.out_proj(attended))
        return layer.norm2(x + layer.linear2(torch.relu(layer.linear1(x))))

    def predict_bins(self, rows: torch.Tensor) -> torch.Tensor:
        """Value bins of gene rows (..., width): (...) float32."""
        return self.decoder.fc(rows)[..., 0]

    def predict_latent(self, cls_rows: torch.Tensor) -> torch.Tensor:
        """Latents of `<cls>` rows (n, width): (n, n_outputs) float32."""
        for part in self.cls_decoder._decoder:
            cls_rows = part(cls_rows)
        return self.cls_decoder.out_layer(cls_rows)
