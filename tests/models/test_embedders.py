"""Embedders: the reference embedder against its dense textbook form, rows on their own, plug-ins, scGPT end to end."""

from __future__ import annotations

import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from support.atlases import CONFIG, add_slice, copied, embedding, run_here, with_settings
from support.checkpoints import write_checkpoint

from lloki_atlas.config import EmbedderConfig
from lloki_atlas.errors import CheckpointError, InputError
from lloki_atlas.models import embedders, streaming
from lloki_atlas.models.embedders import (
    CLIP,
    EMBEDDING_SIZE,
    SD_FLOOR,
    ReferenceFactors,
    ReferenceFactory,
    blockwise_product,
    embedder_factory,
    log_normalized,
    unit_rows,
)
from lloki_atlas.stages.create import create_catalog
from lloki_atlas.stages.pipeline import plan

N_GENES, N_FACTORS = 23, 6
SYMBOLS = tuple(f"GENE{gene:02d}" for gene in range(N_GENES))


def counts_of(n_cells, seed, *, dropped=0.4):
    """Counts with an empty cell, a gene nobody has, one that everybody has, and one of a single cell."""
    random = np.random.default_rng(seed)
    counts = random.poisson(random.gamma(0.7, 3.0, N_GENES), (n_cells, N_GENES)) * (
        random.random((n_cells, N_GENES)) > dropped
    )
    counts[0], counts[:, 1] = 0, 0
    counts[1:, 2] += 1
    counts[:, 3] = 0
    counts[5, 3] = 40
    return counts.astype(np.float32)


class Case:
    """A reference, a slice, and the embedder between them."""

    def __init__(self, ridge=30.0):
        random = np.random.default_rng(1)
        self.reference, self.slice = counts_of(300, 2), counts_of(700, 3, dropped=0.7)
        self.reference_totals = self.reference.sum(axis=1) + random.integers(1, 50, 300).astype(np.float32)
        self.slice_totals = self.slice.sum(axis=1) + 2
        self.factors = random.normal(size=(300, N_FACTORS)).astype(np.float32)
        self.config = EmbedderConfig(n_factors=N_FACTORS, ridge=ridge)
        self.panel = ReferenceFactory().fit_panel(
            self.config, ReferenceFactors(csr_matrix(self.reference), self.reference_totals, self.factors, 120.0)
        )
        logged = self.logged(self.slice, self.slice_totals, 40.0)
        self.statistics = {
            "mean": logged.mean(axis=0),
            "sd": logged.std(axis=0),
            "target_total": np.array([40.0]),
        }
        self.embedder = ReferenceFactory().open(self.config, SYMBOLS, self.panel, self.statistics)

    @staticmethod
    def logged(counts, totals, target):
        return np.log1p(counts.astype(np.float64) / totals.astype(np.float64)[:, None] * target)

    def scaled(self, counts, totals, target):
        logged = self.logged(counts, totals, target)
        return np.clip((logged - logged.mean(axis=0)) / (logged.std(axis=0) + SD_FLOOR), -CLIP, CLIP)

    def weights(self):
        Q = self.scaled(self.reference, self.reference_totals, 120.0)
        return np.linalg.solve(Q.T @ Q + self.config.ridge * np.eye(N_GENES), Q.T @ self.factors.astype(np.float64))

    def dense(self, rows=slice(None)):
        values, baseline = self.embedder.transform(csr_matrix(self.slice[rows]), self.slice_totals[rows])
        return values.toarray() + baseline


@cache
def shared_case():
    return Case()


@pytest.fixture
def case():
    return shared_case()


@pytest.mark.parametrize("ridge", [0.5, 30.0, 5000.0])
def test_the_map_of_a_panel_is_the_textbook_ridge_solution(ridge):
    case = Case(ridge)
    np.testing.assert_allclose(case.panel["weights"], case.weights(), atol=1e-5)


def test_sparse_values_and_baseline_are_the_textbook_z_scores(case):
    np.testing.assert_allclose(case.dense(), case.scaled(case.slice, case.slice_totals, 40.0), atol=1e-5)


def test_z_scores_are_clipped(case):
    logged = case.logged(case.slice, case.slice_totals, 40.0)
    assert ((logged - logged.mean(axis=0)) / (logged.std(axis=0) + SD_FLOOR)).max() > CLIP
    assert case.dense().max() <= CLIP + 1e-5


def test_the_sparse_part_has_the_pattern_of_the_counts(case):
    values, _ = case.embedder.transform(csr_matrix(case.slice), case.slice_totals)
    np.testing.assert_array_equal(values.indices, csr_matrix(case.slice).indices)


def test_an_embedding_equals_the_dense_float64_textbook_form(case):
    rows = case.scaled(case.slice, case.slice_totals, 40.0)
    latent = rows @ case.weights()
    expected = latent / np.linalg.norm(latent, axis=1, keepdims=True)
    embedded = case.embedder.embed(rows.astype(np.float32))
    np.testing.assert_allclose(embedded[:, :N_FACTORS], expected, atol=1e-5)


