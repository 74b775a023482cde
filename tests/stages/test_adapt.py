"""A new technology joins a finished atlas: its own slices are encoded, and not a byte of what was there changes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from support.adapted import DONE, NEW, TECHNOLOGY, adapt, finished_files, role_of, statuses, tokens
from support.atlases import (
    N_CELLS,
    SLICES,
    add_slice,
    copied,
    embedding,
    run_here,
    stages,
    with_settings,
)
from support.folders import folder_digest

from lloki_atlas.errors import CheckpointError, InputError, NotFoundError
from lloki_atlas.models.autoencoder_files import load_encoder, load_model
from lloki_atlas.models.encoder import FrozenEncoder
from lloki_atlas.models.platform_token import only_token
from lloki_atlas.stages import adapt_tasks
from lloki_atlas.stages.adapt import adaptation_report
from lloki_atlas.stages.adapt_tasks import token_description
from lloki_atlas.stages.lineage import platform_name
from lloki_atlas.stages.pipeline import plan, train_autoencoder
from lloki_atlas.stages.status import status
from lloki_atlas.stages.train import checkpoint_description
from lloki_atlas.store.arrays import read_arrays, write_arrays
from lloki_atlas.store.catalog import open_catalog, verify
from lloki_atlas.store.publishing import publish


@pytest.fixture
def catalog(grown, tmp_path):
    return copied(grown, tmp_path / "atlas")


@pytest.fixture
def after(adapted, tmp_path):
    return copied(adapted, tmp_path / "atlas")


# nothing old changes


def test_every_old_file_of_embeddings_and_models_is_the_same(catalog, client):
    before = finished_files(catalog)
    done = adapt(catalog, client)
    after = finished_files(done)
    assert before.items() <= after.items()
    assert len(after) > len(before)


def test_old_slices_keep_their_objects(grown, adapted):
    before, after = open_catalog(grown), open_catalog(adapted)
    for slice_id in SLICES:
        assert after.slice(slice_id).objects == before.slice(slice_id).objects
    assert after.state.models["autoencoder"] == before.state.models["autoencoder"]
    for name in ("X_fp", "X_lloki"):
        assert all(embedding(after, one, name).tobytes() == embedding(before, one, name).tobytes() for one in SLICES)


def test_one_version_more_has_the_token_and_the_new_embedding(grown, adapted):
    catalog = open_catalog(adapted)
    assert catalog.version == open_catalog(grown).version + 1
    assert list(tokens(catalog)) == [role_of(catalog)]
    assert statuses(catalog)[NEW] == DONE
    assert verify(catalog) == []


def test_nothing_is_left_in_staging(adapted):
    assert not list((adapted / "staging").glob("*"))


# what the token does


def test_new_cells_lie_where_the_token_and_the_frozen_model_put_them(adapted):
    catalog = open_catalog(adapted)
    key = tokens(catalog)[role_of(catalog)]
    encoder = load_encoder(catalog.path("models", key))
    rows = embedding(catalog, NEW).astype(np.float32)
    expected = encoder.encode(rows, platform_name(catalog.slice(NEW)))
    np.testing.assert_array_equal(embedding(catalog, NEW, "X_lloki"), expected)


def test_new_cells_have_moved_from_where_the_mean_token_puts_them(adapted):
    catalog = open_catalog(adapted)
    model = load_model(catalog.path("models", catalog.state.models["autoencoder"]))
    rows = embedding(catalog, NEW).astype(np.float32)
    before = FrozenEncoder(only_token(model, "new")).encode(rows, "new")
    after = embedding(catalog, NEW, "X_lloki")
    share = np.linalg.norm(after - before, axis=1).mean() / np.linalg.norm(before, axis=1).mean()
    assert share > 0.02
    assert share == pytest.approx(adaptation_report(catalog, TECHNOLOGY)[0]["moved"], rel=0.01)


def test_the_report_says_what_was_measured(adapted):
    catalog = open_catalog(adapted)
    (part,) = adaptation_report(catalog, TECHNOLOGY)
    assert part["platform"] == platform_name(catalog.slice(NEW))
    assert part["slices"] == [NEW]
    assert part["token"] == tokens(catalog)[role_of(catalog)]
    assert part["autoencoder"] == catalog.state.models["autoencoder"]
    assert part["path"] == str(catalog.path("models", part["token"]))
    assert (part["n_cells"], part["n_atlas_cells"]) == (N_CELLS, 2 * N_CELLS)
    assert 0 < part["paired"] <= 1
    assert part["structure"] > part["structure_of_atlas"] / 2
    assert {"similarity", "moved", "mixing_before", "mixing"} <= set(part)


def test_a_technology_without_tokens_has_an_empty_report(adapted):
    assert adaptation_report(open_catalog(adapted), "SimFISH") == []


def test_a_token_says_what_it_was_made_of(adapted):
    catalog = open_catalog(adapted)
    description = token_description(catalog, tokens(catalog)[role_of(catalog)])
    base = checkpoint_description(catalog, catalog.state.models["autoencoder"])
    assert description["model"] == catalog.state.models["autoencoder"]
    assert description["model_digest"] == base["weights_digest"]
    assert description["lineage"] == {
        "slices": {NEW: catalog.slice(NEW).objects["embed"]},
        "atlas": {name: catalog.slice(name).objects["embed"] for name in SLICES},
        "label_key": None,
    }
    assert description["settings"] == {"random_state": 0}
    assert len(description["history"]) == 10


def test_the_status_says_which_models_encoded_a_slice(adapted):
    catalog = open_catalog(adapted)
    found = status(catalog)
    base, token = catalog.state.models["autoencoder"], tokens(catalog)[role_of(catalog)]
    by_slice = {part["slice_id"]: (part["autoencoder"], part["token"]) for part in found["slices"]}
    assert by_slice == {NEW: (base[:8], token[:8]), **dict.fromkeys(SLICES, (base[:8], None))}
    assert (found["autoencoder"], found["tokens"]) == (base, {platform_name(catalog.slice(NEW)): token})


def test_the_status_of_a_slice_that_is_not_encoded_names_no_model(grown):
    (part,) = (part for part in status(open_catalog(grown))["slices"] if part["slice_id"] == NEW)
    assert (part["autoencoder"], part["token"]) == (None, None)


# again, killed, in another order


def test_adapting_again_does_nothing(after, client):
    before = folder_digest(after.root)
    assert adapt(after, client).version == after.version
    assert folder_digest(after.root) == before


def test_a_run_afterwards_has_nothing_to_do(after):
    assert plan(after).tasks == ()


def test_a_run_that_was_killed_gives_the_same_bytes(catalog, adapted, client, monkeypatch):
    def die(*_, **__):
        raise InputError("killed")

    monkeypatch.setattr(adapt_tasks, "read_sample", die)
    with pytest.raises(InputError, match="killed"):
        adapt(catalog, client)
    halfway = open_catalog(catalog.root, mode="r+")
    assert tokens(halfway) == {}
    assert statuses(halfway)[NEW] == {**DONE, "integrate": "missing"}
    monkeypatch.undo()
    done = adapt(halfway, client)
    assert {**finished_files(done)} == {**finished_files(open_catalog(adapted))}


def test_without_dask_the_bytes_are_the_same(catalog, adapted):
    done = run_here(plan(catalog, slices=[NEW], adapt_on=[NEW]))
    assert finished_files(done) == finished_files(open_catalog(adapted))


def test_the_token_comes_after_the_embedding_and_before_the_encoding(grown):
    tasks = plan(open_catalog(grown), slices=[NEW], adapt_on=[NEW]).tasks
    (task,) = (task for task in tasks if task.stage == "adapt")
    assert task.requires == (f"embed/{NEW}/publish",)
    assert all(task.name in other.requires for other in tasks if other.stage == "integrate" and other.function)
    assert task.n_cells == N_CELLS


def test_the_order_in_which_technologies_join_changes_no_token(after, grown, client, sources, tmp_path):
    second = adapt(add_slice(after, sources, "simfish_plus_1"), client, technology="SimFISH-plus")
    other = add_slice(copied(grown, tmp_path / "other"), sources, "simfish_plus_1")
    first = adapt(other, client, technology="SimFISH-plus")
    role = role_of(first, "simfish_plus_1")
    assert tokens(first) == {role: tokens(second)[role]}
    assert embedding(first, "simfish_plus_1", "X_lloki").tobytes() == (
        embedding(second, "simfish_plus_1", "X_lloki").tobytes()
    )


def test_a_second_slice_of_an_adapted_panel_runs_alone_with_the_same_token(after, sources):
    before = tokens(after)
    twin = add_slice(after, sources / f"{NEW}.h5ad", "simish_again", technology=TECHNOLOGY)
    left = plan(twin)
    assert {task.slice_id for task in left.tasks} <= {"simish_again"}
    assert "adapt" not in stages(left)
    done = run_here(left)
    assert tokens(done) == before
    assert statuses(done)["simish_again"] == DONE


def test_adapting_on_other_slices_or_with_another_seed_makes_another_token(after, client):
    before, embedded = tokens(after), embedding(after, NEW, "X_lloki").tobytes()
    done = adapt(after, client, random_state=7)
    assert tokens(done).keys() == before.keys()
    assert tokens(done) != before
    assert embedding(done, NEW, "X_lloki").tobytes() != embedded
    # the seed stays with the token
    assert adapt(done, client).version == done.version
    assert plan(done).tasks == ()


def test_some_slices_may_be_chosen_and_all_of_their_panel_are_encoded(catalog, client, sources):
    catalog = add_slice(catalog, sources / f"{NEW}.h5ad", "simish_again", technology=TECHNOLOGY)
    done = adapt(catalog, client, slices=["simish_again"])
    description = token_description(done, tokens(done)[role_of(done)])
    assert list(description["lineage"]["slices"]) == ["simish_again"]
    assert statuses(done)[NEW] == statuses(done)["simish_again"] == DONE


# what is refused


@pytest.fixture
def embedded(catalog):
    return run_here(plan(catalog, until="embed"))


def replaced(catalog, slice_id, values):
    """Let a slice's 512-d embedding hold other values, as if it had been computed so."""
    key = catalog.slice(slice_id).objects["embed"]
    path = catalog.path("embeddings", key)
    shutil.rmtree(path)
    path.with_name(path.name + ".json").unlink()
    staging = catalog.path("staging", key)
    write_arrays(staging, {"X_fp": values.astype(np.float16)})
    publish(staging, path, lineage={})
    return open_catalog(catalog.root, mode="r+")


