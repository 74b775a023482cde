"""Embedding tile by tile: the same bytes for any split, no vector without counts, tasks that cover a slice."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from support.atlases import N_CELLS, copied, embedding, run_here

from lloki_atlas.config import PropagationConfig
from lloki_atlas.engine.plan import run_task
from lloki_atlas.errors import CheckpointError
from lloki_atlas.kernels.graph import Graph
from lloki_atlas.models.embedders import EMBEDDING_SIZE
from lloki_atlas.stages import embed
from lloki_atlas.stages.lineage import expected_objects
from lloki_atlas.stages.panels import select_panel
from lloki_atlas.stages.pipeline import plan
from lloki_atlas.store.arrays import read_arrays, read_attributes
from lloki_atlas.store.catalog import open_catalog

N, N_GENES = 20, 6
SYMBOLS = tuple("ABCDEF")


class Copying:
    """An embedder whose vectors are the diffused rows themselves, on a scale that doubles counts and adds one."""

    def transform(self, counts, totals):
        return csr_matrix(counts * 2), np.ones(counts.shape[1], np.float32)

    def embed(self, rows):
        made = np.zeros((len(rows), EMBEDDING_SIZE), np.float32)
        made[:, : rows.shape[1]] = rows
        return made


def make_case():
    random = np.random.default_rng(0)
    dense = random.poisson(0.7, (N, N_GENES)).astype(np.float32)
    dense[4] = 0
    dense[7, :5] = 0
    dense[7, 5] = 3
    weights = np.abs(random.normal(size=(N, N))).astype(np.float32) * (random.random((N, N)) < 0.3)
    graph = csr_matrix(weights)
    # the last gene is not in the reference
    panel = select_panel(csr_matrix(dense), SYMBOLS, ["exact"] * N_GENES, SYMBOLS[:5])
    return dense, weights, panel, Graph(graph.indptr.astype(np.int64), graph.indices.astype(np.int32), graph.data)


DENSE, WEIGHTS, PANEL, GRAPH = make_case()


def tile(start=0, stop=N, **settings):
    return embed.run_tile(
        PANEL, GRAPH, DENSE.sum(axis=1), Copying(), start=start, stop=stop, settings=PropagationConfig(**settings)
    )


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_rows_are_mixed_on_the_scale_of_the_embedder(alpha):
    values = 2 * DENSE[:, :5] + 1
    expected = alpha * WEIGHTS @ values + (1 - alpha) * values
    filled = DENSE[:, :5].sum(axis=1) > 0
    np.testing.assert_allclose(tile(alpha=alpha)[filled, :5], expected[filled], rtol=2e-3)


def test_observed_values_may_be_kept():
    rows = tile(keep_observed=True)[:, :5]
    observed = DENSE[:, :5] > 0
    np.testing.assert_array_equal(rows[observed], (2 * DENSE[:, :5] + 1)[observed])


def test_a_cell_without_a_count_in_a_shared_gene_has_no_vector():
    without = np.isnan(tile()).all(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(without), [4, 7])


def test_all_other_vectors_are_finite():
    rows = tile()
    assert np.isfinite(np.delete(rows, [4, 7], axis=0)).all()


def test_vectors_are_stored_as_float16():
    assert tile().dtype == np.float16


@settings(deadline=None, max_examples=20)
@given(st.sets(st.integers(1, N - 1)))
def test_any_split_into_tiles_gives_the_same_bytes(cuts):
    bounds = [0, *sorted(cuts), N]
    parts = [tile(start, stop) for start, stop in itertools.pairwise(bounds)]
    assert np.concatenate(parts).tobytes() == tile().tobytes()


@pytest.fixture
def planned(built):
    catalog = open_catalog(built)
    record = catalog.slice("simfish_1")
    return embed.plan_stage(catalog, record, expected_objects(catalog, record), embedder_digest="digest")


def test_tiles_cover_the_slice_once_and_in_order(planned):
    bounds = [(task.arguments["start"], task.arguments["stop"]) for task in planned[:-1]]
    assert bounds == [(0, 32), (32, N_CELLS)]
    assert [task.output.rows for task in planned[:-1]] == [0, 32]


def test_cells_of_tiles_add_up_to_the_slice(planned):
    assert sum(task.n_cells for task in planned) == N_CELLS


def test_the_last_task_publishes_after_all_tiles(planned):
    publish = planned[-1]
    assert (publish.function, publish.output.rows) == ("", None)
    assert publish.requires == tuple(task.name for task in planned[:-1])


def test_all_tasks_of_a_slice_fill_one_object(planned):
    assert len({(task.output.path, task.output.staging) for task in planned}) == 1


def test_a_chunk_is_a_tile(planned):
    spec = planned[0].output.specs["X_fp"]
    assert (spec.shape, spec.chunk_rows, spec.dtype) == ((N_CELLS, EMBEDDING_SIZE), 32, "float16")


def test_a_tile_larger_than_its_slice_is_cut_to_it(built):
    catalog = open_catalog(built)
    record = dataclasses.replace(catalog.slice("simfish_1"), n_cells=20)
    first, publish = embed.plan_stage(
        catalog, record, expected_objects(catalog, catalog.slice("simfish_1")), embedder_digest="digest"
    )
    assert (first.arguments["stop"], first.n_cells, first.output.specs["X_fp"].chunk_rows) == (20, 20, 20)
    assert publish.requires == (first.name,)


def test_a_stored_embedding_has_unit_vectors(built):
    rows = embedding(open_catalog(built), "simfish_1").astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-3)


def test_a_stored_embedding_is_that_of_the_whole_slice_at_once(built):
    catalog = open_catalog(built)
    (task, *_) = plan_of_embed(catalog)
    whole = embed.compute(**{**task.arguments, "start": 0, "stop": N_CELLS})["X_fp"]
    assert whole.tobytes() == embedding(catalog, "simfish_1").tobytes()


def plan_of_embed(catalog):
    """Tasks of a slice's embedding with the digest of the catalog's own embedder."""
    record = catalog.slice("simfish_1")
    path = catalog.path("models", catalog.state.models["embedder"]) / "embedder.json"
    digest = json.loads(path.read_bytes())["digest"]
    return embed.plan_stage(catalog, record, expected_objects(catalog, record), embedder_digest=digest)


def test_another_embedder_than_the_one_of_the_catalog_is_refused(built, tmp_path):
    catalog = copied(built, tmp_path / "atlas")
    (task, *_) = plan_of_embed(catalog)
    with pytest.raises(CheckpointError, match="not the one that this atlas was created with"):
        embed.compute(**{**task.arguments, "embedder_digest": "another"})


def test_only_tiles_that_are_missing_are_computed_when_a_run_continues(ingested, tmp_path, monkeypatch):
    catalog = copied(ingested, tmp_path / "atlas")
    for task in plan(catalog, slices=["simfish_1"], until="embed").tasks[:-2]:
        run_task(task)
    starts = []

    def compute(start, original=embed.compute, **arguments):
        starts.append(start)
        return original(start=start, **arguments)

    monkeypatch.setattr(embed, "compute", compute)
    catalog = run_here(plan(catalog, slices=["simfish_1"], until="embed"))
    assert starts == [32]
    assert np.isfinite(embedding(catalog, "simfish_1")).all()


def test_a_stored_embedding_says_of_which_slice_it_is(built):
    catalog = open_catalog(built)
    path = catalog.path("embeddings", catalog.slice("simmap_1").objects["embed"])
    assert read_attributes(path) == {"slice_id": "simmap_1"}
    assert set(read_arrays(path)) == {"X_fp"}
