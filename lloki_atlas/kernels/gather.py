"""One row of A X for a block of genes, with what an iteration does to it: the inner loop of propagation.

The sums of a block stay in registers while the row's neighbours go by, each term a fused multiply-add in the order of
the graph's indices: a gene's sum is the same whatever block it is in and whatever the width of the registers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from lloki_atlas.kernels.products import LANES

WIDTHS = (64, 32, 16)  # genes of a block
_AHEAD = 8  # neighbours whose values are asked for before they are needed
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_LEAST = 2.0**-24  # the smallest number of float16 above zero


def _row_of(width: int) -> Any:  # noqa: C901, PLR0915 - one straight run of instructions
    """Instructions for `width` genes of one row, stored as float32, or as the bits of float16 (uint16)."""

    @intrinsic  # type: ignore[untyped-decorator]
    def row(
        context: Any,
        values: Any,
        indices: Any,
        weights: Any,
        first: Any,
        last: Any,
        i: Any,
        following: Any,
        kept: Any,
        observed: Any,
        change: Any,
        norm: Any,
    ) -> Any:
        signature = types.void(values, indices, weights, first, last, i, following, kept, observed, change, norm)
        return signature, partial(generate, values.dtype == types.uint16)

    def generate(half: bool, context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, integer = ir.IntType(64), ir.IntType(32)
        vector, wide = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.DoubleType(), LANES)
        stored = ir.VectorType(ir.HalfType(), LANES) if half else vector
        parts = range(width // LANES)
        zero, nothing = ir.Constant(vector, [0.0] * LANES), ir.Constant(vector, ir.Undefined)
        every_lane = ir.Constant(ir.VectorType(integer, LANES), [0] * LANES)
        values, indices, weights, following, change, norm = (
            context.make_array(signature.args[n])(context, builder, arguments[n]).data for n in (0, 1, 2, 6, 9, 10)
        )
        first, last, i, kept, observed = (arguments[n] for n in (3, 4, 5, 7, 8))

        def place(start: Any, at: Any, part: int) -> Any:
            offset = builder.add(builder.mul(at, ir.Constant(word, width)), ir.Constant(word, part * LANES))
            return builder.bitcast(builder.gep(start, [offset]), stored.as_pointer())

        def load(start: Any, at: Any, part: int) -> Any:
            found = builder.load(place(start, at, part), align=2 if half else 4)
            return builder.fpext(found, vector) if half else found

        def marked(bits: Any, part: int) -> Any:
            lanes = builder.trunc(builder.lshr(bits, ir.Constant(word, part * LANES)), ir.IntType(LANES))
            return builder.bitcast(lanes, ir.VectorType(ir.IntType(1), LANES))

        def neighbor(p: Any) -> Any:
            return builder.sext(builder.load(builder.gep(indices, [p])), word)

        kind = ir.FunctionType(vector, [vector] * 3)
        fused = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, integer, integer, integer])
        ask = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        sums = [cgutils.alloca_once(builder, vector) for _ in parts]  # the optimiser makes registers of them
        for total in sums:
            builder.store(zero, total)
        end = builder.sub(last, ir.Constant(word, 1))
        with cgutils.for_range_slice(builder, first, last, ir.Constant(word, 1)) as (p, _):
            later = builder.add(p, ir.Constant(word, _AHEAD))
            later = builder.select(builder.icmp_signed("<", later, last), later, end)
            start = builder.bitcast(place(values, neighbor(later), 0), byte)
            for offset in range(0, width * (2 if half else 4), 64):
                line = builder.gep(start, [ir.Constant(word, offset)])
                builder.call(ask, [line, *(ir.Constant(integer, flag) for flag in (0, 3, 1))])
            weight = builder.load(builder.gep(weights, [p]))
            one = builder.insert_element(nothing, weight, ir.Constant(integer, 0))
            spread = builder.shuffle_vector(one, nothing, every_lane)
            at = neighbor(p)
            for part in parts:
                builder.store(
                    builder.call(fused, [spread, load(values, at, part), builder.load(sums[part])]), sums[part]
                )
        for part in parts:
            before, seen = load(values, i, part), marked(observed, part)
            after = builder.select(marked(kept, part), builder.load(sums[part]), zero)
            if half:  # what is not zero stays so
                rounded = builder.fpext(builder.fptrunc(after, stored), vector)
                lost = builder.and_(builder.fcmp_ordered(">", after, zero), builder.fcmp_ordered("==", rounded, zero))
                after = builder.select(lost, ir.Constant(vector, [_LEAST] * LANES), rounded)
            unknown = builder.select(seen, zero, after)
            difference = builder.select(seen, zero, builder.fsub(after, before))
            after = builder.select(seen, before, after)
            builder.store(
                builder.fptrunc(after, stored) if half else after, place(following, i, part), align=2 if half else 4
            )
            for numbers, total in ((difference, change), (unknown, norm)):
                squared = builder.fpext(numbers, wide)
                squared = builder.fmul(squared, squared)
                sums_at = builder.gep(total, [ir.Constant(word, part * LANES)])
                sums_at = builder.bitcast(sums_at, wide.as_pointer())
                builder.store(builder.fadd(builder.load(sums_at, align=8), squared), sums_at, align=8)
        return context.get_dummy_value()

    return row


_row_64, _row_32, _row_16 = (_row_of(width) for width in WIDTHS)


@njit(nogil=True, cache=True)
def advance(
    indptr: NDArray[Any],
    indices: NDArray[Any],
    weights: NDArray[Any],
    values: NDArray[Any],
    following: NDArray[Any],
    start: int,
    stop: int,
    block: int,
    iteration: int,
    observed: NDArray[np.uint64],
    allowed: NDArray[np.uint64],
    frozen_at: NDArray[np.int16],
    change: NDArray[np.float64],
    norm: NDArray[np.float64],
) -> None:
    """Write rows `start` to `stop` of the next iterate of one block of genes, in-place.

    Observed entries stay, entries outside a frozen cell's support become zero. Squares of the change and of the
    unknown entries are added to `change` and `norm` (width,). `values` and `following` are (n, width) with a width of
    `WIDTHS`, float32 or the bits of float16, whose sums are float32 and rounded once an iteration; `observed` and
    `allowed` (n, words) hold one bit a gene.
    """
    width = values.shape[1]
    word, shift = block * width // 64, np.uint64(block * width % 64)
    now, then = values.reshape(values.size), following.reshape(following.size)
    for i in range(start, stop):
        kept = allowed[i, word] >> shift if 0 < frozen_at[i] <= iteration else _ALL
        seen = observed[i, word] >> shift
        first, last = indptr[i], indptr[i + 1]
        if width == 64:
            _row_64(now, indices, weights, first, last, i, then, kept, seen, change, norm)
        elif width == 32:
            _row_32(now, indices, weights, first, last, i, then, kept, seen, change, norm)
        else:
            _row_16(now, indices, weights, first, last, i, then, kept, seen, change, norm)