def test_random_embeddings_are_refused_and_nothing_is_committed(embedded, client):
    values = np.random.default_rng(0).normal(size=(N_CELLS, 512))
    catalog = replaced(embedded, NEW, values / np.linalg.norm(values, axis=1, keepdims=True))
    with pytest.raises(InputError, match=r"shares no structure with the atlas: .* Check gene symbols, organism"):
        adapt(catalog, client)
    assert tokens(open_catalog(catalog.root)) == {}
    assert statuses(open_catalog(catalog.root))[NEW]["integrate"] == "missing"


def test_cells_without_an_embedding_are_left_out(embedded, client):
    values = embedding(embedded, NEW).astype(np.float32)
    values[[3, 9]] = np.nan
    done = adapt(replaced(embedded, NEW, values), client)
    assert adaptation_report(done, TECHNOLOGY)[0]["n_cells"] == N_CELLS - 2
    assert np.flatnonzero(np.isnan(embedding(done, NEW, "X_lloki")).any(axis=1)).tolist() == [3, 9]


def test_a_slice_of_too_few_cells_is_refused(embedded, client):
    values = embedding(embedded, NEW).astype(np.float32)
    values[9:] = np.nan
    with pytest.raises(InputError, match="has 9 cells with an embedding, adapting needs 10"):
        adapt(replaced(embedded, NEW, values), client)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"technology": "SimFISH"},
            InputError,
            "already has a token for every panel of 'SimFISH': .* `lloki-atlas train`",
        ),
        (
            {"technology": "SimISHH"},
            NotFoundError,
            "no slice .* is of the technology 'SimISHH': the nearest are SimISH",
        ),
        ({"slices": ["simfish_1"]}, InputError, "'simfish_1' is none to adapt to 'SimISH' on: it is of .* 'SimFISH'"),
        ({"slices": ["simish"]}, NotFoundError, "no slice 'simish' in version"),
        (
            {"technology": "SimFISH", "slices": ["simfish_1"]},
            InputError,
            "'simfish_1' is none to adapt .* already has a token for it, `lloki-atlas train` makes a new model",
        ),
    ],
)
def test_what_cannot_be_adapted_to_is_refused(grown, client, options, error, message):
    with pytest.raises(error, match=message):
        adapt(open_catalog(grown, mode="r+"), client, **options)


