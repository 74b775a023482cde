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
from support.atlases import CONFIG, N_CELLS, copied, embedding, new_catalog, run_here, with_settings

from lloki_atlas.config import PropagationConfig, TileConfig
from lloki_atlas.engine.plan import run_task
from lloki_atlas.errors import CheckpointError
from lloki_atlas.kernels.graph import Graph
from lloki_atlas.kernels.rows import Rows
from lloki_atlas.models.embedders import EMBEDDING_SIZE
from lloki_atlas.stages import embed, embed_tasks
from lloki_atlas.stages.lineage import expected_objects
from lloki_atlas.stages.panels import PanelCounts, select_panel
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
    return embed_tasks.plan_stage(catalog, record, expected_objects(catalog, record), embedder_digest="digest")


def test_tiles_cover_the_slice_once_and_in_order(planned):
    bounds = [(task.arguments["start"], task.arguments["stop"]) for task in planned[:-1]]
    assert bounds == [(0, 32), (32, N_CELLS)]
    assert [task.output.tiles for task in planned[:-1]] == [(0,), (32,)]


def test_cells_of_tiles_add_up_to_the_slice(planned):
    assert sum(task.n_cells for task in planned) == N_CELLS


def test_the_last_task_publishes_after_all_tiles(planned):
    publish = planned[-1]
    assert (publish.function, publish.output.tiles) == ("", ())
    assert publish.requires == tuple(task.name for task in planned[:-1])


def test_all_tasks_of_a_slice_fill_one_object(planned):
    assert len({(task.output.path, task.output.staging) for task in planned}) == 1


def test_a_chunk_is_a_tile(planned):
    spec = planned[0].output.specs["X_fp"]
    assert (spec.shape, spec.chunk_rows, spec.dtype) == ((N_CELLS, EMBEDDING_SIZE), 32, "float16")


