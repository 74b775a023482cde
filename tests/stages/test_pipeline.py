"""Plan, run, train, status: what runs and what does not, new slices, changed settings, refusals."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from support.atlases import (
    N_CELLS,
    SLICES,
    add_slice,
    all_bytes,
    copied,
    embedding,
    run_here,
    stages,
    with_settings,
)
from support.folders import folder_digest

from lloki_atlas.config import digest
from lloki_atlas.engine.plan import Outcome
from lloki_atlas.errors import InputError, NotFoundError
from lloki_atlas.stages import embed, pipeline
from lloki_atlas.stages.lineage import MADE_OF, STAGES, expected_objects, stage_status
from lloki_atlas.stages.pipeline import plan, run, train_autoencoder
from lloki_atlas.stages.train import checkpoint_description
from lloki_atlas.store.catalog import Catalog, commit, history, open_catalog, verify
from lloki_atlas.store.objects import is_complete, read_receipt
from lloki_atlas.store.records import STAGE_KINDS, CatalogState, Change

DONE = dict.fromkeys(STAGES, "done")


def statuses(catalog):
    return {name: stage_status(catalog, record) for name, record in catalog.state.slices.items()}


@pytest.fixture
def catalog(built, tmp_path):
    """An atlas of the test's own that ran to the end."""
    return copied(built, tmp_path / "atlas")


@pytest.fixture
def fresh(ingested, tmp_path):
    """An atlas of the test's own in which nothing was run."""
    return copied(ingested, tmp_path / "atlas")


def test_a_first_plan_has_every_stage_of_every_slice(ingested):
    tiles = 2 * 2 + 2
    assert stages(plan(open_catalog(ingested))) == {
        "tile": 2,
        "reference": 2,
        "propagate": 2,
        "embed": tiles,
        "train": 1,
        "integrate": 2 * (1 + 1),
    }


def test_tasks_come_after_those_that_they_require(ingested):
    seen = set()
    for task in plan(open_catalog(ingested)).tasks:
        assert set(task.requires) <= seen
        seen.add(task.name)


def test_training_requires_every_embedding_that_it_reads(ingested):
    (train,) = (task for task in plan(open_catalog(ingested)).tasks if task.stage == "train")
    assert set(train.requires) == {f"embed/{name}/publish" for name in SLICES}


def test_planning_writes_nothing(ingested):
    before = folder_digest(ingested)
    plan(open_catalog(ingested))
    assert folder_digest(ingested) == before


def test_after_a_run_everything_is_done(built):
    assert statuses(open_catalog(built)) == dict.fromkeys(SLICES, DONE)


def test_after_a_run_every_byte_is_the_one_that_its_receipt_says(built):
    assert verify(open_catalog(built)) == []


def test_a_run_leaves_nothing_in_staging(built):
    assert not list((built / "staging").glob("*"))


def test_a_run_makes_one_version(built):
    messages = [record.message for record in history(open_catalog(built))]
    assert messages == ["create", *(f"ingest {name}" for name in SLICES), "run: 2 slices"]


def test_a_second_plan_has_no_task(built):
    assert plan(open_catalog(built)).tasks == ()


def test_a_second_run_makes_no_version_and_touches_no_file(catalog, client):
    before = folder_digest(catalog.root)
    assert run(catalog, client=client, progress=False).version == catalog.version
    assert folder_digest(catalog.root) == before


def test_a_second_run_needs_no_cluster(catalog):
    assert run(catalog, progress=False, n_workers=-1).version == catalog.version


def test_a_run_without_dask_gives_the_same_bytes(fresh, built):
    assert all_bytes(run_here(plan(fresh))) == all_bytes(open_catalog(built))


@pytest.mark.parametrize("until", STAGES)
def test_a_run_ends_at_the_stage_that_is_asked_for(ingested, until):
    wanted = set(STAGES[1 : STAGES.index(until) + 1]) | ({"train"} if until == "integrate" else set())
    assert set(stages(plan(open_catalog(ingested), until=until))) == wanted


