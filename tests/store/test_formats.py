"""Stores of every format version that was ever written: read, verified, continued; newer ones are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.folders import folder_digest
from support.format_stores import EMBED, INGEST, INTEGRATE, N_CELLS, N_GENES, REFERENCE, make, values
from support.housekeeping import grow_old, quick_disk
from support.stores import commit_slice

from lloki_atlas.config import canonical_json
from lloki_atlas.errors import FormatError
from lloki_atlas.store.arrays import read_arrays, read_attributes
from lloki_atlas.store.catalog import history, list_versions, open_catalog, verify
from lloki_atlas.store.log import FORMAT_VERSION
from lloki_atlas.store.portable import export_version, import_version
from lloki_atlas.store.retention import gc
from lloki_atlas.store.revert import remove, rollback
from lloki_atlas.store.slices import SliceStore
from lloki_atlas.store.verification import verify_deep, verify_quick

__all__ = ["quick_disk"]
pytestmark = pytest.mark.usefixtures("quick_disk")

STORES = Path(__file__).resolve().parent.parent / "data" / "stores"
KEPT = sorted(STORES.glob("format-*"))


@pytest.fixture(params=KEPT, ids=lambda folder: folder.name)
def store(request, tmp_path):
    """A copy of a kept store; git keeps no empty folders and no times."""
    return Path(shutil.copytree(request.param, tmp_path / "atlas"))


def test_there_is_a_store_of_every_format_version():
    assert [folder.name for folder in KEPT] == [f"format-{number}" for number in range(1, FORMAT_VERSION + 1)]


def test_an_old_store_is_opened_and_says_what_it_said(store):
    before = folder_digest(store)
    catalog = open_catalog(store)
    assert (catalog.version, list_versions(store)) == (4, [1, 2, 3, 4])
    record = catalog.slice("one")
    assert (record.technology, record.n_cells, record.n_genes) == ("SimFISH", N_CELLS, N_GENES)
    assert record.objects == {"ingest": INGEST, "embed": EMBED, "integrate": INTEGRATE}
    assert catalog.state.reference == REFERENCE
    assert catalog.state.config == {"tile": {"tile_cells": 4}}
    assert set(open_catalog(store, version=2).slice("one").objects) == {"ingest"}
    assert open_catalog(store, version=1).state.slices == {}
    assert [record.message for record in history(catalog)] == ["create", "ingest one", "run: 1 slices", "settings"]
    assert folder_digest(store) == before


def test_arrays_of_an_old_store_are_read(store):
    catalog = open_catalog(store)
    slices = SliceStore(catalog.path("slices", INGEST))
    assert (slices.n_cells, slices.genes, slices.symbols) == (N_CELLS, ("Gad1", "Sst", "Blank-1"), ("Gad1", "Sst", ""))
    np.testing.assert_array_equal(slices.counts().toarray(), values(N_GENES))
    np.testing.assert_array_equal(slices.coordinates(), values(2))
    assert list(slices.obs(["cell_type"])["cell_type"]) == list("ABABA")
    for key, name, width, dtype in ((EMBED, "X_fp", 4, "float16"), (INTEGRATE, "X_lloki", 2, "float32")):
        found = read_arrays(catalog.path("embeddings", key))[name]
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, values(width, dtype))
    assert read_attributes(catalog.path("references", REFERENCE))["made"] == "test"


def test_an_old_store_is_whole(store):
    for version in list_versions(store):
        assert verify(open_catalog(store, version=version)) == []
        assert verify_quick(open_catalog(store, version=version)) == []
    assert verify_deep(store) == []


def test_an_old_store_is_written_to_as_it_is(store, tmp_path):
    catalog = commit_slice(open_catalog(store, mode="r+"), "two")
    catalog = rollback(remove(catalog, "one"), 4)
    assert catalog.state == open_catalog(store, version=4).state
    grow_old(store)
    assert gc(catalog, keep_versions=1).objects
    assert verify_deep(store) == []
    exported = export_version(open_catalog(store), tmp_path / "out")
    assert import_version(commit_slice(open_catalog(exported.root, mode="r+"), "three"), store).version == 2
    assert json.loads((store / "catalog.json").read_bytes())["format_version"] == FORMAT_VERSION


def test_what_is_made_now_has_the_form_of_the_newest_kept_store(store, tmp_path):
    made = make(tmp_path / "new")
    kept = open_catalog(store)
    assert made.state.slices == kept.state.slices
    assert set(made.state.objects) == set(kept.state.objects)
    for new, old in zip(history(made), history(kept), strict=True):
        assert json.loads(new.to_bytes()).keys() == json.loads(old.to_bytes()).keys()
        assert json.loads(new.to_bytes())["format"] == json.loads(old.to_bytes())["format"]


@pytest.mark.parametrize("use", [open_catalog, list_versions, verify_quick])
def test_a_store_of_a_newer_format_is_refused_with_what_to_do(store, use):
    identity = {**json.loads((store / "catalog.json").read_bytes()), "format_version": FORMAT_VERSION + 1}
    identity.pop("digest", None)
    (store / "catalog.json").write_bytes(canonical_json(identity))
    with pytest.raises(FormatError, match=f"has format {FORMAT_VERSION + 1}: update lloki-atlas"):
        use(store) if use is not verify_quick else verify_quick(open_catalog(store))


@pytest.mark.parametrize("found", [0, -1, True, 1.0, "1", None])
def test_a_format_that_never_was_is_damage(store, found):
    (store / "catalog.json").write_text(json.dumps({"format_version": found, "id": "0" * 32}))
    with pytest.raises(FormatError, match=r"catalog\.json is damaged"):
        open_catalog(store)


def test_an_identity_whose_digest_does_not_fit_is_damage(tmp_path):
    root = make(tmp_path / "new").root
    content = json.loads((root / "catalog.json").read_bytes())
    (root / "catalog.json").write_bytes(canonical_json({**content, "id": "0" * 32}))
    with pytest.raises(FormatError, match=r"catalog\.json is damaged"):
        open_catalog(root)
