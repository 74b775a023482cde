"""Chunks of cells in memory: every cell in every epoch, but for those that are held out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lloki_atlas.config import AutoencoderConfig
from lloki_atlas.errors import InputError
from lloki_atlas.models.training_arrays import ArraySource

CONFIG = AutoencoderConfig(chunk_cells=300, held_out=0.2)


def source(sizes=(1000, 600, 30), *, config=CONFIG, labels=None, **options) -> ArraySource:
    """Cells whose embedding begins with their row; slices are numbered 10 times the platform."""
    platform = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    values = np.zeros((len(platform), 512), np.float32)
    values[:, 0] = np.arange(len(platform))
    names = [f"platform {code}" for code in range(len(sizes))]
    return ArraySource(values, platform, 10 * platform, names, config=config, labels=labels, **options)


def rows_of(chunks):
    return [int(row) for chunk in chunks for row in chunk.embeddings[:, 0]]


def test_every_cell_is_in_every_epoch():
    for number in (1, 2):
        assert set(rows_of(source().epoch(number))) == set(range(1630))


def test_cells_keep_their_platform_slice_and_label():
    labels = np.arange(1630) % 5
    for chunk in source(labels=labels).epoch(1):
        np.testing.assert_array_equal(chunk.slice_codes, 10 * chunk.platform)
        np.testing.assert_array_equal(chunk.labels, chunk.embeddings[:, 0] % 5)


def test_chunks_follow_from_seed_and_epoch():
    one = rows_of(source().epoch(1))
    assert rows_of(source().epoch(1)) == one
    assert rows_of(source().epoch(2)) != one
    assert rows_of(source(config=dataclasses.replace(CONFIG, random_state=1)).epoch(1)) != one


def test_held_out_cells_are_never_trained_on_and_balanced():
    cells = source(hold_out=True)
    held_out = set(rows_of(cells.held_out()))
    platform = np.concatenate([chunk.platform for chunk in cells.held_out()])
    assert not held_out & set(rows_of(cells.epoch(1)))
    assert held_out | set(rows_of(cells.epoch(1))) == set(range(1630))
    assert set(platform.tolist()) == {0, 1}
    assert sum(cells.sizes) + len(held_out) == 1630


def test_held_out_cells_are_bounded():
    held_out = source((9000, 5000), config=dataclasses.replace(CONFIG, held_out=0.7), hold_out=True).held_out()
    assert np.bincount(np.concatenate([chunk.platform for chunk in held_out])).tolist() == [2000, 2000]
    assert max(len(chunk.platform) for chunk in held_out) <= 300


@pytest.mark.parametrize(("patience", "hold_out", "held"), [(0, None, False), (3, None, True), (3, False, False)])
def test_cells_are_held_out_for_patience_unless_said_otherwise(patience, hold_out, held):
    config = dataclasses.replace(CONFIG, patience=patience)
    assert bool(source(config=config, hold_out=hold_out).held_out()) == held


def test_labels_of_another_length_are_refused():
    with pytest.raises(InputError, match="labels is int64 of shape"):
        source(labels=np.zeros(7, dtype=np.int64))