def test_a_run_until_a_stage_records_the_stages_before_it(fresh):
    done = run_here(plan(fresh, until="propagate"))
    assert {stage for stage, state in statuses(done)["simfish_1"].items() if state == "done"} == set(STAGES[:4])


def test_a_run_continues_where_another_ended(fresh):
    done = run_here(plan(fresh, until="propagate"))
    assert set(stages(plan(done))) == {"embed", "train", "integrate"}


def test_a_run_may_be_for_some_slices_alone(fresh):
    done = statuses(run_here(plan(fresh, slices=["simmap_1"], until="propagate")))
    assert done["simmap_1"]["propagate"] == "done"
    assert set(done["simfish_1"].values()) == {"done", "missing"}
    assert done["simfish_1"]["tile"] == "missing"


def test_a_slice_named_twice_runs_once(ingested):
    catalog = open_catalog(ingested)
    assert stages(plan(catalog, slices=["simmap_1", "simmap_1"])) == stages(plan(catalog, slices=["simmap_1"]))


def test_a_first_model_is_trained_on_the_slices_of_the_run(fresh):
    done = run_here(plan(fresh, slices=["simmap_1"]))
    model = checkpoint_description(done, done.state.models["autoencoder"])
    assert list(model["lineage"]["slices"]) == ["simmap_1"]


def test_an_atlas_without_slices_has_nothing_to_do(built):
    catalog = open_catalog(built)
    empty = Catalog(
        catalog.root,
        1,
        CatalogState(config=catalog.state.config, reference=catalog.state.reference, models=catalog.state.models),
    )
    assert plan(empty).tasks == ()


def test_a_lost_object_is_made_again_with_the_same_bytes(catalog):
    before = all_bytes(catalog)
    path = catalog.path("embeddings", catalog.slice("simmap_1").objects["integrate"])
    shutil.rmtree(path)
    path.with_name(path.name + ".json").unlink()
    left = plan(catalog)
    assert stages(left) == {"integrate": 2}
    assert all_bytes(run_here(left)) == before


def test_objects_that_were_made_but_never_committed_are_only_recorded(fresh, client):
    plan(fresh, until="embed").run(client, progress=False)
    # the catalog as it was: its run is on disk, its version is forgotten
    (fresh.root / "versions" / f"{fresh.version + 1:08d}.json").unlink()
    left = plan(fresh, until="embed")
    assert left.tasks == ()
    assert statuses(left.run(client))["simfish_1"]["embed"] == "done"


def test_a_new_slice_of_a_known_panel_runs_alone_and_keeps_the_model(catalog, sources):
    before, model = all_bytes(catalog), catalog.state.models["autoencoder"]
    left = plan(add_slice(catalog, sources, "simfish_2"))
    assert {task.slice_id for task in left.tasks} == {"simfish_2"}
    assert "train" not in stages(left)
    done = run_here(left)
    assert done.state.models["autoencoder"] == model
    assert {key: value for key, value in all_bytes(done).items() if key[0] != "simfish_2"} == before
    assert statuses(done)["simfish_2"] == DONE


def test_a_new_slice_of_a_known_panel_shares_what_the_panel_takes_from_the_reference(catalog, sources):
    assert "reference" not in stages(plan(add_slice(catalog, sources, "simmap_2")))


def test_slices_of_one_panel_have_one_task_for_it(fresh, sources):
    assert stages(plan(add_slice(fresh, sources, "simfish_2")))["reference"] == 2


@pytest.fixture
def with_unknown(catalog, sources):
    """The atlas with a slice of a panel that its encoder was not trained on."""
    return add_slice(catalog, sources, "simish_1")


UNKNOWN = r"no token for slice 'simish_1' \(SimISH, a new panel\): "
TRAIN = r"train it anew .* or stop .* until='embed'"


