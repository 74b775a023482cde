"""Counter-based randomness: a chain of splitmix64 steps over words, with no state and no order.

What is random for a cell is a hash of (key, cell, gene), so it is the same for any tiles, workers or threads.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numba import njit

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_WORD = (1 << 64) - 1
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)


@njit(nogil=True, cache=True)
def absorb(state: np.uint64, word: np.uint64) -> np.uint64:
    """Return the state after one more word: splitmix64's step and finaliser (Steele, Lea & Flood 2014).

    For a fixed state this is a bijection of the word, so different words never collide.
    """
    z = (state ^ word) + _GAMMA
    z = (z ^ (z >> _S30)) * _FIRST
    z = (z ^ (z >> _S27)) * _SECOND
    return z ^ (z >> _S31)


@njit(nogil=True, cache=True)
def uniform(value: np.uint64) -> float:
    """Turn a hash into a float64 in [0, 1): its upper 53 bits."""
    return np.float64(value >> _S11) * 2.0**-53


def mix(*words: int) -> int:
    """Return the 64-bit hash of a sequence of words, for Python; kernels go on from it with `absorb`.

    Parameters
    ----------
    *words
        Integers, each taken modulo 2^64.

    Returns
    -------
    int
        From 0 to 2^64 − 1; `mix(a, b)` is `absorb(mix(a), b)`.
    """
    state = np.uint64(0)
    for word in words:
        state = np.uint64(absorb(state, np.uint64(int(word) & _WORD)))
    return int(state)


def text_key(text: str) -> int:
    """Return the key of a text, such as a slice's id: the first 8 bytes (big-endian) of the SHA-256 of its UTF-8."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