def test_an_embedding_has_512_numbers_and_zeros_after_the_factors(case):
    embedded = case.embedder.embed(case.dense().astype(np.float32))
    assert (embedded.shape, embedded.dtype) == ((700, EMBEDDING_SIZE), np.float32)
    assert not embedded[:, N_FACTORS:].any()


def test_every_embedding_has_length_one(case):
    embedded = case.embedder.embed(case.dense().astype(np.float32))
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1.0, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 699), min_size=1, max_size=600))
def test_a_row_has_the_same_bytes_at_any_place_of_any_batch(rows):
    case = shared_case()
    values = case.dense().astype(np.float32)
    assert case.embedder.embed(values[rows]).tobytes() == case.embedder.embed(values)[rows].tobytes()


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 699), min_size=1, max_size=300))
def test_input_values_of_a_cell_do_not_depend_on_other_cells(rows):
    case = shared_case()
    assert case.dense(rows).tobytes() == case.dense()[rows].tobytes()


def test_a_matrix_of_no_rows_has_an_embedding_of_no_rows(case):
    assert case.embedder.embed(np.zeros((0, N_GENES), np.float32)).shape == (0, EMBEDDING_SIZE)


def test_the_map_of_a_panel_does_not_depend_on_blas_threads(case):
    from threadpoolctl import threadpool_limits

    with threadpool_limits(2):
        assert Case().panel["weights"].tobytes() == case.panel["weights"].tobytes()


def test_fitting_leaves_the_reference_as_it_is():
    case = Case()
    counts = csr_matrix(case.reference)
    before = counts.data.copy()
    ReferenceFactory().fit_panel(
        case.config, ReferenceFactors(counts, case.reference_totals, case.factors, case.reference_totals.mean())
    )
    np.testing.assert_array_equal(counts.data, before)


@pytest.mark.parametrize("n_rows", [1, 255, 256, 257, 600])
def test_a_product_in_blocks_is_the_product(n_rows):
    random = np.random.default_rng(0)
    rows, weights = (random.normal(size=shape).astype(np.float32) for shape in ((n_rows, 30), (30, 7)))
    np.testing.assert_allclose(blockwise_product(rows, weights), rows @ weights, atol=1e-5)


@pytest.mark.parametrize("n_columns", [1, 2, 5, 7, 9, 11, 16, 50, 512])
def test_a_row_of_a_product_has_the_same_bytes_at_another_place(n_columns):
    random = np.random.default_rng(0)
    rows, weights = (random.normal(size=shape).astype(np.float32) for shape in ((300, 33), (33, n_columns)))
    whole = blockwise_product(rows, weights)
    assert blockwise_product(rows[1:], weights).tobytes() == whole[1:].tobytes()
    assert blockwise_product(rows[37:38], weights).tobytes() == whole[37:38].tobytes()


def test_rows_of_zeros_stay_zero_when_scaled_to_length_one():
    rows = np.array([[0, 0], [3, 4]], np.float32)
    np.testing.assert_allclose(unit_rows(rows), [[0, 0], [0.6, 0.8]], atol=1e-7)


def test_log_counts_of_a_cell_without_a_total_are_not_infinite():
    logs = log_normalized(csr_matrix((2, 3), dtype=np.float32), np.zeros(2), 10.0)
    assert np.isfinite(logs.toarray()).all()


@pytest.mark.parametrize(
    ("change", "same"),
    [({"ridge": 1.0}, False), ({"n_factors": 3}, False), ({"device": "cpu"}, True), ({"checkpoint": "unused"}, True)],
)
def test_the_digest_of_the_reference_embedder_says_what_decides_its_output(change, same):
    digests = [ReferenceFactory().digest(EmbedderConfig(**settings)) for settings in ({}, change)]
    assert (digests[0] == digests[1]) == same


def test_an_unknown_embedder_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="no embedder 'geneformer': choose from reference, scgpt, or install"):
        embedder_factory("geneformer")


class OneHot:
    """A plug-in: every cell is embedded as its most frequent gene."""

    def fit_panel(self, config, reference):
        return {"genes": np.arange(reference.counts.shape[1], dtype=np.int32)}

    def open(self, config, symbols, panel, statistics):
        def embed(rows):
            made = np.zeros((len(rows), EMBEDDING_SIZE), np.float32)
            made[np.arange(len(rows)), panel["genes"][rows.argmax(axis=1)]] = 1
            return made

        def transform(counts, totals):
            return counts, np.zeros(counts.shape[1], np.float32)

        return SimpleNamespace(transform=transform, embed=embed)

    def digest(self, config):
        return "one-hot"


@pytest.fixture
def plugin(monkeypatch):
    """The plug-in, as if a package that offers it were installed."""
    points = [SimpleNamespace(name="one-hot", load=lambda: OneHot)]

    def entry_points(*, group):
        return points if group == "lloki_atlas.embedders" else []

    monkeypatch.setattr(embedders, "entry_points", entry_points)


@pytest.mark.usefixtures("plugin")
def test_a_plug_in_is_found_by_the_name_of_its_entry_point():
    assert isinstance(embedder_factory("one-hot"), OneHot)


