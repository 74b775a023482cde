"""Versions that travel: whole or not at all, checked on the way, refused where they would not fit."""

from __future__ import annotations

import os
import shutil

import pytest
from support.folders import folder_digest
from support.housekeeping import grow_old, needed, object_names, quick_disk, tree
from support.stores import commit_slice, publish_object, slice_record, tiny_catalog

from lloki_atlas.errors import ConflictError, FormatError, InputError, NotFoundError
from lloki_atlas.store import portable
from lloki_atlas.store.catalog import commit, history, list_versions, open_catalog, verify
from lloki_atlas.store.portable import export_version, import_version
from lloki_atlas.store.records import Change
from lloki_atlas.store.retention import gc
from lloki_atlas.store.revert import remove
from lloki_atlas.store.verification import verify_deep

__all__ = ["quick_disk"]
pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture
def catalog(tmp_path):
    """Version 2 has a reference, a model and slice s1; 3 slice s2 too; 4 another s1."""
    catalog = tiny_catalog(tmp_path / "atlas")
    change = Change(
        reference=publish_object(catalog, "references", "r"),
        models={"embedder": publish_object(catalog, "models", "m")},
        slices={"s1": slice_record(catalog, "s1")},
    )
    catalog = commit_slice(commit(catalog, change, message="begin"), "s2")
    return commit_slice(catalog, "s1", content="second")


@pytest.fixture
def other(tmp_path):
    """A catalog without slices, reference or models."""
    return tiny_catalog(tmp_path / "other")


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_an_exported_version_is_a_catalog_of_its_own(catalog, tmp_path, version):
    before = folder_digest(catalog.root)
    source = open_catalog(catalog.root, version=version)
    exported = export_version(source, tmp_path / "out")
    assert exported.root == tmp_path / "out"
    assert exported.state == source.state
    assert list_versions(exported.root) == [1]
    assert object_names(exported.root) == needed(source)
    assert verify(exported) == []
    assert verify_deep(exported.root) == []
    assert history(exported)[0].message == f"export of version {version}"
    assert folder_digest(catalog.root) == before
    assert (exported.root / "catalog.json").read_bytes() != (catalog.root / "catalog.json").read_bytes()


def test_an_exported_folder_can_be_moved_and_grows_like_any_catalog(catalog, tmp_path):
    moved = shutil.move(export_version(catalog, tmp_path / "out").root, tmp_path / "elsewhere")
    grown = commit_slice(open_catalog(moved, mode="r+"), "s3")
    assert set(grown.state.slices) == {"s1", "s2", "s3"}
    assert remove(grown, "s1").version == 3


def test_copies_share_no_file_with_what_they_were_copied_from(catalog, tmp_path):
    exported = export_version(catalog, tmp_path / "out")
    for name in tree(exported.root):
        assert (exported.root / name).stat().st_nlink == 1, name


