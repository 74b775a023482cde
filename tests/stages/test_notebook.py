"""LLOKI-FP in memory: AnnData in, AnnData out, against the dense textbook, in any order of cells."""

from __future__ import annotations

import anndata
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import textbook
from scipy.sparse import csr_matrix

from lloki_atlas.config import PropagationConfig
from lloki_atlas.errors import InputError
from lloki_atlas.stages.notebook import propagate_slice
from lloki_atlas.stages.panels import slice_random_key
from lloki_atlas.stages.reference import fit_reference

SETTINGS = {"n_neighbors": 8, "n_components": 5, "max_iterations": 15, "n_bandwidth_pairs": 300, "alpha": 0.7}


@pytest.fixture(scope="module")
def source(sources):
    """A simulated slice of 160 genes, and one cell of it emptied."""
    table = anndata.read_h5ad(sources / "simmap_1.h5ad")
    dense = table.X.toarray()
    dense[7] = 0
    table.X = csr_matrix(dense)
    return table


@pytest.fixture(scope="module")
def result(source, profile):
    return propagate_slice(source, profile, **SETTINGS)


@pytest.fixture(scope="module")
def counts(result):
    return result.layers["counts"].toarray()


def by_name(table, part):
    values = part(table)
    values = values.toarray() if hasattr(values, "toarray") else np.asarray(values)
    return {name: row.tobytes() for name, row in zip(table.obs_names, values, strict=True)}


def test_cells_come_back_in_their_order(source, result):
    assert list(result.obs_names) == list(source.obs_names)
    np.testing.assert_array_equal(result.obsm["spatial"], source.obsm["spatial"])


def test_columns_of_the_cells_come_back(source, result):
    assert set(source.obs) <= set(result.obs)
    assert list(result.obs["cell_type"]) == list(source.obs["cell_type"])


def test_genes_are_those_shared_with_the_reference_under_canonical_names(result, profile):
    assert set(result.var_names) <= set(profile.symbols)
    assert list(result.var_names) == sorted(result.var_names)
    assert "CCN2" in result.var_names


def test_counts_are_those_of_the_source(source, result, counts):
    column = {name.upper(): gene for gene, name in enumerate(source.var_names)}
    known = [symbol for symbol in result.var_names if symbol in column]
    expected = source.X.toarray()[:, [column[symbol] for symbol in known]]
    np.testing.assert_array_equal(counts[:, result.var_names.get_indexer(known)], expected)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_denoised_counts_are_the_mixture_of_equation_5(source, profile, alpha):
    result = propagate_slice(source, profile, **{**SETTINGS, "alpha": alpha})
    X, A = result.layers["counts"].toarray(), result.obsp["propagation_graph"].toarray()
    np.testing.assert_allclose(result.X, textbook.diffuse(A, X, alpha=alpha), atol=1e-4)


def test_observed_counts_may_be_kept(source, profile, counts):
    kept = propagate_slice(source, profile, **SETTINGS, keep_observed=True).X
    np.testing.assert_array_equal(kept[counts > 0], counts[counts > 0])


def test_observed_counts_stay_in_the_propagated_layer(result, counts):
    propagated = result.layers["propagated"].toarray()
    np.testing.assert_array_equal(propagated[counts > 0], counts[counts > 0])


def test_no_cell_is_filled_in_beyond_its_budget(result, counts):
    filled = (result.layers["propagated"].toarray() > 0).sum(axis=1) - (counts > 0).sum(axis=1)
    assert (filled <= result.obs["budget"]).all()
    assert filled.sum() > 0


def test_achieved_nonzeros_are_those_of_the_propagated_layer(result):
    achieved = (result.layers["propagated"].toarray() > 0).sum(axis=1)
    np.testing.assert_array_equal(result.obs["achieved_nonzeros"], achieved)


def test_targets_are_those_of_the_textbook_transport(result, profile, counts):
    own = (counts > 0).sum(axis=1)
    theirs = np.diff(profile.columns(tuple(result.var_names)).indptr)
    expected = textbook.quantile_targets(own, theirs, result.n_vars)
    np.testing.assert_array_equal(result.obs["target_nonzeros"], expected)
    np.testing.assert_array_equal(result.obs["budget"], np.maximum(expected - own, 0))


def test_the_graph_is_exactly_symmetric(result):
    graph = result.obsp["propagation_graph"]
    assert (graph != graph.T).nnz == 0


