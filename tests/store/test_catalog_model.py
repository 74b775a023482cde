"""The catalog against a list of dictionaries: two writers that take turns, readers, garbage, in any order.

`versions[n - 1]` is what version n has to say: for each slice its content and the model that encoded it, for each role
the content of its model, the reference, the settings. `touched[n - 1]` is what version n changed; of two writers the
later one is in conflict when these overlap. `present` are the objects that are on disk.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.housekeeping import object_names
from support.stores import publish_object, slice_record, tiny_catalog

from lloki_atlas.errors import ConflictError, FormatError, NotFoundError
from lloki_atlas.store.catalog import commit, history, list_versions, open_catalog, verify
from lloki_atlas.store.leases import writing
from lloki_atlas.store.portable import export_version, import_version
from lloki_atlas.store.records import Change
from lloki_atlas.store.retention import gc
from lloki_atlas.store.revert import remove, rollback
from lloki_atlas.store.verification import verify_deep

SLICE_IDS = st.sampled_from(["s1", "s2", "s3"])
ROLES = st.sampled_from(["embedder", "autoencoder"])
CONTENTS = st.sampled_from(["a", "b", "c"])
WRITERS = st.sampled_from(["one", "two"])

SETTINGS, REFERENCE, MODEL = "settings", "reference", "autoencoder"


class CatalogMachine(RuleBasedStateMachine):
    """Commits, readers and collections of one catalog on disk."""

    @initialize()
    def make(self):
        # a disk that forgets is tested elsewhere: this one need not be waited for
        self.no_wait = mock.patch.object(os, "fsync", return_value=None)
        self.no_wait.start()
        self.folder = tempfile.TemporaryDirectory()
        self.made = tiny_catalog(Path(self.folder.name) / "atlas")
        self.root = self.made.root
        self.handles = {"one": self.made, "two": self.made}
        self.versions, self.touched, self.oldest = [{SETTINGS: "4"}], [set()], 1
        self.present, self.prepared = set(), []

    def teardown(self):
        if hasattr(self, "root"):
            assert verify_deep(self.root) == []
            self.folder.cleanup()
            self.no_wait.stop()

    # what writers do

    @rule(writer=WRITERS, name=SLICE_IDS, content=CONTENTS)
    def ingest(self, writer, name, content):
        self._commit(writer, *self._ingested(name, content))

    @rule(writer=WRITERS, name=SLICE_IDS)
    def run(self, writer, name):
        handle = self.handles[writer]
        if name in handle.state.slices:
            self._commit(writer, *self._encoded(handle, [name], {}))

    @rule(writer=WRITERS, content=CONTENTS)
    def train(self, writer, content):
        """A new model encodes every slice, in one version."""
        handle = self.handles[writer]
        models = {MODEL: self._publish("models", content)}
        change, says = self._encoded(handle, sorted(handle.state.slices), models)
        self._commit(writer, change, {**says, MODEL: content})

    @rule(writer=WRITERS, role=ROLES, content=CONTENTS)
    def set_a_model(self, writer, role, content):
        self._commit(writer, Change(models={role: self._publish("models", content)}), {role: content})

    @rule(writer=WRITERS, content=CONTENTS)
    def set_the_reference(self, writer, content):
        self._commit(writer, Change(reference=self._publish("references", content)), {REFERENCE: content})

    @rule(writer=WRITERS, content=CONTENTS)
    def change_the_settings(self, writer, content):
        self._commit(writer, Change(config={"tile": {"tile_cells": content}}), {SETTINGS: content})

    @rule(writer=WRITERS, name=SLICE_IDS)
    def remove_a_slice(self, writer, name):
        handle = self.handles[writer]
        if name not in handle.state.slices:
            with pytest.raises(NotFoundError):
                remove(handle, name)
        elif self._overtaken(handle, {name}):
            with pytest.raises(ConflictError, match=name):
                remove(handle, name)
        else:
            self._note(writer, remove(handle, name), {name: None})

    @rule(writer=WRITERS, data=st.data())
    def roll_back(self, writer, data):
        handle = self.handles[writer]
        version = data.draw(st.integers(1, handle.version))
        if handle.version < len(self.versions):
            with pytest.raises(ConflictError):
                rollback(handle, version)
        elif version < self.oldest:
            with pytest.raises(NotFoundError, match=f"choose from {self.oldest}"):
                rollback(handle, version)
        else:
            now, then = self.versions[-1], self.versions[version - 1]
            says = {name: then.get(name) for name in {*now, *then} if now.get(name) != then.get(name)}
            back = rollback(handle, version)
            if says:
                self._note(writer, back, says)
            assert back.version == len(self.versions)

    @rule(writer=WRITERS)
    def reopen(self, writer):
        self.handles[writer] = open_catalog(self.root, mode="r+")

    @rule(writer=WRITERS, data=st.data())
    def open_an_old_version_to_write(self, writer, data):
        version = data.draw(st.integers(self.oldest, len(self.versions)))
        self.handles[writer] = open_catalog(self.root, version=version, mode="r+")

    # garbage, and its collection

    @rule(name=SLICE_IDS, content=CONTENTS)
    def make_what_is_committed_later(self, name, content):
        self.prepared.append(self._ingested(name, content))

    @precondition(lambda self: self.prepared)
    @rule(writer=WRITERS, data=st.data())
    def commit_what_was_made_before(self, writer, data):
        change, says = data.draw(st.sampled_from(self.prepared))
        if change.references() <= self.present:
            self._commit(writer, change, says)
        else:  # it was collected
            with pytest.raises(FormatError, match="not complete"):
                commit(self.handles[writer], change, message="")

    @rule(name=CONTENTS)
    def leave_half_an_object(self, name):
        publish_object(self.made, "graphs", f"half {name}", finished=False)

    @rule(keep=st.one_of(st.none(), st.integers(1, 4)), writer=WRITERS)
    def collect(self, keep, writer):
        said = gc(self.handles[writer], keep_versions=keep, grace_hours=0, dry_run=True)
        done = gc(self.handles[writer], keep_versions=keep, grace_hours=0)
        assert {**done.to_json(), "dry_run": True} == said.to_json()
        # versions that only gave up others do not count
        real = [number for number in range(1, len(self.versions) + 1) if self.touched[number - 1] is not None]
        wanted = self.oldest if keep is None else max(self.oldest, real[-keep] if keep <= len(real) else 1)
        assert done.versions == tuple(range(self.oldest, wanted))
        if wanted > self.oldest:
            self.versions.append(self.versions[-1])
            self.touched.append(None)
            self.oldest = wanted
        self.present = set()
        for number in range(self.oldest, len(self.versions) + 1):
            self.present |= open_catalog(self.root, version=number).state.references()
        assert {name.removesuffix(".zarr") for name in object_names(self.root)} == self.present
        assert list((self.root / "staging").glob("*")) == []

    @rule(keep=st.integers(1, 2))
    def collect_while_somebody_writes(self, keep):
        before = object_names(self.root)
        with writing(self.root, "somebody"), pytest.raises(ConflictError, match="somebody"):
            gc(self.handles["one"], keep_versions=keep, grace_hours=0)
        assert object_names(self.root) == before

    # readers

    @rule(data=st.data())
    def read_a_version(self, data):
        version = data.draw(st.integers(1, len(self.versions)))
        if version < self.oldest:
            with pytest.raises(NotFoundError, match=f"given up.*choose from {self.oldest}"):
                open_catalog(self.root, version=version)
        else:
            catalog = open_catalog(self.root, version=version)
            assert self._said(catalog) == self.versions[version - 1]
            assert verify(catalog) == []

    @rule(data=st.data())
    def carry_a_version_away(self, data):
        version = data.draw(st.integers(self.oldest, len(self.versions)))
        catalog = open_catalog(self.root, version=version)
        with tempfile.TemporaryDirectory() as folder:
            exported = export_version(catalog, Path(folder) / "out")
            assert exported.state == replace(catalog.state, oldest=1)
            assert self._said(exported) == self.versions[version - 1]
            taken = import_version(tiny_catalog(Path(folder) / "other"), exported.root)
            assert taken.state.slices == catalog.state.slices

    @invariant()
    def the_head_is_the_last_dictionary(self):
        head = open_catalog(self.root)
        assert self._said(head) == self.versions[-1]
        assert head.state.oldest == self.oldest
        assert set(head.state.objects) == head.state.references() <= self.present
        assert list_versions(self.root) == list(range(1, len(self.versions) + 1))
        assert len({record.owner for record in history(head)}) == len(self.versions)
        assert not any((self.root / "writers").iterdir())

    # the model

    def _publish(self, kind, content):
        key = publish_object(self.made, kind, content)
        self.present.add(f"{kind}/{key}")
        return key

    def _ingested(self, name, content):
        record = slice_record(self.made, name, content=content, panel=content)
        self.present |= record.references()
        return Change(slices={name: record}), {name: (content, None)}

    def _encoded(self, handle, names, models):
        """The change that encodes slices with the model that there is or will be, and what it says."""
        key = models.get(MODEL) or handle.state.models.get(MODEL, "none")
        slices, says = {}, {}
        for name in names:
            record = handle.state.slices[name]
            output = self._publish("embeddings", f"{name} {record.panel} {key}")
            slices[name] = slice_record(self.made, name, content=record.panel, panel=record.panel)
            objects = {**slices[name].objects, "integrate": output}
            slices[name] = type(record)(**{**slices[name].to_json(), "objects": objects})
            self.present |= slices[name].references()
            says[name] = (record.panel, output)
        return Change(slices=slices, models=models), says

    def _overtaken(self, handle, names):
        return any(names & (touched or set()) for touched in self.touched[handle.version :])

    def _commit(self, writer, change, says):
        handle = self.handles[writer]
        if self._overtaken(handle, set(says)):
            with pytest.raises(ConflictError):
                commit(handle, change, message="")
        else:
            self._note(writer, commit(handle, change, message=""), says)

    def _note(self, writer, committed, says):
        after = {**self.versions[-1], **says}
        self.versions.append({name: value for name, value in after.items() if value is not None})
        self.touched.append(set(says))
        self.handles[writer] = committed
        assert committed.version == len(self.versions)
        assert committed == open_catalog(self.root, mode="r+")

    def _said(self, catalog):
        state = catalog.state
        said = {name: (record.panel, record.objects.get("integrate")) for name, record in state.slices.items()}
        said |= {role: self._content(catalog, "models", key) for role, key in state.models.items()}
        if state.reference is not None:
            said[REFERENCE] = self._content(catalog, "references", state.reference)
        return {**said, SETTINGS: str(state.config["tile"]["tile_cells"])}

    @staticmethod
    def _content(catalog, kind, key):
        return (catalog.path(kind, key) / "part" / "0").read_text()[0]


TestCatalogMachine = CatalogMachine.TestCase
TestCatalogMachine.settings = settings(deadline=None, max_examples=20, stateful_step_count=20)


class LongCatalogMachine(CatalogMachine):
    """The same for longer."""


@pytest.mark.slow
class TestLongCatalogMachine(LongCatalogMachine.TestCase):
    settings = settings(deadline=None, max_examples=100, stateful_step_count=50)