def test_a_tile_larger_than_its_slice_is_cut_to_it(built):
    catalog = open_catalog(built)
    record = dataclasses.replace(catalog.slice("simfish_1"), n_cells=20)
    first, publish = embed_tasks.plan_stage(
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
    return embed_tasks.plan_stage(catalog, record, expected_objects(catalog, record), embedder_digest=digest)


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


def lazy_panel():
    """The panel whose counts are read when they are sliced."""
    counts = Rows(PANEL.counts.shape, lambda start, stop: PANEL.counts[start:stop])
    return PanelCounts(counts, PANEL.shared, PANEL.symbols)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_counts_that_are_read_when_sliced_give_the_same_bytes(alpha):
    made = embed.run_tile(
        lazy_panel(),
        GRAPH,
        DENSE.sum(axis=1),
        Copying(),
        start=3,
        stop=17,
        settings=PropagationConfig(alpha=alpha),
    )
    assert made.tobytes() == tile(3, 17, alpha=alpha).tobytes()


TARGETS = np.random.default_rng(1).integers(0, 6, N).astype(np.int32)


def capped(start=0, stop=N, *, graph=GRAPH, **given_settings):
    return embed.run_tile(
        PANEL,
        graph,
        DENSE.sum(axis=1),
        Copying(),
        start=start,
        stop=stop,
        settings=PropagationConfig(cap_final=True, **given_settings),
        targets=TARGETS[start:stop],
    )


def without_edges(rows):
    weights = WEIGHTS.copy()
    weights[rows] = 0
    graph = csr_matrix(weights)
    return weights, Graph(graph.indptr.astype(np.int64), graph.indices.astype(np.int32), graph.data)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("bare", [[], [0], [5, 6, N - 1]], ids=["all joined", "first alone", "some alone"])
def test_a_capped_row_keeps_its_largest_values_above_the_floor(alpha, bare):
    weights, graph = without_edges(bare)
    rows = capped(graph=graph, alpha=alpha)[:, :5].astype(np.float64)
    floor = (alpha * weights.sum(axis=1) + 1 - alpha)[:, None] * np.ones(5)
    values = 2.0 * DENSE[:, :5] + 1
    whole = alpha * weights.astype(np.float64) @ values + (1 - alpha) * values
    has_vector = DENSE[:, :5].any(axis=1)
    for i in np.flatnonzero(has_vector):
        above = np.abs(rows[i] - floor[i]) > 4e-3 * floor[i] + 1e-3
        assert above.sum() <= TARGETS[i]
        order = np.argsort(-(whole[i] - floor[i]), kind="stable")
        expected = floor[i].copy()
        expected[order[: TARGETS[i]]] = whole[i, order[: TARGETS[i]]]
        np.testing.assert_allclose(rows[i], expected, rtol=2e-3, atol=1e-3)


def test_a_cap_without_the_setting_does_nothing():
    made = embed.run_tile(
        PANEL, GRAPH, DENSE.sum(axis=1), Copying(), start=0, stop=N, settings=PropagationConfig(), targets=TARGETS
    )
    assert made.tobytes() == tile().tobytes()


def test_any_split_of_capped_rows_gives_the_same_bytes():
    parts = [capped(start, stop) for start, stop in ((0, 1), (1, 9), (9, N))]
    assert np.concatenate(parts).tobytes() == capped().tobytes()


def plain_vectors():
    """Embeddings of the cells alone, not of length 1, so that nothing hides in a length."""
    return embed.run_plain(PANEL, DENSE.sum(axis=1), Copying(), start=0, stop=N)


def test_vectors_without_diffusion_are_those_of_single_cells():
    made = plain_vectors()
    filled = DENSE[:, :5].any(axis=1)
    assert (made.dtype, made.shape) == (np.float32, (N, EMBEDDING_SIZE))
    np.testing.assert_array_equal(made[filled, :5], (2 * DENSE[:, :5] + 1)[filled])
    assert np.isnan(made[~filled]).all()
    part = embed.run_plain(PANEL, DENSE.sum(axis=1), Copying(), start=4, stop=9)
    assert part.tobytes() == made[4:9].tobytes()


def diffused(start=0, stop=N, *, alpha=1.0):
    settings = PropagationConfig(alpha=alpha, diffuse="embedding")
    return embed.diffuse_embedding(GRAPH, plain_vectors(), start=start, stop=stop, settings=settings)


def plainly_diffused(weights, vectors, alpha):
    """α A Z + (1 − α) Z of length 1, in float64; cells without a vector add nothing and have none."""
    missing = np.isnan(vectors).any(axis=1)
    Z = np.where(missing[:, None], 0, vectors).astype(np.float64)
    mixed = alpha * weights.astype(np.float64) @ Z + (1 - alpha) * Z
    mixed[missing] = np.nan
    mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
    return mixed


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_diffused_vectors_are_the_mixture_of_length_one(alpha):
    np.testing.assert_allclose(diffused(alpha=alpha), plainly_diffused(WEIGHTS, plain_vectors(), alpha), atol=1e-3)
    assert diffused(alpha=alpha).dtype == np.float16


@settings(deadline=None, max_examples=10)
@given(st.sets(st.integers(1, N - 1), max_size=4))
def test_any_split_of_diffused_vectors_gives_the_same_bytes(cuts):
    parts = [diffused(start, stop, alpha=0.6) for start, stop in itertools.pairwise([0, *sorted(cuts), N])]
    assert np.concatenate(parts).tobytes() == diffused(alpha=0.6).tobytes()


def test_a_vector_that_nothing_is_left_of_is_none():
    _, graph = without_edges([2])
    made = embed.diffuse_embedding(
        graph, plain_vectors(), start=0, stop=N, settings=PropagationConfig(diffuse="embedding")
    )
    assert np.isnan(made[2]).all()


@pytest.fixture(scope="module")
def propagated(ingested, tmp_path_factory):
    """An atlas up to its graphs."""
    root = tmp_path_factory.mktemp("propagated") / "atlas"
    run_here(plan(copied(ingested, root), until="propagate"))
    return root


@pytest.fixture
def atlas(propagated, tmp_path):
    def of(**given_settings):
        catalog = copied(propagated, tmp_path / f"atlas{len(list(tmp_path.iterdir()))}")
        return with_settings(catalog, "propagation", **given_settings)

    return of


def stored(catalog, slice_id="simmap_1"):
    return embedding(run_here(plan(catalog, until="embed")), slice_id)


def stored_graph(catalog):
    arrays = read_arrays(catalog.path("graphs", catalog.slice("simmap_1").objects["propagate"]))
    return csr_matrix((arrays["weights"], arrays["indices"], arrays["indptr"]), shape=(N_CELLS, N_CELLS)).toarray()


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_stored_vectors_that_were_diffused_are_the_mixture_of_those_without_diffusion(atlas, alpha):
    catalog = atlas(diffuse="embedding", alpha=alpha)
    tasks = [task for task in plan(catalog, slices=["simmap_1"], until="embed").tasks if "plain" in task.name]
    assert [task.name for task in tasks] == [f"embed/simmap_1/plain/{part}" for part in (0, 32, "publish")]
    for task in tasks:
        run_task(task)
    plain = read_arrays(tasks[-1].output.path, ["plain"])["plain"]
    expected = plainly_diffused(stored_graph(catalog), plain, alpha)
    np.testing.assert_allclose(stored(catalog), expected, atol=1e-3)


def test_diffusion_after_the_embedder_is_another_than_before_it(atlas):
    after, before = (stored(atlas(diffuse=diffuse)).astype(np.float32) for diffuse in ("embedding", "counts"))
    assert np.abs(after - before).max() > 0.01
    assert (after * before).sum(axis=1).min() > 0.5


def test_without_weight_there_is_no_diffusion_in_either_order(atlas):
    after, before = (stored(atlas(diffuse=diffuse, alpha=0.0)) for diffuse in ("embedding", "counts"))
    np.testing.assert_allclose(after, before, atol=1e-3)


@pytest.mark.parametrize("setting", [{"diffuse": "embedding"}, {"cap_final": True}], ids=str)
def test_other_tiles_of_the_source_give_the_same_vectors(atlas, setting, sources, tmp_path):
    config = dataclasses.replace(
        CONFIG,
        tile=TileConfig(tile_cells=17),
        propagation=dataclasses.replace(CONFIG.propagation, **setting),
    )
    other = new_catalog(tmp_path / "in-small-tiles", sources, config=config)
    assert stored(other).tobytes() == stored(atlas(**setting)).tobytes()


def test_vectors_without_diffusion_are_gone_at_the_end(atlas):
    catalog = run_here(plan(atlas(diffuse="embedding"), until="embed"))
    assert not list((catalog.root / "staging").glob("*"))
    assert plan(catalog, until="embed").tasks == ()


@pytest.mark.parametrize("done", [1, 3, 4, 5])
def test_an_interrupted_diffusion_of_vectors_goes_on_with_the_same_bytes(atlas, done):
    expected, catalog = stored(atlas(diffuse="embedding")), atlas(diffuse="embedding")
    for task in plan(catalog, slices=["simmap_1"], until="embed").tasks[:done]:
        run_task(task)
    assert stored(catalog).tobytes() == expected.tobytes()
    assert not list((catalog.root / "staging").glob("*"))


def test_tiles_without_diffusion_that_come_late_do_nothing(atlas):
    catalog = atlas(diffuse="embedding")
    tasks = plan(catalog, until="embed").tasks
    done = run_here(plan(catalog, until="embed"))
    for task in tasks:
        assert run_task(task) == task.name
    assert not list((done.root / "staging").glob("*"))


def test_cells_of_both_steps_are_counted_once(atlas):
    tasks = plan(atlas(diffuse="embedding"), slices=["simmap_1"], until="embed").tasks
    assert sum(task.n_cells for task in tasks) == N_CELLS


def test_a_cap_changes_stored_vectors(atlas):
    assert stored(atlas(cap_final=True)).tobytes() != stored(atlas()).tobytes()
