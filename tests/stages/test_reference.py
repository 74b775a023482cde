"""The scRNA-seq reference: totals, factors and labels of a profile, what a panel takes of it, refusals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy.sparse import csr_matrix
from sklearn.decomposition import PCA
from support.atlases import copied

from lloki_atlas.config import EmbedderConfig
from lloki_atlas.engine.plan import run_task
from lloki_atlas.errors import InputError
from lloki_atlas.models.embedders import ReferenceFactors, ReferenceFactory
from lloki_atlas.stages import reference
from lloki_atlas.stages.lineage import expected_objects
from lloki_atlas.stages.reference import CLIP, fit_reference, run_panel
from lloki_atlas.store.arrays import read_arrays
from lloki_atlas.store.catalog import open_catalog

GENES = ("Gad1", "Gad2", "Ctgf", "Car4", "Slc17a7", "Aqp4", "Blank-1")
MAPPED = ("GAD1", "GAD2", "CCN2", "CA4", "SLC17A7", "AQP4")


def make_source(n_cells=80, *, seed=0):
    """Four kinds of cells, one cell without any count, and a probe without a gene."""
    random = np.random.default_rng(seed)
    rates = random.gamma(0.6, 4.0, (4, len(GENES)))
    counts = random.poisson(rates[np.arange(n_cells) % 4]).astype(np.float32)
    counts[:, 0] += 1
    counts[5] = 0
    obs = pd.DataFrame(
        {"kind": [f"kind {row % 4}" for row in range(n_cells)]}, index=[f"cell{row}" for row in range(n_cells)]
    )
    return AnnData(csr_matrix(counts), obs=obs, var=pd.DataFrame(index=list(GENES)))


@pytest.fixture(scope="module")
def source():
    return make_source()


@pytest.fixture(scope="module")
def fitted(source):
    return fit_reference(source, organism="mouse", label_key="kind", n_factors=4)


@pytest.fixture(scope="module")
def kept(source):
    """Counts of the cells that are not empty."""
    dense = source.X.toarray()
    return dense[dense.sum(axis=1) > 0]


def test_symbols_are_canonical_and_without_probes(fitted):
    assert fitted.symbols == MAPPED


def test_a_cell_without_counts_is_left_out(fitted, kept):
    np.testing.assert_array_equal(fitted.counts.toarray(), kept[:, :6])


def test_totals_are_over_all_genes_of_the_source(fitted, kept):
    np.testing.assert_array_equal(fitted.totals, kept.sum(axis=1))


def test_the_target_total_is_the_median_of_the_totals(fitted, kept):
    assert fitted.target_total == np.median(kept.sum(axis=1))


def test_labels_stay_with_their_cells(fitted, source):
    filled = source.X.toarray().sum(axis=1) > 0
    assert fitted.labels == tuple(source.obs["kind"][filled])


def test_without_a_label_key_cells_have_no_labels(source):
    assert set(fit_reference(source, organism="mouse", n_factors=2).labels) == {""}


def test_factors_are_principal_components_of_clipped_z_scores_up_to_sign(fitted, kept):
    logged = np.log1p(kept[:, :6] / kept.sum(axis=1, keepdims=True) * fitted.target_total)
    z = np.clip((logged - logged.mean(axis=0)) / (logged.std(axis=0) + 1e-3), -CLIP, CLIP)
    expected = PCA(4, svd_solver="full").fit_transform(z.astype(np.float64))
    signs = np.sign((fitted.factors * expected).sum(axis=0))
    np.testing.assert_allclose(fitted.factors, expected * signs, atol=1e-4)


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (4, 4), (50, 6)])
def test_there_are_as_many_factors_as_asked_for_and_genes_allow(source, asked, given):
    assert fit_reference(source, organism="mouse", n_factors=asked).factors.shape == (79, given)


def test_only_the_most_variable_genes_carry_the_factors_of_a_large_reference(source, monkeypatch, kept):
    monkeypatch.setattr(reference, "MAX_FACTOR_GENES", 3)
    profile = fit_reference(source, organism="mouse", n_factors=3)
    logged = np.log1p(kept[:, :6] / kept.sum(axis=1, keepdims=True) * profile.target_total)
    chosen = np.sort(np.argsort(-logged.std(axis=0), kind="stable")[:3])
    z = (logged - logged.mean(axis=0)) / (logged.std(axis=0) + 1e-3)
    expected = PCA(3, svd_solver="full").fit_transform(np.clip(z, -CLIP, CLIP)[:, chosen])
    np.testing.assert_allclose(np.abs(profile.factors), np.abs(expected), atol=1e-4)
    assert profile.counts.shape[1] == 6


def test_permuting_cells_permutes_totals_and_factors(source, fitted):
    order = np.random.default_rng(3).permutation(source.n_obs)
    other = fit_reference(source[order].copy(), organism="mouse", n_factors=4)
    filled = order[np.isin(order, np.delete(np.arange(80), 5))]
    rows = filled - (filled > 5)
    np.testing.assert_array_equal(other.totals, fitted.totals[rows])
    np.testing.assert_allclose(other.factors, fitted.factors[rows], atol=1e-5)


def test_an_h5ad_file_gives_the_profile_of_its_contents(source, fitted, tmp_path):
    source.write_h5ad(tmp_path / "reference.h5ad")
    other = fit_reference(tmp_path / "reference.h5ad", organism="mouse", label_key="kind", n_factors=4)
    assert other.factors.tobytes() == fitted.factors.tobytes()
    assert other.labels == fitted.labels


def test_counts_may_lie_in_a_layer(source, fitted):
    layered = AnnData(csr_matrix(source.X.toarray() / 7), obs=source.obs, var=source.var)
    layered.layers["counts"] = source.X
    other = fit_reference(layered, organism="mouse", layer="counts", n_factors=4)
    assert other.factors.tobytes() == fitted.factors.tobytes()


def test_a_gene_map_of_the_user_wins(source, tmp_path):
    table = tmp_path / "map.tsv"
    table.write_text("Blank-1\tVIP\nGad1\t\n")
    profile = fit_reference(source, organism="mouse", n_factors=2, gene_map=table)
    assert profile.symbols == (*MAPPED[1:], "VIP")


def scaled(source):
    changed = source.copy()
    changed.X = csr_matrix(source.X.toarray() / 3)
    return changed


def nameless(source):
    changed = source.copy()
    changed.var_names = [f"ENSMUSG{gene:011d}" for gene in range(changed.n_vars)]
    return changed


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {"label_key": "class"}, "no obs column 'class': choose from kind"),
        (None, {"organism": "rat"}, "unknown organism 'rat': choose from mouse, human"),
        (None, {"layer": "raw"}, "no layer 'raw'"),
        (scaled, {}, "are not whole numbers"),
        (nameless, {}, "no gene with a known symbol: check the organism"),
    ],
    ids=["label", "organism", "layer", "normalised", "identifiers"],
)
def test_a_source_that_is_no_reference_is_refused(source, change, options, message):
    given = source if change is None else change(source)
    with pytest.raises(InputError, match=message):
        fit_reference(given, **{"organism": "mouse", **options})


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.h5ad"):
        fit_reference(tmp_path / "none.h5ad", organism="mouse")


PANEL = ("AQP4", "CCN2", "GAD1")


@pytest.fixture(scope="module")
def panel(fitted):
    return run_panel(fitted, PANEL, settings=EmbedderConfig(n_factors=4, ridge=2.0))


def test_the_histogram_of_a_panel_counts_its_genes_in_every_reference_cell(panel, kept):
    dense = kept[:, [MAPPED.index(symbol) for symbol in PANEL]]
    nonzeros = (dense > 0).sum(axis=1)
    np.testing.assert_array_equal(panel["histogram"], [(nonzeros == n).sum() for n in range(4)])


def test_the_histogram_of_the_reference_counts_all_of_its_genes(panel, kept):
    nonzeros = (kept[:, :6] > 0).sum(axis=1)
    np.testing.assert_array_equal(panel["histogram_all"], [(nonzeros == n).sum() for n in range(7)])


def test_a_panel_keeps_its_symbols_in_order(panel):
    assert tuple(panel["symbols"]) == PANEL


def test_the_map_of_a_panel_is_fitted_to_its_own_genes_and_totals_of_the_whole_reference(panel, fitted):
    factors = ReferenceFactors(fitted.columns(PANEL), fitted.totals, fitted.factors, fitted.target_total)
    expected = ReferenceFactory().fit_panel(EmbedderConfig(n_factors=4, ridge=2.0), factors)
    assert panel["weights"].tobytes() == expected["weights"].tobytes()


@pytest.fixture
def planned(ingested):
    catalog = open_catalog(ingested)
    record = catalog.slice("simmap_1")
    return catalog, record, expected_objects(catalog, record)


def test_a_panel_is_one_task_named_by_its_key(planned):
    (task,) = reference.plan_stage(*planned)
    assert task.name == f"reference/{planned[2]['reference']}"
    assert task.output.path == str(planned[0].path("panels", planned[2]["reference"]))


def test_the_whole_reference_is_in_the_projected_memory(planned, profile):
    (task,) = reference.plan_stage(*planned)
    assert task.projected_memory > profile.counts.nnz * 16 + 256 * 2**20


def test_a_task_takes_the_genes_that_slice_and_reference_share(planned, profile):
    (task,) = reference.plan_stage(*planned)
    made = reference.compute(**task.arguments)
    assert set(made["symbols"]) <= set(profile.symbols)
    assert len(made["histogram"]) == len(made["symbols"]) + 1
    assert made["histogram"].sum() == len(profile.totals)


def test_a_stored_panel_is_the_computed_one(planned, tmp_path):
    catalog = copied(planned[0].root, tmp_path / "atlas")
    (task,) = reference.plan_stage(catalog, *planned[1:])
    run_task(task)
    stored, computed = read_arrays(task.output.path), reference.compute(**task.arguments)
    assert set(stored) == {"symbols", "histogram", "histogram_all", "weights"}
    assert stored["weights"].tobytes() == computed["weights"].tobytes()
    assert tuple(stored["symbols"]) == tuple(computed["symbols"])