def test_in_the_published_space_the_whole_of_lloki_fp_is_the_textbook(source, profile):
    """Neighbours in counts, propagation, neighbours again, diffusion; ranks by the package's own hashes."""
    settings = {**SETTINGS, "graph_space": "counts"}
    order = hilbert_rows(source)
    table = source[order].copy()
    result = propagate_slice(table, profile, **settings)
    X, xy = result.layers["counts"].toarray(), np.asarray(table.obsm["spatial"], dtype=np.float32)
    sigma, budget = result.uns["lloki_atlas"]["bandwidth_um"], result.obs["budget"].to_numpy()
    ranks = textbook.hashes(slice_random_key("slice", PropagationConfig(**settings)), *X.shape)

    def graph(values):
        lists = textbook.nearest(textbook.cosine_similarity(values), settings["n_neighbors"])
        return textbook.union_graph(lists, xy, sigma)

    filled, n_iterations = textbook.propagate(graph(X), X, budget, ranks, max_iterations=15, tolerance=1e-3)
    propagated = result.layers["propagated"].toarray()
    np.testing.assert_array_equal(propagated != 0, filled != 0)
    np.testing.assert_allclose(propagated, filled, atol=1e-4)
    assert result.uns["lloki_atlas"]["n_iterations"] == n_iterations
    np.testing.assert_allclose(result.obsp["propagation_graph"].toarray(), graph(propagated), atol=1e-5)
    np.testing.assert_allclose(result.X, textbook.diffuse(graph(propagated), X, alpha=0.7), atol=1e-3)


def hilbert_rows(table):
    from lloki_atlas.kernels.ordering import hilbert_order

    return hilbert_order(table.obsm["spatial"])


@pytest.mark.parametrize(
    "part",
    [
        lambda table: table.X,
        lambda table: table.layers["propagated"],
        lambda table: table.obs[["budget", "target_nonzeros", "achieved_nonzeros"]],
    ],
    ids=["denoised", "propagated", "report"],
)
@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 1000))
def test_results_of_a_cell_do_not_depend_on_the_order_of_cells(shuffled, result, part, seed):
    assert by_name(shuffled(seed), part) == by_name(result, part)


@pytest.fixture(scope="module")
def shuffled(source, profile):
    made = {}

    def of(seed):
        if seed not in made:
            order = np.random.default_rng(seed).permutation(source.n_obs)
            made[seed] = propagate_slice(source[order].copy(), profile, **SETTINGS)
        return made[seed]

    return of


def test_edges_of_the_graph_follow_their_cells(shuffled, result):
    other = shuffled(1)
    rows = other.obs_names.get_indexer(result.obs_names)
    graph = other.obsp["propagation_graph"].toarray()[np.ix_(rows, rows)]
    np.testing.assert_array_equal(graph, result.obsp["propagation_graph"].toarray())


def test_the_unit_of_coordinates_does_not_matter(source, profile, result):
    scaled = source.copy()
    scaled.obsm["spatial"] = source.obsm["spatial"] * 1024.0
    np.testing.assert_allclose(propagate_slice(scaled, profile, **SETTINGS).X, result.X, atol=1e-4)


def test_an_empty_cell_is_kept(result, counts):
    assert not counts[7].any()
    assert np.isfinite(result.X[7]).all()


def test_a_slice_of_one_cell_is_left_as_it_is(source, profile):
    one = propagate_slice(source[3:4].copy(), profile, **SETTINGS)
    np.testing.assert_allclose(one.X, one.layers["counts"].toarray(), rtol=1e-6)


def test_the_source_is_not_changed(source, profile):
    before = source.copy()
    propagate_slice(source, profile, **SETTINGS)
    assert (before.X != source.X).nnz == 0
    assert before.obs.equals(source.obs)


def test_another_name_of_the_slice_is_another_random_stream(source, profile, result):
    other = propagate_slice(source, profile, slice_id="another", **SETTINGS)
    assert other.uns["lloki_atlas"]["bandwidth_um"] != result.uns["lloki_atlas"]["bandwidth_um"]


@pytest.mark.parametrize("kind", ["path", "AnnData"])
def test_a_reference_that_is_not_fitted_is_fitted(source, sources, result, kind):
    path = sources / "reference.h5ad"
    reference = path if kind == "path" else anndata.read_h5ad(path)
    assert propagate_slice(source, reference, **SETTINGS).X.tobytes() == result.X.tobytes()


def test_counts_and_coordinates_may_have_other_names(source, profile, result):
    other = source.copy()
    other.layers["raw"], other.X = source.X, source.X * 0.5
    other.obsm["xy"] = other.obsm.pop("spatial")
    made = propagate_slice(other, profile, layer="raw", spatial_key="xy", **SETTINGS)
    assert made.X.tobytes() == result.X.tobytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1}, r"unknown key 'beta' in \[propagation\]: choose from alpha"),
        ({"alpha": 2.0}, "alpha is 2.0"),
        ({"spatial_key": "xy"}, r"no obsm\['xy'\]"),
        ({"layer": "raw"}, "no layer 'raw'"),
        ({"organism": "rat"}, "unknown organism"),
    ],
)
def test_what_cannot_be_used_is_refused(source, profile, options, message):
    with pytest.raises(InputError, match=message):
        propagate_slice(source, profile, **options)


