"""Cutting diffused rows back to a number of non-zero genes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.checks import array


def cap_rows(rows: ArrayLike, floor: ArrayLike, targets: ArrayLike) -> NDArray[np.float32]:
    """Keep the largest values of each row, as many as its target; the others fall to the floor.

    Parameters
    ----------
    rows
        `(n, G)` float32.
    floor
        `(n, G)` or `(G,)`: what a gene is without a count; values are ranked by how far they lie above it, equal ones
        by gene.
    targets
        `(n,)` numbers of genes to keep, see `target_nonzeros`.

    Returns
    -------
    numpy.ndarray
        `(n, G)` float32.

    Raises
    ------
    InputError
        If shapes do not fit or a target is negative.
    """
    values = array(rows, np.float32, name="rows", shape=(None, None))
    kept = array(targets, np.int32, name="targets", shape=(values.shape[0],))
    if kept.size and int(kept.min()) < 0:
        raise InputError("targets holds a negative number: give numbers of genes")
    base: NDArray[Any] = np.broadcast_to(np.asarray(floor, dtype=np.float32), values.shape)
    order = np.argsort(-(values - base), axis=1, kind="stable")
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.broadcast_to(np.arange(values.shape[1]), values.shape), axis=1)
    return np.where(places < kept[:, None], values, base).astype(np.float32)