def test_an_atlas_without_an_autoencoder_is_refused(ingested, client, tmp_path):
    with pytest.raises(InputError, match="has no autoencoder to adapt to yet: run the atlas first"):
        adapt(copied(ingested, tmp_path / "atlas"), client, technology="SimFISH")


def test_a_stale_autoencoder_is_refused(catalog, client):
    with pytest.raises(InputError, match="no autoencoder to adapt to that fits the settings and the embeddings"):
        adapt(with_settings(catalog, "autoencoder", n_epochs=1), client)


def test_a_catalog_that_is_open_for_reading_is_refused(grown, client):
    before = folder_digest(grown)
    with pytest.raises(InputError, match="open for reading: open it with mode='r\\+'"):
        adapt(open_catalog(grown), client)
    assert folder_digest(grown) == before


def test_a_plain_run_advises_to_adapt(grown):
    with pytest.raises(
        InputError, match=rf'adapt the atlas to it with `lloki-atlas adapt {grown} --technology "SimISH"`'
    ):
        plan(open_catalog(grown))


def test_a_token_beside_another_autoencoder_is_refused(after, client):
    # the base is exchanged on disk under the same name
    key = tokens(after)[role_of(after)]
    path = after.path("models", after.state.models["autoencoder"]) / "autoencoder.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "weights_digest": "0" * 32}))
    with pytest.raises(CheckpointError, match="belongs to an autoencoder with digest"):
        load_encoder(after.path("models", key))


