"""Chunks read from stored embeddings: every cell where it belongs, in the same bytes whatever the tiles."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.embeddings import write_samples

from lloki_atlas.config import AutoencoderConfig
from lloki_atlas.errors import FormatError, InputError
from lloki_atlas.stages import train_blocks
from lloki_atlas.stages.train_blocks import read_blocks
from lloki_atlas.stages.train_cells import StoredCells

CONFIG = AutoencoderConfig(chunk_cells=300)
SIZES = {"a": [700, 300], "b": [600], "c": [20]}


def marked(slice_code: int, n: int) -> np.ndarray:
    """Rows that say of which slice and row they are."""
    values = np.zeros((n, 512), np.float16)
    values[:, 0], values[:, 1], values[:, 2] = slice_code, np.arange(n) // 64, np.arange(n) % 64
    return values


def names_of(embeddings: np.ndarray) -> list[tuple[int, int]]:
    """Slice and row of marked cells."""
    rows = embeddings[:, 1] * 64 + embeddings[:, 2]
    return list(zip(embeddings[:, 0].astype(int).tolist(), rows.astype(int).tolist(), strict=True))


def store(folder, sizes=None, *, missing=None, **options):
    """Marked slices, numbered in the order of their ids; `missing` cells have no embedding."""
    values, code = {}, 0
    for platform, slices in (sizes or SIZES).items():
        values[platform] = []
        for n in slices:
            values[platform].append(marked(code, n))
            code += 1
    for (platform, number), rows in (missing or {}).items():
        values[platform][number][rows] = np.nan
    return write_samples(folder, values, **options)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return store(tmp_path_factory.mktemp("marked"))


def epoch_of(samples, number=1, *, config=CONFIG, **options):
    return list(StoredCells(samples, config=config, **options).epoch(number))


def bytes_of(chunks):
    return [
        tuple(None if values is None else values.tobytes() for values in dataclasses.astuple(chunk)) for chunk in chunks
    ]


def all_names(chunks):
    return [name for chunk in chunks for name in names_of(chunk.embeddings)]


def test_chunks_are_what_a_step_takes(samples):
    for chunk in epoch_of(samples):
        n = len(chunk.embeddings)
        assert (chunk.embeddings.shape, chunk.embeddings.dtype) == ((n, 512), np.float32)
        assert {values.dtype for values in (chunk.platform, chunk.slice_codes)} == {np.dtype(np.int64)}
        assert chunk.platform.shape == chunk.slice_codes.shape == (n,)
        assert chunk.labels is None


def test_cells_keep_their_slice_and_platform(samples):
    for chunk in epoch_of(samples):
        assert [code for code, _ in names_of(chunk.embeddings)] == chunk.slice_codes.tolist()
        np.testing.assert_array_equal(np.array([0, 0, 1, 2])[chunk.slice_codes], chunk.platform)


def test_an_epoch_that_fits_into_the_pool_has_every_cell_once_but_for_small_platforms(samples):
    names = all_names(epoch_of(samples))
    large = [name for name in names if name[0] < 3]
    assert sorted(large) == [(code, row) for code, n in enumerate((700, 300, 600)) for row in range(n)]
    assert len(names) - len(large) == 20 * 6


@pytest.mark.parametrize("pool_cells", [300, 700, 10**6])
def test_every_chunk_holds_every_platform_in_proportion(samples, pool_cells):
    chunks = epoch_of(samples, pool_cells=pool_cells)
    assert set(all_names(chunks)) == {(c, row) for c, n in enumerate((700, 300, 600, 20)) for row in range(n)}
    for chunk in chunks:
        counts = np.bincount(chunk.platform, minlength=3)
        assert counts[2] == 20
        assert (counts[:2] >= 50).all()
        assert len(set(names_of(chunk.embeddings))) == len(chunk.platform)
        if pool_cells > 1620:
            assert counts[0] / counts[1] == pytest.approx(1000 / 600, rel=0.05)


def test_chunks_mix_cells_of_the_whole_slice(samples):
    rows = [row for code, row in names_of(epoch_of(samples)[0].embeddings) if code == 0]
    assert np.std(rows) > 100
    assert sorted(rows) != rows


def test_chunks_follow_from_seed_and_epoch(samples):
    one = bytes_of(epoch_of(samples, 1))
    assert bytes_of(epoch_of(samples, 1)) == one
    assert bytes_of(epoch_of(samples, 2)) != one
    assert bytes_of(epoch_of(samples, 1, config=dataclasses.replace(CONFIG, random_state=1))) != one


def test_an_epoch_is_the_same_whatever_was_asked_before(samples):
    config = dataclasses.replace(CONFIG, max_cells_per_technology=400)
    source = StoredCells(samples, config=config)
    for number in (1, 2):
        list(source.epoch(number))
    assert bytes_of(source.epoch(3)) == bytes_of(epoch_of(samples, 3, config=config))


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 800), st.sampled_from([300, 10**6]))
def test_tiles_change_no_byte(tmp_path_factory, tile_cells, pool_cells):
    folder = tmp_path_factory.mktemp("tiled")
    missing = {("a", 0): [0, 5, 699], ("b", 0): slice(100, 400)}
    tiled = store(folder / "tiled", missing=missing, tile_cells=tile_cells)
    whole = store(folder / "whole", missing=missing, tile_cells=5000)
    assert bytes_of(epoch_of(tiled, pool_cells=pool_cells)) == bytes_of(epoch_of(whole, pool_cells=pool_cells))


@pytest.mark.parametrize("max_cells", [2, 100, 256, 300, 512, 999])
def test_no_platform_gives_more_cells_than_it_may(samples, max_cells):
    config = dataclasses.replace(CONFIG, max_cells_per_technology=max_cells, chunk_cells=10_000)
    source = StoredCells(samples, config=config)
    assert source.sizes == tuple(min(max_cells, n) for n in (1000, 600, 20))
    (chunk,) = source.epoch(1)
    np.testing.assert_array_equal(np.bincount(chunk.platform), source.sizes)
    assert len(set(names_of(chunk.embeddings))) == sum(source.sizes)


def test_over_epochs_every_cell_has_its_turn(samples):
    config = dataclasses.replace(CONFIG, max_cells_per_technology=300)
    source = StoredCells(samples, config=config)
    seen = {name for number in range(1, 40) for name in all_names(source.epoch(number))}
    assert len(seen) == 1620


def test_slices_of_a_platform_with_tokens_of_their_own_share_what_it_may_have(tmp_path):
    samples = store(tmp_path, token_by="slice")
    config = dataclasses.replace(CONFIG, max_cells_per_technology=400, token_by="slice")
    source = StoredCells(samples, config=config)
    assert source.tokens == ("a|panel|a_0", "a|panel|a_1", "b|panel|b_0", "c|panel|c_0")
    assert source.sizes == (200, 200, 400, 20)


def test_cells_without_an_embedding_are_left_out_and_do_not_count(tmp_path):
    samples = store(tmp_path, missing={("a", 0): slice(0, 600), ("c", 0): [3]})
    source = StoredCells(samples, config=dataclasses.replace(CONFIG, max_cells_per_technology=390))
    assert source.sizes == (390, 390, 19)
    names = set(all_names(source.epoch(1)))
    assert not names & {(0, row) for row in range(600)}
    assert (3, 3) not in names


def test_a_platform_without_an_embedding_is_refused_by_name(tmp_path):
    samples = store(tmp_path, missing={("b", 0): slice(None)})
    with pytest.raises(InputError, match=r"no cell of 'b\|panel' that could be trained on"):
        epoch_of(samples)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_finite_in_part_is_refused_by_slice_and_row(tmp_path, value):
    values = [marked(0, 600), marked(1, 100)]
    values[0][523, 7] = value
    with pytest.raises(InputError, match="slice 'a_0' is not finite in part of row 523"):
        epoch_of(write_samples(tmp_path, {"a": values}))


def test_a_damaged_embedding_is_a_format_error(tmp_path):
    samples = store(tmp_path)
    chunk = next((tmp_path / "b_0.zarr" / "X_fp" / "c").glob("*/*"))
    chunk.write_bytes(chunk.read_bytes()[:100])
    with pytest.raises(FormatError, match="damaged"):
        epoch_of(samples)


def test_labels_stay_with_their_cells(samples):
    labels = [(np.arange(n) % 5 - 1).astype(np.int16) for n in (700, 300, 600, 20)]
    for chunk in epoch_of(samples, labels=labels, pool_cells=400):
        expected = [row % 5 - 1 for _, row in names_of(chunk.embeddings)]
        assert chunk.labels.tolist() == expected
        assert chunk.labels.dtype == np.int64


def test_held_out_cells_are_never_trained_on(samples):
    source = StoredCells(samples, config=CONFIG, hold_out=True)
    held_out = set(all_names(source.held_out()))
    assert held_out
    for number in range(1, 6):
        assert not held_out & set(all_names(source.epoch(number)))
    assert bytes_of(source.held_out()) == bytes_of(StoredCells(samples, config=CONFIG, hold_out=True).held_out())


def test_platforms_of_one_block_hold_nothing_out_others_a_block_at_least(samples):
    source = StoredCells(samples, config=dataclasses.replace(CONFIG, held_out=1e-3), hold_out=True)
    platform = np.concatenate([chunk.platform for chunk in source.held_out()])
    assert set(platform.tolist()) == {0, 1}
    assert source.n_held_out == len(platform)
    assert len(platform) <= 2 * 256


def test_held_out_cells_are_balanced_and_bounded(tmp_path):
    samples = store(tmp_path, {"a": [6000], "b": [3000, 3000], "c": [20]})
    config = dataclasses.replace(CONFIG, held_out=0.8, chunk_cells=700)
    source = StoredCells(samples, config=config, hold_out=True)
    chunks = source.held_out()
    sizes = [len({name for name in all_names(chunks) if name[0] in codes}) for codes in ((0,), (1, 2))]
    assert sizes == [1333, 1333]
    assert source.n_held_out == 2666
    assert max(len(chunk.platform) for chunk in chunks) <= 700


def test_nothing_is_held_out_unless_asked_for(samples):
    source = StoredCells(samples, config=CONFIG)
    assert source.held_out() == []
    assert source.n_held_out == 0


def test_a_source_that_is_left_early_leaves_no_thread(samples):
    before = threading.active_count()
    chunks = StoredCells(samples, config=CONFIG, pool_cells=300).epoch(1)
    next(chunks)
    assert threading.active_count() > before
    chunks.close()
    assert threading.active_count() == before


def test_an_epoch_does_not_read_a_slice_whole(tmp_path, monkeypatch):
    samples = store(tmp_path, {"a": [20_000], "b": [300]}, tile_cells=4096)
    read = []

    def counted(path, name, blocks, *, original=train_blocks.read_row_blocks):
        read.extend(stop - start for start, stop in blocks)
        return original(path, name, blocks)

    monkeypatch.setattr(train_blocks, "read_row_blocks", counted)
    epoch_of(samples, config=dataclasses.replace(CONFIG, max_cells_per_technology=500))
    assert sum(read) <= 4 * (500 + 256)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 15)), max_size=30, unique=True))
def test_blocks_are_read_in_any_order_and_told_by_their_place(samples, places):
    slices = np.array([code for code, _ in places], dtype=np.int64)
    starts = np.array([number * 10 for _, number in places], dtype=np.int64)
    stops = np.minimum(starts + 10, np.array([700, 300, 600, 20])[slices])
    kept = starts < stops
    slices, starts, stops = slices[kept], starts[kept], stops[kept]
    found = {place: (values, rows) for place, values, rows in read_blocks(samples, slices, starts, stops)}
    assert sorted(found) == list(range(len(slices)))
    for place, (values, rows) in found.items():
        assert rows.tolist() == list(range(starts[place], stops[place]))
        assert names_of(values) == [(slices[place], row) for row in rows]
