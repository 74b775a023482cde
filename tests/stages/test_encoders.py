"""Which models encode a run: a token goes with its autoencoder, and is renewed when what it was made of changes."""

from __future__ import annotations

import anndata
import pytest
from support.adapted import DONE, NEW, TECHNOLOGY, role_of, statuses, tokens
from support.atlases import (
    N_CELLS,
    SLICES,
    add_slice,
    copied,
    run_here,
    stages,
    with_settings,
)

from lloki_atlas.errors import ConflictError, InputError
from lloki_atlas.stages import pipeline
from lloki_atlas.stages.adapt import adaptation_report
from lloki_atlas.stages.adapt_tasks import token_description
from lloki_atlas.stages.lineage import expected_objects
from lloki_atlas.stages.pipeline import plan, train_autoencoder
from lloki_atlas.store.catalog import commit, open_catalog
from lloki_atlas.store.records import Change


@pytest.fixture
def catalog(grown, tmp_path):
    return copied(grown, tmp_path / "atlas")


@pytest.fixture
def after(adapted, tmp_path):
    return copied(adapted, tmp_path / "atlas")


def test_a_device_that_embeds_also_encodes_with_a_token_that_is_there(after, sources, monkeypatch):
    monkeypatch.setattr(pipeline.streaming, "uses_device", lambda config: True)
    twin = add_slice(after, sources / f"{NEW}.h5ad", "simish_again", technology=TECHNOLOGY)
    record = twin.slice("simish_again")
    encoders = pipeline.choose_encoders(twin, ["simish_again"])
    keys = expected_objects(twin, record)
    arguments, _ = pipeline._encoding(twin, record, keys, encoders)
    assert arguments["model_path"] == str(twin.path("models", tokens(twin)[role_of(twin)]))


# stale tokens


def cut_short(catalog, sources):
    """The atlas with fewer cells in the adapted slice."""
    adata = anndata.read_h5ad(sources / f"{NEW}.h5ad")[: N_CELLS - 5].copy()
    removed = commit(catalog, Change(slices={NEW: None}), message="removed by a test")
    return add_slice(removed, adata, NEW, technology=TECHNOLOGY)


def test_a_token_goes_with_the_autoencoder_that_learns_its_platform(after, client):
    done = train_autoencoder(after, client=client, progress=False)
    assert tokens(done) == {}
    assert done.state.models["autoencoder"] != after.state.models["autoencoder"]
    assert statuses(done) == dict.fromkeys([*SLICES, NEW], DONE)


def test_a_renewed_autoencoder_that_does_not_know_the_platform_is_adapted_to_it_again(after):
    changed = with_settings(after, "autoencoder", n_epochs=1)
    left = plan(changed)
    assert set(stages(left)) == {"train", "adapt", "integrate"}
    done = run_here(left)
    assert tokens(done).keys() == tokens(after).keys()
    assert tokens(done) != tokens(after)
    assert token_description(done, tokens(done)[role_of(done)])["model"] == done.state.models["autoencoder"]
    assert statuses(done) == dict.fromkeys([*SLICES, NEW], DONE)
    assert plan(done).tasks == ()


def test_a_run_for_some_slices_that_renews_the_autoencoder_leaves_no_token_of_the_old_one(after):
    changed = with_settings(after, "autoencoder", n_epochs=1)
    done = run_here(plan(changed, slices=SLICES))
    (key,) = tokens(done).values()
    assert token_description(done, key)["model"] == done.state.models["autoencoder"]
    assert statuses(done)[NEW]["integrate"] == "stale"


def test_a_token_whose_embeddings_have_changed_is_adapted_again(after, sources):
    left = plan(cut_short(after, sources))
    assert "adapt" in stages(left)
    assert "train" not in stages(left)
    done = run_here(left)
    assert tokens(done) != tokens(after)
    assert adaptation_report(done, TECHNOLOGY)[0]["n_cells"] == N_CELLS - 5


def test_a_run_for_other_slices_leaves_a_stale_token_as_it_is(after, sources):
    assert plan(cut_short(after, sources), slices=SLICES).tasks == ()


def test_a_slice_that_leaves_the_atlas_leaves_its_token_as_it_is(after):
    smaller = commit(after, Change(slices={NEW: None}), message="removed by a test")
    assert plan(smaller).tasks == ()
    assert tokens(smaller) == tokens(after)


def test_a_training_meanwhile_is_in_conflict_with_a_token_of_the_old_autoencoder(catalog, client):
    ours, theirs = (open_catalog(catalog.root, mode="r+") for _ in range(2))
    made = plan(ours, slices=[NEW], adapt_on=[NEW])
    train_autoencoder(theirs, client=client, progress=False)
    with pytest.raises(ConflictError, match="model 'autoencoder'"):
        run_here(made)
    assert tokens(open_catalog(catalog.root)) == {}


def test_a_plan_adapts_to_no_platform_that_the_autoencoder_knows(after):
    with pytest.raises(InputError, match="already has a token for slice 'simmap_1': there is nothing to adapt"):
        plan(after, adapt_on=["simmap_1"])


def test_a_plan_that_ends_before_the_encoding_trains_nothing(grown):
    assert "adapt" not in stages(plan(open_catalog(grown), until="embed", adapt_on=[NEW]))
