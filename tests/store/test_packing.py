"""Checkpoints of large catalogs: shorter, the same state when read, and damage is seen."""

from __future__ import annotations

import json
import secrets
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lloki_atlas.errors import FormatError
from lloki_atlas.store.packing import PACKED_SLICES, pack_state, unpack_state
from lloki_atlas.store.records import STAGE_KINDS, CatalogState, Change, SliceRecord, VersionRecord


def large_state(n_slices):
    """A state whose slices share panels, and whose last object has no digest."""
    slices, objects = {}, {}
    for number in range(n_slices):
        keys = {stage: secrets.token_hex(16) for stage in STAGE_KINDS}
        keys["reference"] = f"{number % 4:032x}"
        name = f"slice_{number}"
        slices[name] = SliceRecord(name, "MERFISH", "mouse", f"{number % 4:032x}", 500, 120, ("type",), keys)
        objects |= {f"{STAGE_KINDS[stage]}/{key}": secrets.token_hex(16) for stage, key in keys.items()}
    objects.pop(max(objects))
    return CatalogState({"a": {"b": 1}}, "0" * 32, {"autoencoder": "1" * 32}, slices, dict(sorted(objects.items())))


def record_of(state):
    return VersionRecord(16, 15, "o" * 32, "2026-11-21", "0.1.0", "a message", Change(), state, state.oldest)


@pytest.mark.parametrize("n_slices", [0, 1, PACKED_SLICES - 1, PACKED_SLICES, 200])
@pytest.mark.parametrize("oldest", [1, 3])
def test_a_checkpoint_comes_back(n_slices, oldest):
    record = record_of(replace(large_state(n_slices), oldest=oldest) if n_slices else CatalogState(oldest=oldest))
    assert VersionRecord.from_json(json.loads(record.to_bytes()), where="here") == record


def test_small_catalogs_stay_readable_by_people_and_by_older_code():
    content = json.loads(record_of(large_state(PACKED_SLICES - 1)).to_bytes())
    assert content["format"] == 1
    assert isinstance(content["state"], dict)


def test_large_ones_are_a_third_as_long():
    state = large_state(500)
    content = json.loads(record_of(state).to_bytes())
    assert content["format"] == 2
    assert len(content["state"]) < 0.36 * len(json.dumps(state.to_json()))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_within_a_packed_state_is_seen(data):
    content = json.loads(record_of(LARGE).to_bytes())
    text = content["state"]
    where = data.draw(st.integers(0, len(text) - 1))
    content["state"] = text[:where] + data.draw(st.sampled_from(["", "!", "aa"])) + text[where + 1 :]
    if content["state"] != text:
        with pytest.raises(FormatError, match="is damaged"):
            VersionRecord.from_json(content, where="here")


LARGE = large_state(PACKED_SLICES)


@pytest.mark.parametrize("text", ["", "x", "abcde", "é", "0" * 100])
def test_what_was_never_packed_is_refused(text):
    with pytest.raises(ValueError):
        unpack_state(text)


def test_a_state_that_is_cut_short_is_refused():
    packed = pack_state(LARGE.to_json(), sorted(LARGE.references()))
    with pytest.raises(ValueError):
        unpack_state(packed[: len(packed) // 10 * 5])
