"""The bandwidth σ of equation 1: the mean distance of random pairs of cells, or as the published code estimates it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from lloki_atlas.errors import InputError
from lloki_atlas.kernels.checks import array, finite
from lloki_atlas.kernels.hashing import absorb, mix, uniform


def sample_bandwidth(coordinates: ArrayLike, *, n_pairs: int, key: int) -> float:
    """Return the mean distance of keyed random pairs of distinct cells, the σ of equation 1.

    Pair p is drawn from hashes of (key, p), with replacement between pairs.

    Parameters
    ----------
    coordinates
        `(n_cells, 2)`, micrometre.
    n_pairs
        Number of pairs.
    key
        Key of the slice.

    Returns
    -------
    float
        Micrometre; 0 with a single cell, or if all cells lie at one place.

    Raises
    ------
    InputError
        If there are no cells or pairs, or a coordinate is not finite.
    """
    points = finite(array(coordinates, np.float32, name="coordinates", shape=(None, 2)), name="coordinates")
    if points.shape[0] == 0 or n_pairs < 1:
        raise InputError(f"{points.shape[0]} cells and {n_pairs} pairs: a bandwidth needs at least one of each")
    return float(_mean_distance(points, n_pairs, np.uint64(mix(key)))) if points.shape[0] > 1 else 0.0


def cross_bandwidth(coordinates: ArrayLike, *, n_sampled: int = 100, key: int) -> float:
    """Return the mean of the n_sampled × n_sampled distances between two keyed draws of cells.

    Cell p of set s (0 or 1) is drawn from the hash of (key, s, p), with replacement; a cell in both sets counts with
    distance 0. The published code draws its two sets of 100 from a generator, anew for each graph.

    Parameters
    ----------
    coordinates
        `(n_cells, 2)`, micrometre.
    n_sampled
        Number of cells in each of the two sets.
    key
        Key of the slice, and of the graph where each is to have its own.

    Returns
    -------
    float
        Micrometre; 0 with a single cell, or if all cells lie at one place.

    Raises
    ------
    InputError
        If there are no cells or draws, or a coordinate is not finite.
    """
    points = finite(array(coordinates, np.float32, name="coordinates", shape=(None, 2)), name="coordinates")
    if points.shape[0] == 0 or n_sampled < 1:
        raise InputError(f"{points.shape[0]} cells and {n_sampled} draws: a bandwidth needs at least one of each")
    return float(_mean_cross_distance(points, n_sampled, np.uint64(mix(key))))


@njit(nogil=True, cache=True)
def _mean_distance(points: NDArray[Any], n_pairs: int, seed: np.uint64) -> float:
    n = points.shape[0]
    total = 0.0
    for pair in range(n_pairs):
        state = absorb(seed, np.uint64(pair))
        i = int(uniform(absorb(state, np.uint64(0))) * n)
        j = int(uniform(absorb(state, np.uint64(1))) * (n - 1))
        j += j >= i
        x, y = np.float64(points[i, 0]) - points[j, 0], np.float64(points[i, 1]) - points[j, 1]
        total += math.sqrt(x * x + y * y)
    return total / n_pairs


@njit(nogil=True, cache=True)
def _mean_cross_distance(points: NDArray[Any], n_sampled: int, seed: np.uint64) -> float:
    drawn = np.empty((2, n_sampled), dtype=np.int64)
    for part in range(2):
        state = absorb(seed, np.uint64(part))
        for p in range(n_sampled):
            drawn[part, p] = int(uniform(absorb(state, np.uint64(p))) * points.shape[0])
    total = 0.0
    for i in drawn[0]:
        for j in drawn[1]:
            x, y = np.float64(points[i, 0]) - points[j, 0], np.float64(points[i, 1]) - points[j, 1]
            total += math.sqrt(x * x + y * y)
    return total / (n_sampled * n_sampled)
