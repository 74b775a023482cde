"""Products of rows with a block of other rows, summed over dimensions in ascending order: the inner loop of a search.

A tile of partial sums stays in registers while it runs over the dimensions, one fused multiply-add a pair of rows
and dimension. Each pair has a lane of its own and products commute, so a similarity has the same bits whichever of
its rows is left or right, wherever the two stand, and however wide the machine's registers are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

BLOCK = 256  # columns of a block
_WIDE = bool(llvm.get_host_cpu_features().get("avx512f"))
LANES = 16 if _WIDE else 8  # float32 in a register
ROWS = 12 if _WIDE else 6  # rows of a tile: ROWS × 2 registers of sums, and room for what they are made of
COLUMNS = 2 * LANES
_DEPTH = 256  # dimensions between two visits of a tile: ROWS + COLUMNS of them fit in the first-level cache
_ZERO = np.float32(0)


@njit(nogil=True, cache=True)
def pack(rows: NDArray[Any], column: int, width: int, panel: NDArray[np.float32]) -> None:
    """Lay `width` ≤ BLOCK rows from `column` on side by side, in-place.

    `panel` (BLOCK × d) holds slivers of COLUMNS rows, in each one dimension after the other; rows that are not there
    are zero.
    """
    depth = rows.shape[1]
    for first in range(0, BLOCK, COLUMNS):
        sliver = panel[first * depth : (first + COLUMNS) * depth]
        n = max(0, min(COLUMNS, width - first))
        if n < COLUMNS:
            sliver[:] = _ZERO
        for begin in range(0, depth, 16):  # short runs: the lines that are written stay in cache
            end = min(begin + 16, depth)
            for c in range(n):
                row = rows[column + first + c]
                for d in range(begin, end):
                    sliver[d * COLUMNS + c] = row[d]


@njit(nogil=True, cache=True)
def product_block(
    rows: NDArray[Any],
    first: int,
    height: int,
    panel: NDArray[np.float32],
    block: NDArray[np.float32],
    squares: bool,
) -> None:
    """Inner products of rows `first` to `first + height` with a panel, or squares of their distances, in-place.

    `rows` (n, d) has ROWS − 1 more rows behind the last one, of any content; `block` has the shape (≥ height + ROWS,
    BLOCK).
    """
    depth = rows.shape[1]
    left, sums = rows.reshape(rows.size), block.reshape(block.size)
    if depth == 0:
        sums[:] = _ZERO
    for start in range(0, depth, _DEPTH):
        n, add = min(_DEPTH, depth - start), start > 0
        for c in range(0, BLOCK, COLUMNS):
            sliver = c * depth + start * COLUMNS
            for r in range(0, height, ROWS):
                place, at = (first + r) * depth + start, r * BLOCK + c
                if squares:
                    _square_tile(left, place, depth, panel, sliver, n, sums, at, add)
                else:
                    _dot_tile(left, place, depth, panel, sliver, n, sums, at, add)


@njit(nogil=True, cache=True)
def dot_eight(rows: NDArray[Any], i: int, others: NDArray[Any], out: NDArray[np.float32]) -> None:
    """Inner products of row i with eight others into `out` (8,), with the bits that `product_block` gives them."""
    # eight sums at a time: one alone would wait for itself at every step
    row = rows[i]
    a, b, c, d = rows[others[0]], rows[others[1]], rows[others[2]], rows[others[3]]
    e, f, g, h = rows[others[4]], rows[others[5]], rows[others[6]], rows[others[7]]
    s = t = u = v = w = x = y = z = _ZERO
    for n in range(row.shape[0]):
        value = row[n]
        s, t, u, v = _fused(value, a[n], s), _fused(value, b[n], t), _fused(value, c[n], u), _fused(value, d[n], v)
        w, x, y, z = _fused(value, e[n], w), _fused(value, f[n], x), _fused(value, g[n], y), _fused(value, h[n], z)
    out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7] = s, t, u, v, w, x, y, z


@intrinsic  # type: ignore[untyped-decorator]
def _fused(context: Any, left: Any, right: Any, total: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * 3)
        fused = cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.f32")
        return builder.call(fused, arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


def _tile_of(term: Callable[[Any, Any, Any, Any, Any], Any]) -> Any:
    """ROWS × COLUMNS sums of `term` over some dimensions, written as LLVM's own vectors.

    No loop in numba keeps a tile in registers: the compiler spills it, and the sums then wait for the cache.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        context: Any, left: Any, at: Any, stride: Any, panel: Any, sliver: Any, n: Any, sums: Any, out: Any, add: Any
    ) -> Any:
        return types.void(left, at, stride, panel, sliver, n, sums, out, add), generate

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector, word = ir.VectorType(ir.FloatType(), LANES), ir.IntType(64)
        places = [(r, v) for r in range(ROWS) for v in range(2)]

        def pointer(array: int, offset: int) -> Any:
            data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
            return builder.gep(data, [arguments[offset]])

        def vectors(start: Any, offset: Any) -> Any:
            return builder.bitcast(builder.gep(start, [offset]), vector.as_pointer())

        rows, columns, result = pointer(0, 1), pointer(3, 4), pointer(6, 7)
        stored = {(r, v): vectors(result, ir.Constant(word, r * BLOCK + v * LANES)) for r, v in places}
        sums = {
            place: cgutils.alloca_once(builder, vector) for place in places
        }  # the optimiser makes registers of them
        with builder.if_else(arguments[8]) as (then, otherwise):
            with then:
                for place in places:
                    builder.store(builder.load(stored[place], align=4), sums[place])
            with otherwise:
                for place in places:
                    builder.store(ir.Constant(vector, [0.0] * LANES), sums[place])
        kind = ir.FunctionType(vector, [vector] * 3)
        fused = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
        nothing, first_lane = ir.Constant(vector, ir.Undefined), ir.Constant(ir.IntType(32), 0)
        every_lane = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        offsets = [builder.mul(arguments[2], ir.Constant(word, r)) for r in range(ROWS)]
        with cgutils.for_range(builder, arguments[5]) as loop:
            step = builder.mul(loop.index, ir.Constant(word, COLUMNS))
            right = [
                builder.load(vectors(columns, builder.add(step, ir.Constant(word, v * LANES))), align=4)
                for v in range(2)
            ]
            for r in range(ROWS):
                value = builder.load(builder.gep(rows, [builder.add(offsets[r], loop.index)]))
                one = builder.insert_element(nothing, value, first_lane)
                spread = builder.shuffle_vector(one, nothing, every_lane)
                for v in range(2):
                    builder.store(term(builder, fused, spread, right[v], builder.load(sums[r, v])), sums[r, v])
        for place in places:
            builder.store(builder.load(sums[place]), stored[place], align=4)
        return context.get_dummy_value()

    return tile


def _product(builder: Any, fused: Any, left: Any, right: Any, total: Any) -> Any:
    return builder.call(fused, [left, right, total])


def _square(builder: Any, fused: Any, left: Any, right: Any, total: Any) -> Any:
    difference = builder.fsub(left, right)
    return builder.call(fused, [difference, difference, total])


_dot_tile, _square_tile = _tile_of(_product), _tile_of(_square)
