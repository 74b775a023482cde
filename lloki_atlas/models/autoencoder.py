"""The conditional autoencoder of LLOKI-CAE.

Encoder 512 + token -> 256 -> 175 -> 128 with ReLU on every layer, decoder 128 + token -> 256 -> 175 -> 512 with a
linear output; a learned token for each platform, one table for the encoder and one for the decoder.
A platform is a (technology, gene panel), written "technology|panel".
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import skip_init

from lloki_atlas.errors import InputError

N_EMBEDDING = 512
N_LATENT = 128
HIDDEN = (256, 175)
# where the biases of the last encoder layer start: with the usual ones, around zero, half of the latent is dead from
# the outset and a cell may lose its last positive number, which leaves it without a direction
LATENT_BIAS = 0.05


class ConditionalAutoencoder(nn.Module):
    """Encoder and decoder of embeddings, conditioned on the platform.

    Parameters
    ----------
    platforms : sequence of str
        Their order numbers the tokens.
    token_size : int
    random_state : int
        Seeds the weights; the global random state of torch is neither read nor changed.
    """

    def __init__(self, platforms: Sequence[str], *, token_size: int = 10, random_state: int = 0) -> None:
        super().__init__()
        if not platforms or len(set(platforms)) != len(platforms):
            raise InputError(f"platforms have to be one or more different names, not {list(platforms)}")
        self.platforms = tuple(platforms)
        generator = torch.Generator().manual_seed(random_state % 2**63)
        self.encoder_tokens = _tokens(len(platforms), token_size, generator)
        self.decoder_tokens = _tokens(len(platforms), token_size, generator)
        self.encoder = _layers((N_EMBEDDING + token_size, *HIDDEN, N_LATENT), generator)
        self.decoder = _layers((N_LATENT + token_size, *HIDDEN, N_EMBEDDING), generator)
        with torch.no_grad():
            self.encoder[-1].bias.fill_(LATENT_BIAS)

    def encode(self, embeddings: torch.Tensor, platform: torch.Tensor) -> torch.Tensor:
        """Latents of cells.

        Parameters
        ----------
        embeddings : (n, 512) float32
        platform : (n,) int64

        Returns
        -------
        (n, 128) float32, not negative
        """
        values = torch.relu(_conditioned(self.encoder[0], embeddings, self.encoder_tokens.weight, platform))
        for layer in self.encoder[1:]:
            values = torch.relu(layer(values))
        return values

    def decode(self, latents: torch.Tensor, platform: torch.Tensor) -> torch.Tensor:
        """Embeddings of latents as a platform would show them.

        Parameters
        ----------
        latents : (n, 128) float32
        platform : (n,) int64

        Returns
        -------
        (n, 512) float32
        """
        values = torch.relu(_conditioned(self.decoder[0], latents, self.decoder_tokens.weight, platform))
        for layer in self.decoder[1:-1]:
            values = torch.relu(layer(values))
        output: torch.Tensor = self.decoder[-1](values)
        return output

    def forward(self, embeddings: torch.Tensor, platform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (n, 128) and reconstructed embeddings (n, 512)."""
        latents = self.encode(embeddings, platform)
        return latents, self.decode(latents, platform)


def _conditioned(layer: nn.Module, values: torch.Tensor, tokens: torch.Tensor, platform: torch.Tensor) -> torch.Tensor:
    """Apply a layer to [values, token of the cell's platform], without writing the tokens out for each cell."""
    width = values.shape[1]
    by_platform = functional.linear(tokens, layer.weight[:, width:], layer.bias)
    output: torch.Tensor = functional.embedding(platform, by_platform) + values @ layer.weight[:, :width].T
    return output


def _tokens(n_platforms: int, token_size: int, generator: torch.Generator) -> nn.Embedding:
    table = skip_init(nn.Embedding, n_platforms, token_size, dtype=torch.float32)
    with torch.no_grad():
        table.weight.normal_(generator=generator)
    return table


def _layers(sizes: Sequence[int], generator: torch.Generator) -> nn.ModuleList:
    """Linear layers with torch's usual start, uniform within 1 / sqrt(inputs), from an own generator."""
    layers = nn.ModuleList()
    for n_inputs, n_outputs in itertools.pairwise(sizes):
        layer = skip_init(nn.Linear, n_inputs, n_outputs, dtype=torch.float32)
        with torch.no_grad():
            layer.weight.uniform_(-(n_inputs**-0.5), n_inputs**-0.5, generator=generator)
            layer.bias.uniform_(-(n_inputs**-0.5), n_inputs**-0.5, generator=generator)
        layers.append(layer)
    return layers
