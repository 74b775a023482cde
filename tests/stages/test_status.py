"""Status: what is done, missing and stale, and the sentence that says why."""

from __future__ import annotations

import json

import pytest
from support.atlases import N_CELLS, SLICES, add_slice, copied, run_here, with_settings

from lloki_atlas.stages import lineage
from lloki_atlas.stages.lineage import MADE_OF, STAGES
from lloki_atlas.stages.pipeline import plan
from lloki_atlas.stages.status import status
from lloki_atlas.store.catalog import Catalog, commit, open_catalog
from lloki_atlas.store.objects import receipt_path
from lloki_atlas.store.records import STAGE_KINDS, CatalogState, Change

DONE = dict.fromkeys(STAGES, "done")


@pytest.fixture
def catalog(built, tmp_path):
    """An atlas of the test's own that ran to the end."""
    return copied(built, tmp_path / "atlas")


def reasons(catalog, slice_id="simfish_1"):
    (found,) = (part["reasons"] for part in status(catalog)["slices"] if part["slice_id"] == slice_id)
    return found


def without_recipes(catalog):
    """The same atlas with receipts as they were before they said what an object is made of."""
    for record in catalog.state.slices.values():
        for stage, key in record.objects.items():
            forget(catalog.path(STAGE_KINDS[stage], key))
    forget(catalog.path("models", catalog.state.models["autoencoder"]))
    return catalog


def forget(path):
    content = json.loads(receipt_path(path).read_bytes())
    content["lineage"].pop(MADE_OF, None)
    receipt_path(path).write_text(json.dumps(content))


def test_a_status_lists_every_slice_with_its_stages_and_models(built):
    catalog = open_catalog(built)
    found, model = status(catalog), catalog.state.models["autoencoder"]
    assert (found["autoencoder"], found["tokens"]) == (model, {})
    assert (found["autoencoder_status"], found["autoencoder_reason"]) == ("done", None)
    assert (found["version"], found["n_cells"]) == (4, 2 * N_CELLS)
    assert [part["slice_id"] for part in found["slices"]] == sorted(SLICES)
    assert found["slices"][0] == {
        "slice_id": "simfish_1",
        "technology": "SimFISH",
        "organism": "mouse",
        "n_cells": N_CELLS,
        "n_genes": 33,
        "stages": DONE,
        "reasons": {},
        "autoencoder": model[:8],
        "token": None,
    }


def test_what_was_never_run_is_missing(ingested):
    found = status(open_catalog(ingested))
    assert (found["autoencoder_status"], found["autoencoder_reason"]) == ("missing", "not trained yet")
    for part in found["slices"]:
        assert part["stages"] == {"ingest": "done", **dict.fromkeys(STAGES[1:], "missing")}
        first = dict.fromkeys(STAGES[1:-1], "not run yet")
        assert part["reasons"] == {**first, "integrate": "the atlas has no autoencoder yet"}


def test_a_new_slice_of_an_unknown_platform_needs_a_token(catalog, sources):
    grown = add_slice(catalog, sources, "simish_1")
    assert reasons(grown, "simish_1")["integrate"].startswith("the autoencoder does not know its platform: adapt it")
    assert reasons(add_slice(grown, sources, "simfish_2"), "simfish_2")["integrate"] == "not run yet"


ALPHA = "propagation.alpha changed from 1.0 to 0.5"
NEIGHBORS = "propagation.n_neighbors changed from 8 to 6"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"alpha": 0.5}, {"embed": ALPHA, "integrate": f"a new 512-d embedding ({ALPHA})"}),
        (
            {"n_neighbors": 6},
            {
                "propagate": NEIGHBORS,
                "embed": f"a new graph ({NEIGHBORS})",
                "integrate": f"a new 512-d embedding (a new graph ({NEIGHBORS}))",
            },
        ),
        (
            {"alpha": 0.5, "n_neighbors": 6},
            {
                "propagate": NEIGHBORS,
                "embed": f"a new graph ({NEIGHBORS}); {ALPHA}",
                "integrate": f"a new 512-d embedding (a new graph ({NEIGHBORS}); {ALPHA})",
            },
        ),
    ],
    ids=str,
)
def test_a_changed_setting_is_the_reason(catalog, changed, expected):
    assert reasons(with_settings(catalog, "propagation", **changed)) == expected


