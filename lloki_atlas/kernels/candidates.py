"""The nearest rows found so far: a short sorted list of keys a row, and a quick look for what may enter it.

A key is a distance and an index in one word, the bits of the distance above those of the index: as distances are not
negative, words compare like (distance, index), which is the order of neighbours and their rule for ties.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from lloki_atlas.kernels.products import LANES, dot_eight

CHUNK = 64  # columns looked at together
_MISSING = np.uint64(0x7F800000FFFFFFFF)  # at infinity, index −1
_ZERO, _ONE = np.float32(0), np.float32(1)
_WORD = np.uint64(32)


def no_keys(n: int, k: int) -> NDArray[np.uint64]:
    """Return `(n, k)` keys of neighbours yet to be found."""
    return np.full((n, k), _MISSING)


def unpack_keys(keys: NDArray[np.uint64]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return `(n, k)` indices, −1 where there is none, and distances, infinite there."""
    indices, distances = np.empty(keys.shape, dtype=np.int32), np.empty(keys.shape, dtype=np.float32)
    for start in range(0, len(keys), 65536):  # what numpy needs on the way stays small
        part = slice(start, start + 65536)
        distances[part] = (keys[part] >> _WORD).astype(np.uint32).view(np.float32)
        indices[part] = keys[part].astype(np.uint32).view(np.int32)
    return indices, distances


@njit(nogil=True, cache=True)
def keep_nearest(
    line: NDArray[np.float32],
    n_columns: int,
    i: int,
    column: int,
    start: int,
    stop: int,
    keys: NDArray[np.uint64],
    column_start: int,
    worst: NDArray[np.float32],
    column_keys: NDArray[np.uint64],
) -> None:
    """Let row i and the `n_columns` rows from `column` on enter each other's lists, in-place.

    `line` (BLOCK,) are their similarities; `keys` are the lists of rows `start` to `stop`, `column_keys` those of rows
    from `column_start` on; `worst` (BLOCK,) is the distance that a column's neighbour has to beat, −∞ where the column
    has no list.
    """
    last = keys.shape[1] - 1
    limit = _distance(keys[i - start, last]) if start <= i < stop else -np.float32(np.inf)
    for begin in range(0, n_columns, CHUNK):
        found = _within(line, begin, limit, worst)
        while found != np.uint64(0):
            c = begin + np.int64(_trailing_zeros(found))
            found &= found - np.uint64(1)
            if c >= n_columns or not line[c] > _ZERO or i == column + c:
                continue
            distance = max(_ONE - line[c], _ZERO)  # rounding may put a cosine a little above 1
            if distance <= limit:
                limit = _insert(_key(distance, column + c), keys[i - start])
            if distance <= worst[c]:
                worst[c] = _insert(_key(distance, i), column_keys[column + c - column_start])


@njit(nogil=True, cache=True)
def rank_candidates(
    unit: NDArray[Any], candidates: NDArray[Any], keys: NDArray[np.uint64], start: int, stop: int
) -> None:
    """Let the named candidates of rows `start` to `stop` enter their lists, each once, in-place."""
    n_candidates = candidates.shape[1]
    others, similarities = np.empty(8, dtype=np.int64), np.empty(8, dtype=np.float32)
    for i in range(start, stop):
        for first in range(0, n_candidates, 8):
            for c in range(8):
                others[c] = candidates[i, first + c] if first + c < n_candidates else -1
                if others[c] < 0:
                    others[c] = i
            dot_eight(unit, i, others, similarities)
            for c in range(8):
                if others[c] == i or not similarities[c] > _ZERO:
                    continue
                key, known = _key(max(_ONE - similarities[c], _ZERO), others[c]), False
                for place in range(keys.shape[1]):
                    known = known or keys[i, place] == key
                if not known:
                    _insert(key, keys[i])


@njit(nogil=True, cache=True)
def worst_distances(
    keys: NDArray[np.uint64], start: int, stop: int, column: int, n_columns: int, worst: NDArray[np.float32]
) -> None:
    """Write the distance that each column's neighbour has to beat, in-place."""
    worst[:] = -np.inf
    for j in range(max(0, start - column), min(n_columns, stop - column)):
        worst[j] = _distance(keys[column + j - start, keys.shape[1] - 1])


@njit(nogil=True, cache=True)
def _insert(key: np.uint64, keys: NDArray[np.uint64]) -> np.float32:
    # what comes after the last one is dropped; the distance that is now the worst
    place = keys.shape[0] - 1
    if key < keys[place]:
        while place > 0 and keys[place - 1] > key:
            keys[place] = keys[place - 1]
            place -= 1
        keys[place] = key
    return _distance(keys[keys.shape[0] - 1])


@njit(nogil=True, cache=True)
def _key(distance: np.float32, index: int) -> np.uint64:
    return (np.uint64(_bits(distance)) << _WORD) | np.uint64(index)


@njit(nogil=True, cache=True)
def _distance(key: np.uint64) -> np.float32:
    return _number(np.uint32(key >> _WORD))


@intrinsic  # type: ignore[untyped-decorator]
def _bits(context: Any, number: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _number(context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _trailing_zeros(context: Any, word: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _within(context: Any, line: Any, begin: Any, limit: Any, worst: Any) -> Any:
    """Bits of CHUNK columns: 1 where 1 − similarity is at most `limit`, or at most the column's own in `worst`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector, word = ir.VectorType(ir.FloatType(), LANES), ir.IntType(64)
        start = [
            builder.gep(context.make_array(signature.args[n])(context, builder, arguments[n]).data, [arguments[1]])
            for n in (0, 3)
        ]

        def load(pointer: Any, offset: int) -> Any:
            place = builder.gep(pointer, [ir.Constant(word, offset)])
            return builder.load(builder.bitcast(place, vector.as_pointer()), align=4)

        nothing, first_lane = ir.Constant(vector, ir.Undefined), ir.Constant(ir.IntType(32), 0)
        every_lane = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        limits = builder.shuffle_vector(builder.insert_element(nothing, arguments[2], first_lane), nothing, every_lane)
        ones = ir.Constant(vector, [1.0] * LANES)
        found = ir.Constant(word, 0)
        for offset in range(0, CHUNK, LANES):
            distance = builder.fsub(ones, load(start[0], offset))
            near = builder.or_(
                builder.fcmp_ordered("<=", distance, limits),
                builder.fcmp_ordered("<=", distance, load(start[1], offset)),
            )
            bits = builder.zext(builder.bitcast(near, ir.IntType(LANES)), word)
            found = builder.or_(found, builder.shl(bits, ir.Constant(word, offset)))
        return found

    return types.uint64(line, begin, limit, worst), generate