def every_byte(table):
    """Bytes of everything that a run has made."""
    layers = [table.layers[name].toarray() for name in ("counts", "propagated")]
    columns = [table.obs[name].to_numpy() for name in ("budget", "target_nonzeros", "achieved_nonzeros")]
    return [part.tobytes() for part in (table.X, *layers, *columns, table.obsp["propagation_graph"].toarray())]


MODES = [
    {},
    {"mode": "paper"},
    {"mode": "reference"},
    {"storage": "float16"},
    {"support": "largest"},
    {"graph_space": "counts", "keep_observed": True},
]


@pytest.mark.parametrize("setting", MODES, ids=str)
def test_threads_change_no_byte(source, profile, setting):
    one, two = (propagate_slice(source, profile, n_threads=n, **SETTINGS, **setting) for n in (1, 2))
    assert every_byte(one) == every_byte(two)
    assert one.uns["lloki_atlas"] == two.uns["lloki_atlas"]


@pytest.fixture(scope="module")
def denser(sources):
    """The reference with more genes a cell, so that there is something to fill in."""
    table = anndata.read_h5ad(sources / "reference.h5ad")
    table.X = csr_matrix(table.X.toarray() + np.random.default_rng(0).poisson(0.5, table.shape).astype(np.float32))
    return fit_reference(table, organism="mouse")


@pytest.mark.parametrize("mode", ["default", "paper", "reference"])
def test_every_mode_keeps_counts_and_budgets(source, denser, mode, counts):
    made = propagate_slice(source, denser, mode=mode, n_neighbors=8, max_iterations=5)
    propagated = made.layers["propagated"].toarray()
    # dividing by the largest count and back, as the published code does, rounds
    np.testing.assert_allclose(propagated[counts > 0], counts[counts > 0], rtol=1e-6)
    filled = (propagated > 0).sum(axis=1) - (counts > 0).sum(axis=1)
    assert (filled <= made.obs["budget"]).all()
    assert filled.sum() > 0
    np.testing.assert_array_equal(made.obs["achieved_nonzeros"], (propagated > 0).sum(axis=1))
    assert np.isfinite(made.X).all()


def test_a_mode_is_another_result(source, denser):
    made = [
        propagate_slice(source, denser, mode=mode, n_neighbors=8, max_iterations=5).X.tobytes()
        for mode in ("default", "paper", "reference")
    ]
    assert len(set(made)) == 3


def test_denoised_counts_may_be_cut_back_to_their_targets(source, denser):
    capped, whole = (propagate_slice(source, denser, **SETTINGS, cap_final=cap) for cap in (True, False))
    targets = capped.obs["target_nonzeros"].to_numpy()
    assert ((capped.X != 0).sum(axis=1) <= targets).all()
    assert ((whole.X != 0).sum(axis=1) > targets).any()
    kept = capped.X != 0
    np.testing.assert_array_equal(capped.X[kept], whole.X[kept])
    lost = np.where(kept, 0, whole.X).max(axis=1)
    least = np.where(kept, capped.X, np.inf).min(axis=1)
    assert (lost <= least).all()
    assert capped.layers["propagated"].toarray().tobytes() == whole.layers["propagated"].toarray().tobytes()


@pytest.mark.parametrize("reference_of", ["sparser", "denser"])
def test_a_report_says_what_sparsity_was_wanted_and_reached(source, profile, denser, counts, reference_of):
    made = propagate_slice(source, denser if reference_of == "denser" else profile, **SETTINGS)
    report = made.uns["lloki_atlas"]["sparsity"]
    assert report["n_genes"] == made.n_vars
    for name, nonzeros in (
        ("own", (counts > 0).sum(axis=1)),
        ("target", made.obs["target_nonzeros"]),
        ("achieved", made.obs["achieved_nonzeros"]),
    ):
        assert report[name]["mean"] == pytest.approx(1 - np.mean(nonzeros) / made.n_vars)
    assert report["cells_with_budget"] == pytest.approx((made.obs["budget"] > 0).mean())
    assert report["target_correlation"] > 0.9


def test_a_result_with_its_report_can_be_written_to_a_file(result, tmp_path):
    result.write_h5ad(tmp_path / "made.h5ad")
    read = anndata.read_h5ad(tmp_path / "made.h5ad")
    assert read.uns["lloki_atlas"]["recall"] == 1.0
    assert read.uns["lloki_atlas"]["sparsity"]["n_genes"] == result.n_vars


def test_an_exact_search_has_a_recall_of_one(result):
    assert result.uns["lloki_atlas"]["recall"] == 1.0
