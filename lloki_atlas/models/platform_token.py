"""The token of one platform, apart from the model that it belongs to."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lloki_atlas.models.autoencoder import ConditionalAutoencoder

_TABLES = ("encoder_tokens", "decoder_tokens")


@dataclass(frozen=True, eq=False)
class Token:
    """What a platform adds to a model: its row of the encoder's and of the decoder's table, each (token_size,) float32.

    `platform` is the name that the token stands for.
    """

    platform: str
    encoder: NDArray[np.float32]
    decoder: NDArray[np.float32]


def with_token(model: ConditionalAutoencoder, token: Token) -> ConditionalAutoencoder:
    """Return a copy of a model that knows one platform more, the last one; all else in it has the bytes of the model.

    Parameters
    ----------
    model : ConditionalAutoencoder
    token : Token
    """
    grown = copy.deepcopy(model)
    grown.platforms = (*model.platforms, token.platform)
    for name, row in zip(_TABLES, (token.encoder, token.decoder), strict=True):
        rows = torch.cat([getattr(model, name).weight.detach(), torch.from_numpy(row)[None]])
        setattr(grown, name, nn.Embedding.from_pretrained(rows, freeze=False))
    return grown


def only_token(model: ConditionalAutoencoder, platform: str) -> ConditionalAutoencoder:
    """Return a copy of a model that knows a new platform alone, by the mean of its tokens.

    The mean token is all of the copy that can be trained.

    Parameters
    ----------
    model : ConditionalAutoencoder
    platform : str
    """
    own = copy.deepcopy(model).requires_grad_(False)
    own.platforms = (platform,)
    for name in _TABLES:
        mean = getattr(model, name).weight.detach().mean(dim=0, keepdim=True)
        setattr(own, name, nn.Embedding.from_pretrained(mean, freeze=False))
    return own


def token_of(own: ConditionalAutoencoder) -> Token:
    """Return the token of a model that knows one platform."""
    rows = [getattr(own, name).weight.detach().numpy()[0].copy() for name in _TABLES]
    return Token(own.platforms[0], *rows)