def test_nothing_is_overwritten(catalog, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("out", "atlas", "link"):
        with pytest.raises(InputError, match="nothing is overwritten"):
            export_version(catalog, tmp_path / name)
    with pytest.raises(InputError, match="there is no folder"):
        export_version(catalog, tmp_path / "missing" / "out")


@pytest.mark.parametrize("damage", ["flip", "missing file", "missing object", "receipt", "link", "folder link"])
def test_a_damaged_object_is_not_exported_and_nothing_is_left(catalog, tmp_path, damage):
    path = catalog.path("slices", catalog.slice("s2").objects["ingest"])
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "0").write_bytes((path / "part" / "0").read_bytes())
    if damage == "flip":
        (path / "part" / "0").write_bytes(b"x" + (path / "part" / "0").read_bytes()[1:])
    elif damage == "missing file":
        (path / "part" / "0").unlink()
    elif damage == "missing object":
        shutil.rmtree(path)
    elif damage == "receipt":
        receipt = path.with_name(f"{path.name}.json")
        receipt.write_text(receipt.read_text().replace("s2first", "s2forst"))
    elif damage == "link":
        (path / "part" / "0").unlink()
        (path / "part" / "0").symlink_to(tmp_path / "outside" / "0")
    else:
        shutil.rmtree(path / "part")
        (path / "part").symlink_to(tmp_path / "outside")
    before = sorted(entry.name for entry in tmp_path.iterdir())
    with pytest.raises(FormatError, match=path.stem):
        export_version(catalog, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == before


def test_an_export_that_dies_leaves_no_folder_of_that_name(catalog, tmp_path, monkeypatch):
    def die(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", die)
    with pytest.raises(OSError, match="No space"):
        export_version(catalog, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["atlas"]


def test_a_version_whose_objects_were_collected_is_not_exported(catalog, tmp_path):
    stale = open_catalog(catalog.root, version=2)
    grow_old(catalog.root)
    gc(catalog, keep_versions=1)
    with pytest.raises(FormatError, match="is missing"):
        export_version(stale, tmp_path / "out")


def test_slices_of_an_exported_folder_come_with_reference_and_models_in_one_version(catalog, other, tmp_path):
    exported = export_version(catalog, tmp_path / "out")
    shutil.rmtree(catalog.root)
    imported = import_version(other, exported.root)
    assert imported.version == 2
    assert imported.state.slices == exported.state.slices
    assert (imported.state.reference, imported.state.models) == (exported.state.reference, exported.state.models)
    assert imported.state.objects == exported.state.objects
    assert imported.state.config == other.state.config
    assert verify_deep(other.root) == []
    assert not any((other.root / "staging").iterdir())


def test_some_slices_of_a_version_come_alone(catalog, other):
    imported = import_version(other, str(catalog.root), slices=["s1"], version=2)
    assert imported.state.slices == open_catalog(catalog.root, version=2).state.slices
    assert object_names(other.root) == needed(imported)


def test_importing_again_does_nothing(catalog, other):
    imported = import_version(other, catalog.root)
    assert import_version(imported, catalog.root) == imported
    assert open_catalog(other.root).version == 2


def test_slices_that_are_here_already_are_left_out(catalog, other):
    imported = import_version(other, catalog.root, slices=["s2"])
    imported = import_version(imported, catalog.root)
    assert imported.version == 3
    assert set(history(imported)[-1].change.slices) == {"s1"}


def _conflict(catalog, other):
    key = {kind: publish_object(other, kind, "another") for kind in ("references", "models")}
    return {
        "slice 's1'": Change(slices={"s1": slice_record(other, "s1", content="third")}),
        "another reference": Change(reference=key["references"]),
        "model 'embedder'": Change(models={"embedder": key["models"]}),
    }


@pytest.mark.parametrize("what", ["slice 's1'", "another reference", "model 'embedder'"])
def test_what_would_not_fit_is_refused_and_nothing_is_copied(catalog, other, what):
    other = commit(other, _conflict(catalog, other)[what], message="")
    before = folder_digest(other.root)
    with pytest.raises(InputError, match=what):
        import_version(other, catalog.root)
    assert folder_digest(other.root) == before


def test_an_object_that_is_here_with_other_content_is_refused(catalog, other):
    key = catalog.slice("s2").objects["ingest"]
    path = other.path("slices", publish_object(other, "slices", "impostor"))
    for name in (path, path.with_name(f"{path.name}.json")):
        name.rename(name.with_name(name.name.replace(path.stem, key)))
    before = folder_digest(other.root)
    with pytest.raises(ConflictError, match=f"{key}.*with other content"):
        import_version(other, catalog.root)
    assert folder_digest(other.root) == before


def test_a_slice_that_another_writer_adds_meanwhile_is_a_conflict(catalog, other, monkeypatch):
    real = portable.copy_object

    def overtaken(*args):
        monkeypatch.undo()
        commit_slice(open_catalog(other.root, mode="r+"), "s1", content="third")
        real(*args)

    monkeypatch.setattr(portable, "copy_object", overtaken)
    with pytest.raises(ConflictError, match="slice 's1'"):
        import_version(other, catalog.root)
    assert set(open_catalog(other.root).state.slices) == {"s1"}
    assert verify_deep(other.root) == []


@pytest.mark.parametrize("number", range(6))
def test_an_import_that_dies_at_any_object_changes_no_version_and_is_finished_by_a_retry(
    catalog, other, monkeypatch, number
):
    real, calls = portable.copy_object, []

    def dying(*args):
        calls.append(args)
        if len(calls) > number:
            raise OSError(28, "No space left on device")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(portable, "copy_object", dying)
        with pytest.raises(OSError, match="No space"):
            import_version(other, catalog.root)
    assert open_catalog(other.root, mode="r+") == other
    assert verify_deep(other.root) == []
    assert import_version(other, catalog.root).state.objects == catalog.state.objects


def test_a_damaged_object_is_not_imported(catalog, other):
    path = catalog.path("slices", catalog.slice("s2").objects["ingest"])
    (path / "part" / "0").write_bytes(b"x" + (path / "part" / "0").read_bytes()[1:])
    with pytest.raises(FormatError, match=r"file part/0 is not what its receipt says"):
        import_version(other, catalog.root)
    assert open_catalog(other.root).version == 1
    assert verify_deep(other.root) == []


def test_unknown_slices_versions_and_catalogs_are_not_found(catalog, other, tmp_path):
    for options in ({"slices": ["s9"]}, {"version": 9}):
        with pytest.raises(NotFoundError, match="9"):
            import_version(other, catalog.root, **options)
    with pytest.raises(NotFoundError, match="no catalog"):
        import_version(other, tmp_path / "missing")


def test_a_reader_imports_nothing(catalog, other):
    with pytest.raises(InputError, match="mode='r\\+'"):
        import_version(open_catalog(other.root), catalog.root)