def test_a_new_slice_of_an_unknown_panel_is_refused_with_advice(with_unknown):
    advice = UNKNOWN + rf'adapt the atlas to it with `lloki-atlas adapt {with_unknown.root} --technology "SimISH"`, '
    with pytest.raises(InputError, match=advice + TRAIN):
        plan(with_unknown)


def test_a_new_model_encodes_again_and_embeds_nothing(catalog, client):
    before = all_bytes(catalog)
    changed = with_settings(catalog, "autoencoder", n_epochs=1)
    assert set(stages(plan(changed))) == {"train", "integrate"}
    after = all_bytes(run(changed, client=client, progress=False))
    assert {key for key in before if before[key] != after[key]} == {key for key in before if key[1] == "X_lloki"}


@pytest.mark.parametrize("until", ["embed", "integrate"])
def test_a_plan_of_many_slices_is_that_of_few(catalog, sources, monkeypatch, until):
    grown = add_slice(catalog, sources, "simfish_2")
    few = plan(grown, until=until).tasks
    monkeypatch.setattr(pipeline, "FEW_SLICES", 0)
    assert plan(grown, until=until).tasks == few
    assert few


def test_receipts_say_what_the_key_of_an_object_is_made_of(built):
    catalog = open_catalog(built)
    for record in catalog.state.slices.values():
        for stage in STAGES[1:]:
            key = record.objects[stage]
            made = read_receipt(catalog.path(STAGE_KINDS[stage], key)).lineage[MADE_OF]
            assert (made["stage"], digest(made)) == (stage, key)
    model = catalog.state.models["autoencoder"]
    assert digest(read_receipt(catalog.path("models", model)).lineage[MADE_OF]) == model


def test_a_plan_says_how_many_bytes_it_writes_at_most(fresh):
    made = plan(fresh)
    before = size_of(fresh.root)
    said = made.summary()
    assert said["writes"] == sum(part["writes"] for part in said["stages"].values())
    assert said["stages"]["embed"]["writes"] >= 2 * N_CELLS * 512 * 2
    run_here(made)
    assert 0 < size_of(fresh.root) - before <= said["writes"]


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_new_slice_of_an_unknown_panel_can_be_embedded(with_unknown):
    done = run_here(plan(with_unknown, until="embed"))
    assert statuses(done)["simish_1"] == {**DONE, "integrate": "missing"}


def test_other_slices_still_run_beside_one_of_an_unknown_panel(with_unknown):
    assert plan(with_unknown, slices=SLICES).tasks == ()


def test_an_unknown_panel_is_refused_also_when_the_model_is_to_be_trained_again(with_unknown):
    changed = with_settings(with_unknown, "autoencoder", n_epochs=1)
    with pytest.raises(InputError, match=UNKNOWN + TRAIN):
        plan(changed)


def test_training_anew_takes_in_an_unknown_panel(with_unknown, client):
    done = train_autoencoder(with_unknown, client=client, progress=False)
    assert statuses(done) == dict.fromkeys([*SLICES, "simish_1"], DONE)


def test_training_on_a_subset_makes_another_model_and_encodes_everything_anew(catalog, sources, client):
    catalog = run(add_slice(catalog, sources, "simfish_2"), client=client, progress=False)
    before, model = all_bytes(catalog), catalog.state.models["autoencoder"]
    done = train_autoencoder(catalog, slices=["simfish_2", "simmap_1"], client=client, progress=False)
    after = all_bytes(done)
    assert done.state.models["autoencoder"] != model
    assert statuses(done) == dict.fromkeys([*SLICES, "simfish_2"], DONE)
    for slice_id, name in before:
        assert (before[slice_id, name] == after[slice_id, name]) == (name == "X_fp")


def test_training_on_a_subset_without_a_panel_of_the_atlas_is_refused_before_it_starts(catalog, client):
    with pytest.raises(InputError, match="no token for slice 'simmap_1'"):
        train_autoencoder(catalog, slices=["simfish_1"], client=client, progress=False)
    assert open_catalog(catalog.root).version == catalog.version


