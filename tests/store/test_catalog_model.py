"""The catalog against a list of dictionaries: any sequence of commits, stale ones included."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.stores import publish_object, slice_record, tiny_catalog

from lloki_atlas.errors import ConflictError, NotFoundError
from lloki_atlas.store.catalog import commit, list_versions, open_catalog, verify
from lloki_atlas.store.records import Change

SLICE_IDS = st.sampled_from(["s1", "s2", "s3"])
ROLES = st.sampled_from(["embedder", "autoencoder"])
CONTENTS = st.sampled_from(["a", "b", "c"])


class CatalogMachine(RuleBasedStateMachine):
    """`versions[n - 1]` is what version n has to say, role or slice id to content; `touched[n - 2]` what it changed."""

    @initialize()
    def make(self):
        self.folder = tempfile.TemporaryDirectory()
        self.catalog = tiny_catalog(Path(self.folder.name) / "atlas")
        self.versions, self.touched = [{}], []

    def teardown(self):
        assert verify(open_catalog(self.catalog.root)) == []
        self.folder.cleanup()

    def _change(self, name, content):
        if name.startswith("s"):
            record = content and slice_record(self.catalog, name, content=content, panel=content)
            return Change(slices={name: record})
        return Change(models={name: content and publish_object(self.catalog, "models", content)})

    def _expected(self, catalog):
        found = {name: record.panel for name, record in catalog.state.slices.items()}
        paths = {role: catalog.path("models", key) for role, key in catalog.state.models.items()}
        return found | {role: (path / "part" / "0").read_text()[0] for role, path in paths.items()}

    def _commit(self, name, content):
        self.catalog = commit(self.catalog, self._change(name, content), message="")
        self._note(name, content)

    def _note(self, name, content):
        after = {**self.versions[-1], name: content}
        self.versions.append({key: value for key, value in after.items() if value is not None})
        self.touched.append(name)

    @rule(name=SLICE_IDS, content=CONTENTS)
    def commit_or_replace_a_slice(self, name, content):
        self._commit(name, content)

    @rule(name=SLICE_IDS)
    def remove_a_slice(self, name):
        if name in self.versions[-1]:
            self._commit(name, None)
        else:
            with pytest.raises(NotFoundError):
                commit(self.catalog, Change(slices={name: None}), message="")

    @rule(role=ROLES, content=CONTENTS)
    def set_a_model(self, role, content):
        self._commit(role, content)

    @rule()
    def reopen(self):
        self.catalog = open_catalog(self.catalog.root, mode="r+")

    @rule(data=st.data())
    def read_an_old_version(self, data):
        version = data.draw(st.integers(1, len(self.versions)))
        assert self._expected(open_catalog(self.catalog.root, version=version)) == self.versions[version - 1]

    @rule(data=st.data(), name=st.one_of(SLICE_IDS, ROLES), content=CONTENTS)
    def commit_from_an_old_version(self, data, name, content):
        version = data.draw(st.integers(1, len(self.versions)))
        stale = open_catalog(self.catalog.root, version=version, mode="r+")
        change = self._change(name, content)
        if name in self.touched[version - 1 :]:
            with pytest.raises(ConflictError):
                commit(stale, change, message="")
        else:
            self.catalog = commit(stale, change, message="")
            self._note(name, content)

    @rule(first=SLICE_IDS, second=SLICE_IDS, content=CONTENTS)
    def two_writers_of_one_version(self, first, second, content):
        one, two = (open_catalog(self.catalog.root, mode="r+") for _ in range(2))
        self.catalog = one
        self._commit(first, content)
        if first == second:
            with pytest.raises(ConflictError):
                commit(two, self._change(second, content), message="")
        else:
            self.catalog = two
            self._commit(second, content)

    @invariant()
    def the_head_is_the_last_dictionary(self):
        head = open_catalog(self.catalog.root)
        assert self._expected(head) == self.versions[-1]
        assert self.catalog.state == head.state
        assert list_versions(head.root) == list(range(1, len(self.versions) + 1))
        assert set(head.state.objects) == head.state.references()


TestCatalogMachine = CatalogMachine.TestCase
TestCatalogMachine.settings = settings(deadline=None, max_examples=15, stateful_step_count=12)