def test_the_sample_of_a_slice_is_read_from_its_stored_embedding(adapted):
    catalog = open_catalog(adapted)
    key = catalog.slice(NEW).objects["embed"]
    stored = read_arrays(catalog.path("embeddings", key), ["X_fp"])["X_fp"]
    samples = [
        {
            "slice_id": NEW,
            "token": "t",
            "n_cells": N_CELLS,
            "embedding_path": str(catalog.path("embeddings", key)),
        }
    ]
    found = adapt_tasks.read_sample(samples, ["t"], size=1000, random_state=0)
    np.testing.assert_array_equal(found.embeddings, stored.astype(np.float32))


# settings of the autoencoder


def test_with_labels_the_autoencoder_is_adapted_with_labels(built, client, sources, tmp_path):
    old = copied(built, tmp_path / "atlas")
    labelled = train_autoencoder(old, label_key="cell_type_coarse", client=client, progress=False)
    done = adapt(add_slice(labelled, sources, NEW), client)
    description = token_description(done, tokens(done)[role_of(done)])
    assert description["lineage"]["label_key"] == "cell_type_coarse"
    assert statuses(done)[NEW] == DONE


def test_where_tokens_are_of_slices_each_new_slice_has_its_own(built, client, sources, tmp_path):
    old = with_settings(copied(built, tmp_path / "atlas"), "autoencoder", token_by="slice")
    grown = add_slice(run_here(plan(old)), sources, "simfish_2")
    with pytest.raises(InputError, match="no token for slice 'simfish_2'"):
        plan(grown)
    done = adapt(grown, client, technology="SimFISH", slices=["simfish_2"])
    assert list(tokens(done)) == [f"{role_of(done, 'simfish_2')}|simfish_2"]
    assert statuses(done) == dict.fromkeys([*SLICES, "simfish_2"], DONE)
    assert plan(done).tasks == ()
