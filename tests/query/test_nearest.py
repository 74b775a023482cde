"""Nearest cells: equal to brute force in float64, whatever is filtered, excluded or cut into tiles."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from support.queries import CONFIG, EMPTY_ROW, GAPPY, IDS, N_CELLS, embeddings, source_of

from lloki_atlas.config import to_dict
from lloki_atlas.errors import InputError, NotFoundError
from lloki_atlas.query import nearest_cells, select, select_cells
from lloki_atlas.store.catalog import commit, open_catalog
from lloki_atlas.store.records import Change
from lloki_atlas.store.slices import SliceStore, Tile

SIZES = {"X_fp": 512, "X_lloki": 128}
METRICS = ("cosine", "euclidean")
N_QUERIES = 10


@pytest.fixture(scope="module")
def catalog(root):
    return open_catalog(root)


@pytest.fixture(scope="module")
def held(root):
    """All vectors and the table of all cells, by embedding, read without a selection."""
    return {name: embeddings(root, name) for name in SIZES}


@pytest.fixture
def copy(root, tmp_path):
    return open_catalog(shutil.copytree(root, tmp_path / "atlas"), mode="r+")


def brute_force(queries, vectors, metric):
    """(n_queries, n_cells) distances in float64; infinite to cells without an embedding."""
    queries, vectors = queries.astype(np.float64), vectors.astype(np.float64)
    if metric == "cosine":
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        distances = 1 - queries @ vectors.T
    else:
        distances = np.sqrt(((queries[:, None, :] - vectors[None, :, :]) ** 2).sum(axis=2))
    return np.where(np.isfinite(distances), distances, np.inf)


def assert_exact(found, distances, cells, n_neighbors):
    """The k smallest distances, each of the cell that is named; which of several equal cells does not matter."""
    expected = np.sort(distances, axis=1)[:, :n_neighbors]
    assert np.allclose(found.neighbors.distances[:, : expected.shape[1]], expected, atol=3e-6, rtol=3e-6)
    position = {key: row for row, key in enumerate(zip(cells["slice_id"], cells["cell"], strict=True))}
    pairs = found.to_dataframe()
    rows = np.array([position[key] for key in zip(pairs["slice_id"], pairs["cell"], strict=True)])
    assert np.allclose(distances[pairs["query"], rows], pairs["distance"], atol=3e-6, rtol=3e-6)
    assert not pairs.duplicated(["query", "slice_id", "cell"]).any()
    assert len(pairs) == np.minimum(np.isfinite(distances).sum(axis=1), n_neighbors).sum()


def chosen_queries(catalog):
    """Ten cells, of all slices."""
    numbers = [number for number in range(0, N_CELLS, 31) if number != EMPTY_ROW]
    names = [f"{slice_id}_{number:07d}" for slice_id in IDS for number in numbers]
    return select_cells(catalog, where=f"cell in {tuple(names[:N_QUERIES])!r}")


# exactness


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("embedding", SIZES)
@pytest.mark.parametrize("n_neighbors", [1, 400])
def test_arrays_find_what_brute_force_finds(catalog, held, metric, embedding, n_neighbors):
    vectors, cells = held[embedding]
    queries = np.random.default_rng(3).normal(size=(7, SIZES[embedding])).astype(np.float32)
    found = nearest_cells(catalog, queries, n_neighbors=n_neighbors, metric=metric, embedding=embedding)
    assert_exact(found, brute_force(queries, vectors, metric), cells, n_neighbors)


FILTERS = {
    "technology": ({"where": "technology != 'SimFISH'"}, lambda t: t["technology"] != "SimFISH"),
    "type": (
        {"where": "cell_type_coarse in ('Inhibitory', 'Excitatory')"},
        lambda t: t["cell_type_coarse"].isin(["Inhibitory", "Excitatory"]),
    ),
    "a column of one slice": ({"where": "depth < 0.6"}, lambda t: t["depth"].astype(float) < 0.6),
    "region": ({"region": (5, 5, 60, 90)}, lambda t: t["x"].between(5, 60) & t["y"].between(5, 90)),
    "slices": ({"slices": ["simmap_1", GAPPY]}, lambda t: t["slice_id"].isin(["simmap_1", GAPPY])),
    "an excluded slice": ({"exclude_slice": "simmap_1"}, lambda t: t["slice_id"] != "simmap_1"),
    "all of them": (
        {"where": "x > 10", "region": (0, 0, 60, 90), "slices": IDS[1:], "exclude_slice": GAPPY},
        lambda t: (t["x"] > 10) & (t["x"] <= 60) & (t["y"] <= 90) & t["slice_id"].isin(["simfish_plus_1", "simmap_1"]),
    ),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", FILTERS)
def test_filters_come_before_the_search(catalog, held, metric, name):
    options, keep = FILTERS[name]
    vectors, cells = held["X_lloki"]
    queries = np.random.default_rng(4).normal(size=(5, 128)).astype(np.float32)
    allowed = keep(cells).fillna(False).to_numpy(dtype=bool)
    distances = np.where(allowed, brute_force(queries, vectors, metric), np.inf)
    assert 15 < allowed.sum() < len(cells)
    assert_exact(nearest_cells(catalog, queries, metric=metric, **options), distances, cells, 15)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("exclude_slice", [None, "own", "simmap_1"])
def test_cells_of_the_atlas_find_what_brute_force_finds_but_themselves(catalog, held, metric, exclude_slice):
    vectors, cells = held["X_lloki"]
    query = chosen_queries(catalog)
    asked = query.to_dataframe()
    distances = brute_force(query.embedding(), vectors, metric)
    same_slice = asked["slice_id"].to_numpy()[:, None] == cells["slice_id"].to_numpy()[None, :]
    distances[same_slice & (asked["cell"].to_numpy()[:, None] == cells["cell"].to_numpy()[None, :])] = np.inf
    if exclude_slice == "own":
        distances[same_slice] = np.inf
    elif exclude_slice is not None:
        distances[:, (cells["slice_id"] == exclude_slice).to_numpy()] = np.inf
    found = nearest_cells(catalog, query, metric=metric, exclude_slice=exclude_slice, n_neighbors=20)
    assert_exact(found, distances, cells, 20)


def test_a_cell_is_not_its_own_neighbour(catalog):
    query = chosen_queries(catalog)
    pairs = nearest_cells(catalog, query, n_neighbors=400).to_dataframe()
    asked = query.to_dataframe()["cell"].to_numpy()
    assert not (pairs["cell"].to_numpy() == asked[pairs["query"]]).any()
    assert (pairs.groupby("query").size() == 4 * N_CELLS - 2).all()


def test_own_leaves_out_the_slice_of_each_query(catalog):
    query = chosen_queries(catalog)
    pairs = nearest_cells(catalog, query, exclude_slice="own", n_neighbors=400).to_dataframe()
    own = query.to_dataframe()["slice_id"].to_numpy()
    assert not (pairs["slice_id"].to_numpy() == own[pairs["query"]]).any()
    assert set(pairs["slice_id"]) == set(IDS)


def test_an_empty_cell_is_nobodys_neighbour(root, catalog):
    name = source_of(root, GAPPY).obs_names[EMPTY_ROW]
    pairs = nearest_cells(catalog, np.ones(128), n_neighbors=400).to_dataframe()
    assert name not in set(pairs["cell"])
    assert len(pairs) == 4 * N_CELLS - 1


def test_ties_go_to_the_smaller_slice_id_and_the_earlier_row(catalog, monkeypatch):
    monkeypatch.setattr(select, "_embedding_of", lambda *args: np.ones((tile_rows(args), 128), dtype=np.float32))
    found = nearest_cells(catalog, np.ones((2, 128)), n_neighbors=100).to_dataframe()
    expected = select_cells(catalog).to_dataframe()["cell"].tolist()[:100]
    assert found["cell"].tolist() == [*expected, *expected]


def test_a_cell_among_many_equal_ones_still_is_not_its_own_neighbour(catalog, monkeypatch):
    query = select_cells(catalog, slices=["simfish_1"], where="x > 30")
    monkeypatch.setattr(select, "_embedding_of", lambda *args: np.ones((tile_rows(args), 128), dtype=np.float32))
    pairs = nearest_cells(catalog, query, n_neighbors=5).to_dataframe()
    asked = query.to_dataframe()["cell"].to_numpy()
    first = select_cells(catalog).to_dataframe()["cell"].tolist()[:6]
    for position, cell in enumerate(asked):
        expected = [name for name in first if name != cell][:5]
        assert pairs["cell"][pairs["query"] == position].tolist() == expected


def tile_rows(arguments):
    catalog, slice_id, _, *bounds = arguments
    start, stop = bounds or (0, catalog.slice(slice_id).n_cells)
    return stop - start


@pytest.mark.parametrize("tile_cells", [7, 74, 1000])
@pytest.mark.parametrize("exclude_slice", [None, "own"])
def test_the_size_of_tiles_does_not_matter(catalog, monkeypatch, tile_cells, exclude_slice):
    query = chosen_queries(catalog)
    options = {"where": "y > 20", "exclude_slice": exclude_slice, "n_neighbors": 12}
    expected = nearest_cells(catalog, query, **options)

    def tiles(self):
        bounds = [(start, min(start + tile_cells, N_CELLS)) for start in range(0, N_CELLS, tile_cells)]
        return tuple(Tile(index, start, stop, (0, 0, 1, 1)) for index, (start, stop) in enumerate(bounds))

    monkeypatch.setattr(SliceStore, "tiles", tiles)
    found = nearest_cells(catalog, query, **options)
    assert np.array_equal(found.neighbors.distances, expected.neighbors.distances)
    pd.testing.assert_frame_equal(found.to_dataframe(), expected.to_dataframe())


@given(seed=st.integers(0, 1000), n_neighbors=st.integers(1, 40), metric=st.sampled_from(METRICS))
@settings(max_examples=6, deadline=None)
def test_permuting_queries_permutes_answers(catalog, seed, n_neighbors, metric):
    random = np.random.default_rng(seed)
    queries = random.normal(size=(5, 128)).astype(np.float32)
    order = random.permutation(5)
    whole = nearest_cells(catalog, queries, n_neighbors=n_neighbors, metric=metric)
    shuffled = nearest_cells(catalog, queries[order], n_neighbors=n_neighbors, metric=metric)
    assert np.array_equal(shuffled.neighbors.distances, whole.neighbors.distances[order])
    assert np.array_equal(shuffled.to_xarray()["cell"], whole.to_xarray()["cell"][order])


@given(n_neighbors=st.integers(1, 60), seed=st.integers(0, 1000))
@settings(max_examples=6, deadline=None)
def test_fewer_neighbours_are_the_first_of_more(catalog, n_neighbors, seed):
    query = np.random.default_rng(seed).normal(size=128)
    fewer, more = (nearest_cells(catalog, query, n_neighbors=k).to_dataframe() for k in (n_neighbors, 60))
    columns = ["rank", "slice_id", "cell", "distance"]
    pd.testing.assert_frame_equal(fewer[columns], more[columns].head(n_neighbors))


# fewer than asked for


@pytest.fixture(scope="module")
def few(catalog):
    """Two queries, of which one finds two cells and the other three, where five are asked for."""
    query = select_cells(catalog, slices=[GAPPY], where="age in (1, 69)")
    return nearest_cells(catalog, query, n_neighbors=5, where="age in (1, 2, 3)")


def test_what_was_not_found_has_index_minus_1_and_infinite_distance(few):
    missing = few.neighbors.indices < 0
    assert missing.shape == (2, 5)
    assert sorted(missing.sum(axis=1)) == [2, 3]
    assert np.isinf(few.neighbors.distances[missing]).all()
    assert np.isfinite(few.neighbors.distances[~missing]).all()


def test_tables_skip_what_was_not_found(few):
    pairs = few.to_dataframe()
    assert len(pairs) == 5
    assert set(pairs["cell"]) == {f"{GAPPY}_{age:07d}" for age in (1, 2, 3)}
    assert few.to_anndata().n_obs == 5


def test_datasets_show_what_was_not_found(few):
    data, missing = few.to_xarray(), few.neighbors.indices < 0
    assert np.array_equal(np.isnan(data["distance"]), missing)
    for name in ("slice_id", "cell", "technology"):
        assert np.array_equal(data[name] == "", missing)


def test_only_cells_that_were_found_are_kept(few):
    assert len(few.cells) == 3
    assert few.neighbors.indices.max() == 2


@pytest.mark.parametrize("n_neighbors", [300, 10_000])
def test_more_neighbours_than_cells_finds_all(catalog, n_neighbors):
    found = nearest_cells(catalog, np.ones((2, 128)), n_neighbors=n_neighbors)
    assert found.neighbors.indices.shape == (2, n_neighbors)
    assert len(found.to_dataframe()) == 2 * (4 * N_CELLS - 1)


def test_a_query_that_finds_nothing_leaves_all_forms_empty(catalog):
    found = nearest_cells(catalog, np.zeros(128), n_neighbors=3)  # no direction, so no cosine
    assert (found.neighbors.indices == -1).all()
    assert len(found.to_dataframe()) == found.to_anndata().n_obs == len(found.cells) == 0
    assert (found.to_xarray()["cell"] == "").all()


# what may be asked


def test_a_vector_is_one_query(catalog):
    vector = np.random.default_rng(0).normal(size=128)
    one, row = nearest_cells(catalog, vector), nearest_cells(catalog, vector[None])
    pd.testing.assert_frame_equal(one.to_dataframe(), row.to_dataframe())
    assert one.query is None


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32])
def test_numbers_of_any_type_may_be_asked(catalog, dtype):
    queries = (np.random.default_rng(0).normal(size=(3, 128)) * 4).astype(dtype)
    found = nearest_cells(catalog, queries).to_dataframe()
    pd.testing.assert_frame_equal(found, nearest_cells(catalog, queries.astype(np.float32)).to_dataframe())


def test_array_anndata_and_selection_find_the_same_in_other_slices(catalog):
    query = select_cells(catalog, slices=["simmap_1"], where="x > 50")
    forms = (query, query.embedding(), query.embedding().tolist(), query.to_anndata())
    answers = [nearest_cells(catalog, form, exclude_slice="simmap_1").to_dataframe() for form in forms]
    for answer in answers[1:]:
        pd.testing.assert_frame_equal(answer, answers[0])


def test_anndata_may_say_its_slices(catalog):
    query = chosen_queries(catalog)
    adata = query.to_anndata()
    adata.obs["slice_id"] = adata.obs["slice_id"].astype("category")
    answers = [nearest_cells(catalog, form, exclude_slice="own").to_dataframe() for form in (query, adata)]
    pd.testing.assert_frame_equal(*answers)


def test_foreign_vectors_may_find_the_very_cell(catalog):
    query = chosen_queries(catalog)
    found = nearest_cells(catalog, query.embedding(), n_neighbors=1).to_dataframe()
    assert found["cell"].tolist() == query.to_dataframe()["cell"].tolist()
    assert np.allclose(found["distance"], 0, atol=1e-6)


def test_the_answer_holds_the_queried_cells(catalog):
    query = chosen_queries(catalog)
    pd.testing.assert_frame_equal(nearest_cells(catalog, query).query, query.to_dataframe())


REFUSED = {
    "another width": (np.ones((2, 127)), {}, "128 numbers a cell"),
    "the other embedding's width": (np.ones((2, 128)), {"embedding": "X_fp"}, "512 numbers a cell"),
    "three axes": (np.ones((2, 2, 128)), {}, "shape"),
    "no row": (np.ones((0, 128)), {}, "empty"),
    "NaN": (np.array([[1.0] * 128, [np.nan] * 128]), {}, "1 of 2 query cells.*position 1"),
    "infinity": (np.full(128, np.inf), {}, "1 of 1 query"),
    "text": (np.full((1, 128), "a"), {}, "numbers"),
    "ragged rows": ([[1.0], [1.0, 2.0]], {}, "numbers"),
    "no embedding of that name": (np.ones(128), {"embedding": "X_pca"}, "choose from X_fp, X_lloki"),
    "no such metric": (np.ones(128), {"metric": "manhattan"}, "'cosine' or 'euclidean'"),
    "no neighbour": (np.ones(128), {"n_neighbors": 0}, "at least 1"),
    "fewer than no neighbour": (np.ones(128), {"n_neighbors": -3}, "at least 1"),
    "too many neighbours": (np.ones(128), {"n_neighbors": 10**13}, "at most"),
    "own slice of nobody": (np.ones(128), {"exclude_slice": "own"}, "say their slice"),
    "nothing left by the filter": (np.ones(128), {"where": "x < -1e9"}, "loosen the filter"),
    "nothing left by the region": (np.ones(128), {"region": (-9, -9, -8, -8)}, "loosen the filter"),
    "nothing left of the slices": (np.ones(128), {"slices": []}, "loosen the filter"),
    "its only slice excluded": (np.ones(128), {"slices": [GAPPY], "exclude_slice": GAPPY}, "loosen the filter"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_question_is_refused_for(catalog, name):
    query, options, words = REFUSED[name]
    with pytest.raises(InputError, match=words):
        nearest_cells(catalog, query, **options)


@pytest.mark.parametrize("options", [{"slices": ["simish_9"]}, {"exclude_slice": "simish_9"}])
def test_an_unknown_slice_is_not_found(catalog, options):
    with pytest.raises(NotFoundError, match="simish_9"):
        nearest_cells(catalog, np.ones(128), **options)


def test_a_selection_of_nothing_is_refused(catalog):
    for nothing in (select_cells(catalog, where="x < -1e9"), select_cells(catalog, slices=[])):
        with pytest.raises(InputError, match="empty"):
            nearest_cells(catalog, nothing)


def test_an_empty_cell_cannot_ask(catalog):
    with pytest.raises(InputError, match=f"1 of {N_CELLS} query cells have no embedding"):
        nearest_cells(catalog, select_cells(catalog, slices=[GAPPY]))


def test_anndata_without_the_embedding_is_refused(catalog):
    with pytest.raises(InputError, match=r"obsm\['X_lloki'\]"):
        nearest_cells(catalog, AnnData(np.ones((2, 3))))


def test_a_slice_cannot_ask_only_itself_about_others(catalog):
    query = select_cells(catalog, slices=["simmap_1"])
    with pytest.raises(InputError, match="left to search"):
        nearest_cells(catalog, query, slices=["simmap_1"], exclude_slice="own")


# forms


@pytest.mark.parametrize("metric", METRICS)
def test_the_three_forms_tell_the_same(catalog, metric):
    found = nearest_cells(catalog, chosen_queries(catalog), n_neighbors=6, metric=metric)
    pairs, adata, data = found.to_dataframe(), found.to_anndata(), found.to_xarray()
    assert pairs["query"].tolist() == np.repeat(np.arange(N_QUERIES), 6).tolist()
    assert pairs["rank"].tolist() == list(range(6)) * N_QUERIES
    assert np.array_equal(data["distance"].values.ravel(), pairs["distance"])
    assert np.array_equal(adata.obsm["spatial"], pairs[["x", "y"]])
    for name in ("slice_id", "cell", "technology"):
        assert data[name].values.ravel().tolist() == pairs[name].tolist() == adata.obs[name].tolist()
    assert adata.obs["distance"].tolist() == pairs["distance"].tolist()


def test_pairs_carry_the_labels_of_what_was_found(catalog, held):
    _, cells = held["X_lloki"]
    cells = cells.set_index("cell")
    pairs = nearest_cells(catalog, chosen_queries(catalog)).to_dataframe()
    for label in ("cell_type_coarse", "depth", "age"):
        expected = cells.loc[pairs["cell"], label]
        assert pairs[label].isna().tolist() == expected.isna().tolist()
        assert pairs[label].dropna().tolist() == expected.dropna().tolist()
    assert pairs["x"].tolist() == cells.loc[pairs["cell"], "x"].tolist()


def test_distances_ascend(catalog):
    found = nearest_cells(catalog, chosen_queries(catalog), n_neighbors=50)
    assert (np.diff(found.neighbors.distances, axis=1) >= 0).all()


# versions and models


def test_stale_embeddings_are_not_searched(copy):
    propagation = dataclasses.replace(CONFIG.propagation, alpha=0.5)
    config = to_dict(dataclasses.replace(CONFIG, propagation=propagation))
    after = commit(copy, Change(config=config), message="other settings")
    with pytest.raises(InputError, match="current embedding"):
        nearest_cells(after, np.ones(128))
    assert len(nearest_cells(copy, np.ones(128)).to_dataframe()) == 15


def test_a_slice_whose_embedding_is_stale_is_not_searched(copy):
    record = copy.slice("simmap_1")
    stale = {**record.objects, "integrate": copy.slice(GAPPY).objects["integrate"]}
    after = commit(copy, Change(slices={"simmap_1": dataclasses.replace(record, objects=stale)}), message="stale")
    found = nearest_cells(after, np.ones(128), n_neighbors=400).to_dataframe()
    assert set(found["slice_id"]) == set(IDS) - {"simmap_1"}
    assert len(found) == 3 * N_CELLS - 1


def test_a_version_before_the_run_has_nothing_to_search(root):
    with pytest.raises(InputError, match="current embedding"):
        nearest_cells(open_catalog(root, version=5), np.ones(128))


def test_a_selection_of_another_model_is_refused(copy):
    other = Change(models={"autoencoder": copy.state.models["embedder"]})
    after = commit(copy, other, message="another model")
    query = chosen_queries(copy)
    with pytest.raises(InputError, match="select the cells in version 7"):
        nearest_cells(after, query)
    assert len(nearest_cells(after, query, embedding="X_fp").to_dataframe()) == N_QUERIES * 15


def test_a_cell_of_a_copied_atlas_is_still_itself(catalog, copy):
    expected = nearest_cells(catalog, chosen_queries(catalog))
    found = nearest_cells(copy, chosen_queries(catalog))
    pd.testing.assert_frame_equal(found.to_dataframe(), expected.to_dataframe())


def test_a_row_of_another_slice_by_that_name_is_no_self(catalog, copy, monkeypatch):
    record = copy.slice("simfish_1")
    objects = {**record.objects, "ingest": copy.slice("simmap_1").objects["ingest"]}
    after = commit(copy, Change(slices={"simfish_1": dataclasses.replace(record, objects=objects)}), message="other")
    monkeypatch.setattr(select, "expected_objects", lambda catalog, record: record.objects)
    query = select_cells(catalog, slices=["simfish_1"], where="x > 40")
    found = nearest_cells(after, query, n_neighbors=1)
    assert np.allclose(found.neighbors.distances, 0, atol=1e-6)