def test_training_on_the_same_slices_again_has_nothing_to_do(catalog, client):
    assert train_autoencoder(catalog, client=client, progress=False).version == catalog.version


def test_training_with_another_seed_makes_another_model_and_keeps_the_seed(catalog, client):
    done = train_autoencoder(catalog, random_state=5, client=client, progress=False)
    assert done.state.config["autoencoder"]["random_state"] == 5
    assert done.state.models["autoencoder"] != catalog.state.models["autoencoder"]
    assert statuses(done) == dict.fromkeys(SLICES, DONE)


def test_a_search_without_cells_to_hold_out_is_refused_and_not_kept(catalog, client):
    with pytest.raises(InputError, match="a search needs a slice of more than 256 cells"):
        train_autoencoder(catalog, search=True, client=client, progress=False)
    assert open_catalog(catalog.root).version == catalog.version


def test_training_with_labels_is_written_down_and_kept_when_the_model_is_renewed(catalog, client):
    labelled = train_autoencoder(catalog, label_key="cell_type_coarse", client=client, progress=False)
    renewed = run_here(plan(with_settings(labelled, "autoencoder", n_epochs=1)))
    for done in (labelled, renewed):
        model = checkpoint_description(done, done.state.models["autoencoder"])
        assert model["lineage"]["label_key"] == "cell_type_coarse"
    assert labelled.state.models["autoencoder"] != renewed.state.models["autoencoder"]


def test_a_seed_is_not_kept_when_the_training_is_refused(catalog, client):
    with pytest.raises(InputError):
        train_autoencoder(catalog, random_state=5, label_key="no such column", client=client, progress=False)
    assert open_catalog(catalog.root).version == catalog.version


def test_training_with_labels_that_no_slice_has_is_refused(catalog, client):
    with pytest.raises(InputError, match="label column 'class': choose from cell_type_coarse"):
        train_autoencoder(catalog, label_key="class", client=client, progress=False)


DIFFUSION = [{"alpha": 0.5}, {"keep_observed": True}, {"cap_final": True}, {"diffuse": "embedding"}]


@pytest.mark.parametrize("setting", DIFFUSION, ids=str)
def test_another_diffusion_makes_the_embedding_and_what_follows_stale(catalog, setting):
    changed = with_settings(catalog, "propagation", **setting)
    stale = {**DONE, "embed": "stale", "integrate": "stale"}
    assert statuses(changed) == dict.fromkeys(SLICES, stale)


def test_another_graph_makes_propagation_and_what_follows_stale(catalog):
    changed = with_settings(catalog, "propagation", n_neighbors=6)
    stale = {**DONE, "propagate": "stale", "embed": "stale", "integrate": "stale"}
    assert statuses(changed) == dict.fromkeys(SLICES, stale)


def test_a_run_renews_what_another_alpha_made_stale(catalog, client):
    before = all_bytes(catalog)
    changed = with_settings(catalog, "propagation", alpha=0.5)
    assert set(stages(plan(changed))) == {"embed", "train", "integrate"}
    done = run(changed, client=client, progress=False)
    assert statuses(done) == dict.fromkeys(SLICES, DONE)
    assert not any(value == before[key] for key, value in all_bytes(done).items())


def test_going_back_to_earlier_settings_runs_nothing(catalog):
    before = all_bytes(catalog)
    changed = run_here(plan(with_settings(catalog, "propagation", alpha=0.5), until="embed"))
    back = plan(with_settings(changed, "propagation", alpha=1.0))
    assert back.tasks == ()
    assert all_bytes(back.commit(Outcome(frozenset(), {}))) == before


def test_another_number_of_epochs_trains_and_encodes_and_does_nothing_else(catalog):
    assert set(stages(plan(with_settings(catalog, "autoencoder", n_epochs=1)))) == {"train", "integrate"}