@pytest.mark.usefixtures("plugin")
def test_names_of_plug_ins_are_among_the_known_ones():
    with pytest.raises(InputError, match="choose from one-hot, reference, scgpt"):
        embedder_factory("other")


@pytest.mark.usefixtures("plugin")
def test_a_plug_in_does_not_replace_what_is_built_in(monkeypatch):
    points = [SimpleNamespace(name="reference", load=lambda: OneHot)]
    monkeypatch.setattr(embedders, "entry_points", lambda **_: points)
    assert isinstance(embedder_factory("reference"), ReferenceFactory)


@pytest.mark.usefixtures("plugin")
def test_an_atlas_can_be_embedded_by_a_plug_in(tmp_path, profile, sources):
    catalog = create_catalog(tmp_path / "atlas", reference=profile, embedder="one-hot", config=CONFIG)
    catalog = run_here(plan(add_slice(catalog, sources, "simfish_1"), until="embed"))
    rows = embedding(catalog, "simfish_1")
    assert set(np.unique(rows)) == {0.0, 1.0}
    np.testing.assert_array_equal(rows.sum(axis=1), 1)


@pytest.fixture(scope="module")
def scgpt_atlas(tmp_path_factory, profile, sources):
    """An atlas of one slice, embedded by a tiny scGPT; the checkpoint lies beside it."""
    folder = tmp_path_factory.mktemp("scgpt")
    write_checkpoint(folder / "checkpoint", genes=profile.symbols, embsize=16, nheads=2, d_hid=16, nlayers=1)
    catalog = create_catalog(
        folder / "atlas", reference=profile, embedder=f"scgpt:{folder / 'checkpoint'}", config=CONFIG
    )
    return run_here(plan(add_slice(catalog, sources, "simfish_1")))


def test_scgpt_embeds_an_atlas_in_unit_vectors_padded_with_zeros(scgpt_atlas):
    rows = embedding(scgpt_atlas, "simfish_1").astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=2e-3)
    assert not rows[:, 16:].any()


def test_an_atlas_of_scgpt_runs_to_the_end(scgpt_atlas):
    assert np.isfinite(embedding(scgpt_atlas, "simfish_1", "X_lloki")).all()


def with_stale_embedding(scgpt_atlas, folder):
    """A copy of the atlas with a checkpoint of its own, in which the embedding has to be made again."""
    catalog = copied(scgpt_atlas.root, folder / "atlas")
    return with_settings(catalog, "propagation", alpha=0.5)


def change_weights(folder):
    write_checkpoint(folder, genes=("A",), embsize=16, nheads=2, d_hid=16, nlayers=1, random_state=1)


def change_settings(folder):
    args = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps({**args, "n_bins": 11}))


@pytest.mark.parametrize("change", [change_weights, change_settings])
def test_a_checkpoint_that_changed_since_the_atlas_was_created_is_refused(scgpt_atlas, tmp_path, change):
    catalog = with_stale_embedding(scgpt_atlas, tmp_path)
    folder = scgpt_atlas.root.parent / "checkpoint"
    original = {path: path.read_bytes() for path in folder.iterdir()}
    change(folder)
    try:
        with pytest.raises(CheckpointError, match="is not the one that this atlas was created with: put the original"):
            run_here(plan(catalog, until="embed"))
    finally:
        for path, data in original.items():
            path.write_bytes(data)


def test_the_same_checkpoint_in_another_folder_has_the_same_digest(scgpt_atlas, tmp_path):
    folder = scgpt_atlas.root.parent / "checkpoint"
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    factory = embedder_factory("scgpt")
    digests = {factory.digest(EmbedderConfig(name="scgpt", checkpoint=str(place))) for place in (folder, tmp_path)}
    assert len(digests) == 1


def test_scgpt_has_nothing_to_fit_to_a_panel():
    config = EmbedderConfig(name="scgpt", checkpoint="anywhere")
    assert embedder_factory("scgpt").fit_panel(config, None) == {}


def test_a_checkpoint_that_embeds_in_more_than_512_numbers_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path, genes=SYMBOLS, embsize=516, nheads=4, d_hid=8, nlayers=1)
    config = EmbedderConfig(name="scgpt", checkpoint=str(folder), device="cpu")
    with pytest.raises(CheckpointError, match="embeds in 516 dimensions: the store holds at most 512"):
        embedder_factory("scgpt").digest(config)


def test_one_model_is_held_by_a_process(tmp_path):
    configs = []
    for name in ("a", "b"):
        folder = write_checkpoint(tmp_path / name, genes=SYMBOLS, embsize=8, nheads=2, d_hid=8, nlayers=1)
        configs.append(EmbedderConfig(name="scgpt", checkpoint=str(folder), device="cpu"))
    first, again, other = (streaming.resident_model(config) for config in (configs[0], configs[0], configs[1]))
    assert first is again
    assert first is not other
    assert [place[0] for place in streaming._resident] == [configs[1].checkpoint]
