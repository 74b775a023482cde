"""LLOKI-CAE, frozen: encoding tile by tile."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.atlases import N_CELLS, SLICES, embedding

from lloki_atlas.models.autoencoder import ConditionalAutoencoder
from lloki_atlas.models.autoencoder_files import load_encoder
from lloki_atlas.models.encoder import FrozenEncoder
from lloki_atlas.stages.integrate import LATENT_SIZE, compute_tiles, run_tile
from lloki_atlas.stages.train import platform_name
from lloki_atlas.store.catalog import open_catalog


@pytest.fixture(scope="module")
def catalog(built):
    return open_catalog(built)


@pytest.fixture(scope="module")
def encoder(catalog):
    return load_encoder(catalog.path("models", catalog.state.models["autoencoder"]))


def test_a_cell_without_a_vector_has_none_after_encoding(catalog, encoder):
    rows = embedding(catalog, "simfish_1").copy()
    rows[[0, 5]] = np.nan
    encoded = run_tile(rows, platform_name(catalog.slice("simfish_1")), encoder)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(encoded).any(axis=1)), [0, 5])


def test_encoding_gives_128_numbers_a_cell(catalog, encoder):
    encoded = run_tile(embedding(catalog, "simfish_1"), platform_name(catalog.slice("simfish_1")), encoder)
    assert (encoded.shape, encoded.dtype) == ((N_CELLS, LATENT_SIZE), np.float32)


@settings(deadline=None, max_examples=10)
@given(st.integers(1, N_CELLS - 1))
def test_any_split_of_a_slice_is_encoded_to_the_same_bytes(cut):
    rows, encoder = np.random.default_rng(0).normal(size=(N_CELLS, 512)).astype(np.float16), random_encoder()
    parts = [run_tile(part, "a|b", encoder) for part in (rows[:cut], rows[cut:])]
    assert np.concatenate(parts).tobytes() == run_tile(rows, "a|b", encoder).tobytes()


def random_encoder():
    return FrozenEncoder(ConditionalAutoencoder(["a|b"], random_state=1))


def test_stored_vectors_are_those_of_the_whole_slice_at_once(catalog, encoder):
    for slice_id in SLICES:
        whole = run_tile(embedding(catalog, slice_id), platform_name(catalog.slice(slice_id)), encoder)
        assert whole.tobytes() == embedding(catalog, slice_id, "X_lloki").tobytes()


def test_a_stream_encodes_the_tiles_that_it_is_asked_for_in_their_order(catalog, encoder):
    record = catalog.slice("simfish_1")
    arguments = {
        "embedding_path": str(catalog.path("embeddings", record.objects["embed"])),
        "model_path": str(catalog.path("models", catalog.state.models["autoencoder"])),
        "platform": platform_name(record),
        "tile_cells": 32,
        "n_cells": N_CELLS,
    }
    whole = run_tile(embedding(catalog, "simfish_1"), platform_name(record), encoder)
    for starts in ([0, 32], [32], []):
        found = list(compute_tiles(starts=starts, **arguments))
        assert [start for start, _ in found] == starts
        for start, arrays in found:
            assert arrays["X_lloki"].tobytes() == whole[start : start + 32].tobytes()
