"""Records: what a version says survives its JSON form, and a damaged form is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lloki_atlas.errors import FormatError, InputError, NotFoundError
from lloki_atlas.store.records import (
    KINDS,
    RECORD_FORMAT,
    STAGE_KINDS,
    CatalogState,
    Change,
    SliceRecord,
    VersionRecord,
    nearest_names,
    split_name,
)

SLICE = SliceRecord("s1", "merfish", "human", "0" * 32, 11, 4, ("cell_type",), {"ingest": "a" * 32, "embed": "b" * 32})
CHANGE = Change(
    config={"tile": {"tile_cells": 4}},
    reference="c" * 32,
    models={"embedder": "d" * 32},
    slices={"s1": SLICE},
    objects={f"slices/{'a' * 32}": "1" * 32, f"embeddings/{'b' * 32}": "2" * 32},
)
STATE = CatalogState().apply(CHANGE)


def _record(**parts):
    values = {
        "version": 3,
        "parent": 2,
        "owner": "f" * 32,
        "time": "2025-01-01T00:00:00+00:00",
        "code_version": "0.1.0",
    }
    return VersionRecord(**{**values, "message": "é", "change": CHANGE, "state": None, **parts})


@pytest.mark.parametrize("state", [None, STATE])
@pytest.mark.parametrize("change", [CHANGE, Change(), Change(slices={"s1": None}, models={"autoencoder": None})])
def test_a_version_record_survives_its_form_on_disk(change, state):
    record = _record(change=change, state=state)
    assert VersionRecord.from_json(json.loads(record.to_bytes()), where="x") == record


def test_the_digests_that_a_version_adds_stand_at_the_top_of_its_record():
    assert json.loads(_record().to_bytes())["objects"] == CHANGE.objects


@pytest.mark.parametrize(
    "field", ["version", "parent", "owner", "time", "code_version", "message", "change", "objects"]
)
def test_a_record_with_a_field_altered_is_damaged(field):
    content = json.loads(_record().to_bytes())
    content[field] = "other"
    with pytest.raises(FormatError, match=r"versions/3\.json is damaged"):
        VersionRecord.from_json(content, where="versions/3.json")


@pytest.mark.parametrize("content", [None, [], {}, {"format": "1"}, {"format": 1}])
def test_what_is_no_record_is_damaged(content):
    with pytest.raises(FormatError, match="damaged"):
        VersionRecord.from_json(content, where="x")


def test_a_record_of_a_newer_format_asks_for_an_update_whatever_else_it_says():
    with pytest.raises(FormatError, match="update lloki-atlas"):
        VersionRecord.from_json({"format": RECORD_FORMAT + 1, "unknown": True}, where="x")


def test_each_stage_has_a_kind_of_folder():
    assert list(STAGE_KINDS) == ["ingest", "tile", "reference", "propagate", "embed", "integrate"]
    assert set(STAGE_KINDS.values()) <= set(KINDS)


def test_a_slice_points_to_an_object_for_each_stage():
    assert SLICE.references() == {f"slices/{'a' * 32}", f"embeddings/{'b' * 32}"}


@pytest.mark.parametrize(
    "parts",
    [
        {"slice_id": ""},
        {"n_cells": 0},
        {"n_genes": 0},
        {"objects": {"index": "a" * 32}},
        {"objects": {"embed": "../x"}},
        {"objects": {"embed": ""}},
    ],
)
def test_an_impossible_slice_record_is_refused(parts):
    with pytest.raises(InputError):
        dataclasses.replace(SLICE, **parts)


def test_a_change_names_each_slice_by_its_id():
    with pytest.raises(InputError, match="use one id"):
        Change(slices={"s2": SLICE})


@pytest.mark.parametrize("name", ["a" * 32, "things/x", "slices/", "slices/a/b", "slices/../x"])
def test_an_object_is_named_by_kind_and_key(name):
    with pytest.raises(InputError):
        split_name(name)


def test_settings_are_kept_as_they_will_be_read_back():
    assert Change(config={"a": (1, 2)}).config == {"a": [1, 2]}


def test_what_a_change_does_not_name_stays():
    assert STATE.apply(Change()) == STATE


def test_a_new_slice_leaves_the_others():
    other = dataclasses.replace(SLICE, slice_id="s2")
    assert STATE.apply(Change(slices={"s2": other})).slices == {"s1": SLICE, "s2": other}


def test_a_removed_slice_takes_its_digests_along():
    state = STATE.apply(Change(slices={"s1": None}))
    assert state.slices == {}
    assert state.objects == {}


@pytest.mark.parametrize("change", [Change(slices={"s9": None}), Change(models={"autoencoder": None})])
def test_removing_what_is_not_there_is_not_found(change):
    with pytest.raises(NotFoundError, match="to remove"):
        STATE.apply(change)


def test_a_change_touches_what_it_sets():
    assert CHANGE.touched() == {"the settings", "the reference", "model 'embedder'", "slice 's1'"}
    assert Change(objects=CHANGE.objects).touched() == set()


@pytest.mark.parametrize(
    ("known", "sentence"),
    [(["brain-1", "brain-2", "x"], "brain-2, brain-1"), (["x"], "the nearest are x"), ([], "there are none yet")],
)
def test_the_nearest_names_are_named(known, sentence):
    assert sentence in nearest_names("brain-22", known)