@pytest.mark.parametrize("setting", [{"tile_cells": 7}, {"slice_memory_mb": 0}, {"search_cells": 7}], ids=str)
def test_another_cut_of_the_work_makes_nothing_stale(catalog, setting):
    assert plan(with_settings(catalog, "tile", **setting)).tasks == ()


def test_readers_of_an_earlier_version_see_what_they_saw(catalog):
    before = all_bytes(catalog)
    run_here(plan(with_settings(catalog, "propagation", alpha=0.5), until="embed"))
    assert all_bytes(open_catalog(catalog.root, version=catalog.version)) == before


def test_a_slice_that_leaves_the_atlas_leaves_the_model_as_it_is(catalog):
    smaller = commit(catalog, Change(slices={"simmap_1": None}), message="removed by a test")
    assert plan(smaller).tasks == ()


def test_a_model_is_renewed_from_the_slices_that_are_left(catalog):
    smaller = commit(catalog, Change(slices={"simmap_1": None}), message="removed by a test")
    done = run_here(plan(with_settings(smaller, "autoencoder", n_epochs=1)))
    model = checkpoint_description(done, done.state.models["autoencoder"])
    assert list(model["lineage"]["slices"]) == ["simfish_1"]
    assert plan(done).tasks == ()


def test_what_succeeded_beside_a_failure_is_committed(fresh, client, monkeypatch):
    def fail_for_one(original=embed.compute, **arguments):
        if arguments["inputs"]["slice"].endswith(f"{fresh.slice('simmap_1').objects['ingest']}.zarr"):
            raise InputError("this tile cannot be embedded")
        return original(**arguments)

    monkeypatch.setattr(embed, "compute", fail_for_one)
    with pytest.raises(InputError, match="this tile cannot be embedded"):
        run(fresh, client=client, progress=False)
    found = statuses(open_catalog(fresh.root))
    assert (found["simfish_1"]["embed"], found["simmap_1"]["embed"]) == ("done", "missing")
    assert found["simmap_1"]["propagate"] == "done"
    monkeypatch.undo()
    assert set(stages(plan(open_catalog(fresh.root)))) == {"embed", "train", "integrate"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"until": "embedding"}, InputError, "no stage 'embedding': choose from ingest, tile, reference, propagate"),
        ({"slices": ["simfish1"]}, NotFoundError, "no slice 'simfish1' in version .*simfish_1"),
        ({"train_on": ["simfish1"]}, NotFoundError, "no slice 'simfish1'"),
        ({"train_on": []}, InputError, "no slice to train the autoencoder on"),
    ],
)
def test_what_does_not_exist_is_refused(built, options, error, message):
    with pytest.raises(error, match=message):
        plan(open_catalog(built), **options)


def test_an_atlas_without_a_reference_is_refused(built):
    bare = Catalog(built, 1, CatalogState(), "r")
    with pytest.raises(InputError, match="has no reference yet: create the catalog with one"):
        plan(bare)


@pytest.mark.parametrize("verb", [run, train_autoencoder])
def test_a_catalog_that_is_open_for_reading_is_refused_before_anything_runs(ingested, verb):
    before = folder_digest(ingested)
    with pytest.raises(InputError, match="open for reading: open it with mode='r\\+'"):
        verb(open_catalog(ingested), progress=False, n_workers=-1)
    assert folder_digest(ingested) == before


def test_recorded_objects_are_those_that_are_expected(built):
    catalog = open_catalog(built)
    for record in catalog.state.slices.values():
        assert record.objects == expected_objects(catalog, record)
        assert all(is_complete(catalog.path(STAGE_KINDS[stage], key)) for stage, key in record.objects.items())


def test_every_cell_with_counts_has_both_vectors(built):
    catalog = open_catalog(built)
    for slice_id in SLICES:
        assert np.isfinite(embedding(catalog, slice_id)).all()
        assert np.isfinite(embedding(catalog, slice_id, "X_lloki")).all()
