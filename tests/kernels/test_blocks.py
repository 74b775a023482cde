from __future__ import annotations

import numpy as np
import pytest

from lloki_atlas.kernels import blocks
from lloki_atlas.kernels.blocks import MemoryBlocks, block_width, stored_dtype
from lloki_atlas.store.scratch import ScratchBlocks

SHAPE = {"n_cells": 7, "n_blocks": 3, "width": 16}


@pytest.fixture(params=["memory", "scratch"])
def make(request, tmp_path):
    def of(storage="float32"):
        if request.param == "memory":
            return MemoryBlocks(**SHAPE, storage=storage)
        return ScratchBlocks(tmp_path / "blocks", **SHAPE, storage=storage)

    return of


def values(seed, dtype=np.float32):
    return np.random.default_rng(seed).integers(1, 1000, (7, 16)).astype(dtype)


@pytest.mark.parametrize(("storage", "limits"), [("float32", (64, 128)), ("float16", (128, 256))])
def test_a_block_is_as_wide_as_fits_in_cache_and_never_narrower_than_sixteen(storage, limits, monkeypatch):
    monkeypatch.setattr(blocks, "CACHE_BYTES", 64 * 64 * 4)
    one, two = limits
    assert [block_width(n, storage) for n in (1, one, one + 1, two, two + 1)] == [64, 64, 32, 32, 16]
    assert block_width(10**9, storage) == 16


def test_blocks_are_wide_for_slices_of_common_size():
    assert block_width(50_000, "float32") == 64
    assert block_width(500_000, "float32") == 16


def test_half_precision_is_kept_as_its_bits():
    assert (stored_dtype("float32"), stored_dtype("float16")) == (np.float32, np.uint16)


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_blocks_are_zero_at_first(make, storage):
    store = make(storage)
    for block in range(3):
        found = store.read(block)
        assert (found.shape, found.dtype) == ((7, 16), stored_dtype(storage))
        assert not found.any()


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_what_is_written_is_read(make, storage):
    store, dtype = make(storage), stored_dtype(storage)
    store.write_rows(1, 0, values(1, dtype)[:4])
    store.write_rows(1, 4, values(1, dtype)[4:])
    np.testing.assert_array_equal(store.read(1), values(1, dtype))
    assert not store.read(0).any()
    assert not store.read(2).any()


def test_rows_of_a_wider_array_are_written_too(make):
    store, wide = make(), np.hstack([values(1), values(2), values(3)])
    for block in range(3):
        store.write_rows(block, 0, wide[:, 16 * block : 16 * (block + 1)])
    np.testing.assert_array_equal(np.hstack([store.read_rows(block, 0, 7) for block in range(3)]), wide)


def test_a_replaced_block_is_read_and_another_array_is_given_back(make):
    store, first, second = make(), values(1), values(2)
    spare = store.replace(0, first)
    assert (spare.shape, spare.dtype) == ((7, 16), np.float32)
    spare[:] = second
    store.replace(1, spare)
    np.testing.assert_array_equal(store.read(0).copy(), values(1))
    np.testing.assert_array_equal(store.read(1).copy(), values(2))


def test_one_block_after_the_other_is_replaced_while_it_is_read(make):
    """As an iteration does: read, write the next values into a spare array, replace."""
    store, spare = make(), np.empty((7, 16), np.float32)
    for block in range(3):
        store.write_rows(block, 0, values(block))
    for _ in range(2):
        for block in range(3):
            np.multiply(store.read(block), 2, out=spare)
            spare = store.replace(block, spare)
    for block in range(3):
        np.testing.assert_array_equal(store.read_rows(block, 0, 7), 4 * values(block))


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (2, 5), (6, 7), (3, 3)])
def test_rows_of_a_block_are_read(make, start, stop):
    store = make()
    store.write_rows(2, 0, values(5))
    np.testing.assert_array_equal(store.read_rows(2, start, stop), values(5)[start:stop])
