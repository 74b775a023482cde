"""Samples for adapting: so many cells of each token, the same whatever the tiles, without those that have no vector."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.embeddings import draw_embeddings, write_embedding, write_samples

from lloki_atlas.stages import train_blocks
from lloki_atlas.stages.adapt_cells import read_sample
from lloki_atlas.stages.train_blocks import BATCH_BLOCKS

SIZES = {"A": [700, 300], "B": [400]}
TOKENS = ["A|panel", "B|panel"]
VALUES = {
    name: [draw_embeddings(n, code, seed=number) for number, n in enumerate(sizes)]
    for code, (name, sizes) in enumerate(SIZES.items())
}
STORED = [rows for parts in VALUES.values() for rows in parts]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("samples"), VALUES, tile_cells=1000)


def rows_of(values: np.ndarray) -> set[bytes]:
    return {row.astype(np.float32).tobytes() for row in values}


def test_with_room_for_all_every_cell_is_read_once(samples):
    found = read_sample(samples, TOKENS, size=10_000, random_state=0)
    assert np.bincount(found.platform).tolist() == [1000, 400]
    assert np.bincount(found.slice_codes).tolist() == [700, 300, 400]
    for code, stored in enumerate(STORED):
        assert rows_of(found.embeddings[found.slice_codes == code]) == rows_of(stored)
    assert found.embeddings.dtype == np.float32
    assert found.labels is None


@pytest.mark.parametrize("size", [1, 255, 256, 300, 600])
def test_no_token_has_more_cells_than_asked_for(samples, size):
    found = read_sample(samples, TOKENS, size=size, random_state=0)
    assert np.bincount(found.platform).tolist() == [min(size, 1000), min(size, 400)]
    for code, stored in enumerate(STORED):
        own = found.embeddings[found.slice_codes == code]
        assert rows_of(own) <= rows_of(stored)
        assert len(rows_of(own)) == len(own)


@settings(deadline=None, max_examples=8)
@given(st.integers(1, 900))
def test_the_sample_does_not_depend_on_the_tiles(tmp_path_factory, tile_cells):
    made = [
        write_samples(tmp_path_factory.mktemp("tiles"), {"B": VALUES["B"]}, tile_cells=rows)
        for rows in (400, tile_cells)
    ]
    found = [read_sample(part, ["B|panel"], size=300, random_state=0).embeddings.tobytes() for part in made]
    assert found[0] == found[1]


def test_a_sample_follows_from_its_seed(samples):
    found = [read_sample(samples, TOKENS, size=300, random_state=seed).embeddings.tobytes() for seed in (0, *range(9))]
    assert found[0] == found[1]
    assert len(set(found)) > 3


def test_the_first_slices_are_not_preferred(samples):
    drawn = [read_sample(samples, TOKENS, size=256, random_state=seed).slice_codes for seed in range(30)]
    counts = np.bincount(np.concatenate(drawn)[np.concatenate(drawn) < 2])
    assert 0.5 < counts[0] / counts[1] / (700 / 300) < 2


def test_cells_of_one_token_do_not_depend_on_the_others(samples):
    alone = read_sample([samples[2]], ["B|panel"], size=300, random_state=0).embeddings
    among = read_sample(samples, TOKENS, size=300, random_state=0)
    assert among.embeddings[among.platform == 1].tobytes() == alone.tobytes()


def test_cells_without_an_embedding_are_left_out_and_made_up_for(tmp_path):
    values = VALUES["B"][0].copy()
    values[::2] = np.nan
    path = write_embedding(tmp_path / "one.zarr", values, tile_cells=100)
    samples = [{"slice_id": "one", "token": "t", "n_cells": 400, "embedding_path": str(path)}]
    assert len(read_sample(samples, ["t"], size=1000, random_state=0).embeddings) == 200
    found = read_sample(samples, ["t"], size=150, random_state=0).embeddings
    assert len(found) == 150
    assert np.isfinite(found).all()


def test_labels_follow_their_cells(samples):
    labels = [np.arange(len(rows), dtype=np.int16) for rows in STORED]
    found = read_sample(samples, TOKENS, size=300, random_state=0, labels=labels)
    for code, row, label in zip(found.slice_codes, found.embeddings, found.labels, strict=True):
        np.testing.assert_array_equal(row, STORED[code][label].astype(np.float32))


def test_a_token_without_slices_has_no_cells_and_keeps_its_number(samples):
    found = read_sample(samples, ["C|panel", *TOKENS], size=10, random_state=0)
    assert np.bincount(found.platform).tolist() == [0, 10, 10]


def test_of_a_large_slice_only_a_few_blocks_are_read_at_a_time(tmp_path, monkeypatch):
    values = np.tile(VALUES["B"][0], (60, 1))  # 24,000 cells
    path = write_embedding(tmp_path / "large.zarr", values, tile_cells=5000)
    samples = [{"slice_id": "large", "token": "t", "n_cells": len(values), "embedding_path": str(path)}]
    seen = []

    def note(*arguments, original=train_blocks.read_row_blocks):
        seen.append(sum(stop - start for start, stop in arguments[2]))
        return original(*arguments)

    monkeypatch.setattr(train_blocks, "read_row_blocks", note)
    read_sample(samples, ["t"], size=2000, random_state=0)
    assert max(seen) <= BATCH_BLOCKS * 256
    assert sum(seen) < len(values) / 2
