"""How much structure a platform shares with others, or whether its kinds of cells are among theirs.

Nearest cells, and mutual ones, exist for any numbers, so their being there says nothing. What is asked is how much
closer the cells are to those of another platform than mirrored copies of themselves, which have the same mean, spread
and shape, but their principal axes point either way at random. The answer is 0 where the platforms have nothing to do
with each other, and 1 where they have the very same cells.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch

from lloki_atlas.errors import InputError
from lloki_atlas.models.mutual import Index
from lloki_atlas.models.step import Chunk
from lloki_atlas.models.training_chunks import keyed

# cells of a platform that are compared, and mirrored copies that they are compared with
SAMPLE_CELLS = 700
N_COPIES = 8
# platforms of the atlas that are compared with each other: the pairs grow with the square
MAX_JUDGES = 8
# What a new platform has to share with the closest of the atlas, relative to the least that one of these shares with
# the others. Measured: real slices of mouse brain have 0.75 and more of it, a simulated one with 92 % zeros 0.45, human
# lung 0.5, slices whose gene names are permuted 0.2, 0.4 and (with 33 genes) 0.7, random numbers 0.0. What is between
# this and 1 is taken with a warning
LEAST_SHARE = 0.4
# the same where the atlas has one platform, of what two halves of it share
LEAST_OF_HALVES = 0.15
# standard errors by which it has to be less to be refused, or warned of
MARGIN = 2.0


def shared_structure(
    rows: torch.Tensor, others: torch.Tensor, *, generator: np.random.Generator
) -> tuple[float, float]:
    """How much closer cells are to others than mirrored copies of them, as a share of how much closer they could be.

    Parameters
    ----------
    rows : (n, d) float32
        At least two cells.
    others : (m, d) float32
    generator : numpy.random.Generator
        Draws the copies.

    Returns
    -------
    score, its standard error : float
    """
    directions = torch.nn.functional.normalize(others - others.mean(dim=0))
    left, lengths, axes = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)

    def closest(signs: torch.Tensor) -> torch.Tensor:
        copy = torch.nn.functional.normalize((left * (lengths * signs)) @ axes)
        return (copy @ directions.T).max(dim=1).values

    found = closest(torch.ones_like(lengths))
    drawn = torch.from_numpy(generator.choice(np.array([-1, 1], np.float32), size=(N_COPIES // 2, len(lengths))))
    signs = torch.cat([drawn, -drawn])  # so that each axis is mirrored in half of the copies
    copies = torch.stack([closest(part) for part in signs]).mean(dim=0)
    room = max(1 - copies.mean().item(), 1e-6)
    return (found - copies).mean().item() / room, (found - copies).std().item() / math.sqrt(len(rows)) / room


def check_structure(
    platform: str, cells: Chunk, atlas: Chunk, *, names: tuple[str, ...], random_state: int
) -> dict[str, float]:
    """Refuse a platform that shares clearly less with the atlas than the platforms of the atlas do with each other.

    Parameters
    ----------
    platform : str
        Name of the new platform.
    cells, atlas : Chunk
        Cells of the new platform, and of those of the atlas.
    names : tuple of str
        Of the platforms of the atlas.
    random_state : int

    Returns
    -------
    dict
        `structure`: what it shares with the closest platform, and its `structure_error`; `structure_of_atlas`: the
        least that a platform of the atlas shares with its closest.

    Raises
    ------
    InputError
        Naming both numbers.
    """
    groups = [
        _sample(atlas, np.flatnonzero(atlas.platform == code), random_state) for code in np.unique(atlas.platform)
    ]
    own = _sample(cells, np.arange(len(cells.embeddings)), random_state)
    found, error = max(_compare(own, group, random_state) for group in groups)
    least, share = _least(groups, random_state)
    if found + MARGIN * error < share * least:
        raise InputError(
            f"'{platform}' shares no structure with the atlas: {found:.2f} with the closest of its platforms "
            f"({', '.join(names)}), which share at least {least:.2f} among themselves (0: nothing, 1: the same cells). "
            "Check gene symbols, organism and gene map; if they are right, train a new model with `lloki-atlas train`"
        )
    if found + MARGIN * error < least:
        warnings.warn(
            f"'{platform}' shares less structure with the atlas ({found:.2f}) than any of its platforms ({least:.2f}): "
            "look at its embedding before it is used, and check gene symbols, organism and gene map",
            stacklevel=3,
        )
    return {"structure": found, "structure_error": error, "structure_of_atlas": least}


def _least(groups: list[torch.Tensor], random_state: int) -> tuple[float, float]:
    """The least that one of these platforms shares with its closest, and the share of it that is asked for."""
    if len(groups) == 1:
        halves = groups[0][0::2], groups[0][1::2]
        return _compare(*halves, random_state)[0], LEAST_OF_HALVES
    drawn = keyed(random_state, "judges").permutation(len(groups))[:MAX_JUDGES]
    judges = [groups[number] for number in np.sort(drawn)]
    closest = [max(_compare(own, other, random_state)[0] for other in judges if other is not own) for own in judges]
    return min(closest), LEAST_SHARE


def _compare(own: torch.Tensor, others: torch.Tensor, random_state: int) -> tuple[float, float]:
    if min(len(own), len(others)) < 2:
        return 0.0, 0.0
    return shared_structure(own, others, generator=keyed(random_state, "mirrored copies"))


def _sample(cells: Chunk, rows: Index, random_state: int) -> torch.Tensor:
    drawn = keyed(random_state, "structure").permutation(rows)[:SAMPLE_CELLS]
    return torch.from_numpy(np.asarray(cells.embeddings[drawn], dtype=np.float32))