def test_a_setting_of_the_statistics_is_the_reason(catalog):
    found = reasons(with_settings(catalog, "propagation", n_bandwidth_pairs=7))
    assert found["tile"] == "propagation.n_bandwidth_pairs changed from 200 to 7"
    assert found["propagate"].startswith("new statistics of the slice (propagation.n_bandwidth_pairs changed")


def test_a_new_version_of_a_stage_is_the_reason(catalog, monkeypatch):
    monkeypatch.setitem(lineage.VERSIONS, "embed", 7)
    assert reasons(catalog)["embed"] == "stage version 2 → 7"


def test_another_embedder_is_the_reason(catalog):
    other = Catalog(catalog.root, catalog.version, with_models(catalog, embedder="0" * 32))
    assert reasons(other)["reference"] == "the embedder changed"
    assert reasons(other)["embed"] == "new panel data (the embedder changed)"


def test_another_autoencoder_is_the_reason(catalog):
    changed = with_settings(catalog, "autoencoder", n_epochs=1)
    renewed = run_here(plan(changed))
    other = Catalog(catalog.root, renewed.version, with_models(renewed, **catalog.state.models))
    assert reasons(other) == {"integrate": "a new autoencoder"}


def test_another_reference_is_the_reason(catalog):
    state = catalog.state
    other = CatalogState(state.config, "0" * 32, state.models, state.slices)
    found = reasons(Catalog(catalog.root, catalog.version, other))
    assert (found["tile"], found["reference"]) == ("another reference", "another reference")


def with_models(catalog, **models):
    state = catalog.state
    return CatalogState(state.config, state.reference, {**state.models, **models}, state.slices)


def test_another_source_is_the_reason(catalog):
    record = catalog.slice("simfish_1")
    other = {**record.objects, "ingest": catalog.slice("simmap_1").objects["ingest"]}
    state = catalog.state
    changed = {"simfish_1": type(record)(**{**record.to_json(), "objects": other, "panel": "p"})}
    found = reasons(
        Catalog(catalog.root, catalog.version, CatalogState(state.config, state.reference, state.models, changed))
    )
    assert (found["tile"], found["reference"]) == ("the source changed", "the slice's genes changed")
    assert found["integrate"].startswith("a new 512-d embedding (a new graph (new statistics of the slice (the source")


def test_an_atlas_that_lost_its_autoencoder_says_so(catalog):
    state = catalog.state
    models = {"embedder": state.models["embedder"]}
    other = Catalog(catalog.root, catalog.version, CatalogState(state.config, state.reference, models, state.slices))
    assert reasons(other) == {"integrate": "the atlas has no autoencoder any more"}


@pytest.mark.parametrize(
    ("section", "changed", "reason"),
    [
        ("autoencoder", {"n_epochs": 1}, "autoencoder.n_epochs changed from 2 to 1"),
        ("propagation", {"alpha": 0.5}, "embeddings that it was trained on changed"),
    ],
)
def test_an_autoencoder_that_will_be_trained_again_is_stale(catalog, section, changed, reason):
    found = status(with_settings(catalog, section, **changed))
    assert (found["autoencoder_status"], found["autoencoder_reason"]) == ("stale", reason)
    assert "train" in {task.stage for task in plan(open_catalog(catalog.root)).tasks}


def test_receipts_that_name_only_inputs_still_explain_what_they_can(catalog):
    earlier = without_recipes(catalog)
    found = reasons(with_settings(earlier, "propagation", n_neighbors=6))
    assert found["propagate"].startswith("settings or the stage's version changed (its receipt is too old")
    assert found["embed"].startswith("a new graph (settings or")
    renewed = status(with_settings(open_catalog(earlier.root, mode="r+"), "autoencoder", n_epochs=1))
    assert renewed["autoencoder_reason"] == "embeddings that it was trained on changed"


def test_a_receipt_that_is_gone_does_not_keep_status_from_answering(catalog):
    receipt_path(catalog.path("embeddings", catalog.slice("simfish_1").objects["embed"])).unlink()
    found = reasons(with_settings(catalog, "propagation", alpha=0.5))
    assert found["embed"].startswith("made of something else; embeddings/")


def test_a_slice_that_left_leaves_the_status_of_the_others(catalog):
    smaller = commit(catalog, Change(slices={"simmap_1": None}), message="removed by a test")
    assert [part["reasons"] for part in status(smaller)["slices"]] == [{}]
