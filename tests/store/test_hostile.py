"""Foreign catalogs: whatever their JSON and their links say, nothing outside of their root is read or written."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
from support.folders import folder_digest
from support.housekeeping import grow_old, quick_disk, rewrite_record
from support.stores import commit_slice, publish_object, tiny_catalog

from lloki_atlas.config import canonical_json, digest
from lloki_atlas.errors import FormatError, InputError, LlokiAtlasError
from lloki_atlas.store.arrays import ArraySpec, create_arrays, read_row_blocks, read_rows, write_rows
from lloki_atlas.store.catalog import NAMES, commit, create_store, open_catalog, verify
from lloki_atlas.store.objects import check_object, read_receipt
from lloki_atlas.store.portable import export_version, import_version
from lloki_atlas.store.records import Change
from lloki_atlas.store.retention import gc
from lloki_atlas.store.verification import verify_deep, verify_quick

__all__ = ["quick_disk"]
pytestmark = pytest.mark.usefixtures("quick_disk")

SECRET = "a secret"


@pytest.fixture
def outside(tmp_path):
    """A folder that is none of the catalog's business, beside it."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret.txt").write_text(SECRET)
    return folder


@pytest.fixture
def foreign(tmp_path, outside):
    """A catalog with a slice, from elsewhere."""
    return commit_slice(tiny_catalog(tmp_path / "foreign"), "s1")


@pytest.fixture
def own(tmp_path):
    """A catalog of one's own."""
    return tiny_catalog(tmp_path / "own")


def _uses(root, own, out):
    """Everything that is done with a foreign catalog."""
    return (
        lambda: open_catalog(root).state.references(),
        lambda: verify(open_catalog(root)),
        lambda: verify_quick(open_catalog(root)),
        lambda: verify_deep(root),
        lambda: export_version(open_catalog(root), out),
        lambda: import_version(own, root),
        lambda: gc(open_catalog(root, mode="r+"), grace_hours=0, dry_run=True),
    )


def _nothing_got_out(root, own, outside):
    """Use the catalog in every way; what was refused, and by which error."""
    before, out = folder_digest(outside), root.parent / "out"
    refusals = []
    for use in _uses(root, own, out):
        try:
            use()
        except LlokiAtlasError as error:
            refusals.append(error)
    assert folder_digest(outside) == before
    assert sorted(entry.name for entry in root.parent.iterdir() if entry != out) == ["foreign", "outside", "own"]
    for folder in (out, own.root):
        for file in folder.rglob("*") if folder.exists() else ():
            assert not file.is_symlink()
            assert file.is_dir() or SECRET.encode() not in file.read_bytes()
    return refusals


KEYS = ["../outside", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b", "~", 7, None, ["a"]]


@pytest.mark.parametrize("key", KEYS, ids=repr)
@pytest.mark.parametrize("where", ["slice", "model", "reference", "objects", "state"])
def test_a_key_that_leads_out_is_damage(foreign, own, outside, key, where):
    if (where == "reference" and key in (None, "")) or (where == "objects" and key in (None, 7)):
        return  # these say that there is none, or are a name like any other

    def edit(content):
        if where == "slice":
            content["change"]["slices"]["s1"]["objects"]["ingest"] = key
        elif where == "model":
            content["change"]["models"]["embedder"] = [] if key is None else key
        elif where == "reference":
            content["change"]["reference"] = key
        elif where == "objects":
            content["objects"][f"slices/{key}"] = "0" * 32
        else:
            content["state"] = {**STATE, "models": {"embedder": key}}

    rewrite_record(foreign.root / "versions" / "00000002.json", edit)
    refusals = _nothing_got_out(foreign.root, own, outside)
    assert refusals
    assert all(isinstance(error, FormatError) for error in refusals)
    with pytest.raises(FormatError, match=r"00000002\.json is damaged"):
        open_catalog(foreign.root)


STATE = {"config": {}, "models": {}, "objects": {}, "reference": None, "slices": {}}


@pytest.mark.parametrize("kind", ["..", "../outside", "versions", "staging", ""])
def test_a_kind_that_does_not_exist_is_damage(foreign, own, outside, kind):
    def edit(content):
        content["objects"] = {f"{kind}/secret": "0" * 32}

    rewrite_record(foreign.root / "versions" / "00000002.json", edit)
    assert _nothing_got_out(foreign.root, own, outside)
    with pytest.raises(FormatError, match="damaged"):
        open_catalog(foreign.root)


@pytest.mark.parametrize(
    "slice_id", ["../../outside/secret.txt", "/etc/passwd", "..", "a\0b", "\N{RIGHT-TO-LEFT OVERRIDE}"]
)
def test_the_name_of_a_slice_is_no_path(foreign, own, outside, slice_id):
    def edit(content):
        record = {**content["change"]["slices"].pop("s1"), "slice_id": slice_id}
        content["change"]["slices"][slice_id] = record

    rewrite_record(foreign.root / "versions" / "00000002.json", edit)
    assert _nothing_got_out(foreign.root, own, outside) == []
    assert set(open_catalog(own.root).state.slices) == {slice_id}
    assert verify_deep(own.root) == []


@pytest.mark.parametrize(
    "part",
    [{"n_cells": "11"}, {"n_cells": 1.5}, {"n_genes": True}, {"slice_id": 7}, {"technology": None}, {"panel": []},
     {"label_columns": [1]}, {"unknown": 1}],
    ids=repr,
)  # fmt: skip
def test_a_slice_of_other_types_is_damage(foreign, part):
    rewrite_record(
        foreign.root / "versions" / "00000002.json", lambda content: content["change"]["slices"]["s1"].update(part)
    )
    with pytest.raises(FormatError, match="damaged"):
        open_catalog(foreign.root)


FILES = [
    "../../../outside/secret.txt",
    "/etc/passwd",
    "..",
    ".",
    "",
    "part/../../x",
    "part//0",
    "a\\b",
    "a\0b",
    "part/",
]
ENTRIES = [[1], [1, 2], ["1", "x"], None, "x", {"bytes": 1}]


def _with_receipt(foreign, edit):
    """Change the receipt of the slice and commit its digest, as its author could have done."""
    path = foreign.path("slices", foreign.slice("s1").objects["ingest"])
    file = path.with_name(f"{path.name}.json")
    content = json.loads(file.read_bytes())
    edit(content)
    file.write_bytes(canonical_json(content))
    name = f"slices/{path.stem}"
    rewrite_record(
        foreign.root / "versions" / "00000002.json", lambda record: record["objects"].update({name: digest(content)})
    )
    return path


@pytest.mark.parametrize("name", FILES, ids=repr)
def test_a_receipt_that_names_a_file_outside_is_refused(foreign, own, outside, name):
    def edit(content):
        content["files"][name] = [len(SECRET), "0" * 64]

    path = _with_receipt(foreign, edit)
    assert _nothing_got_out(foreign.root, own, outside)
    with pytest.raises(FormatError, match="no file of slices"):
        read_receipt(path)
    (problem,) = check_object(path)
    assert path.name in problem
    assert [problem for problem in verify_deep(foreign.root) if path.name in problem]
    with pytest.raises(FormatError, match="no file of"):
        import_version(own, foreign.root)
    assert open_catalog(own.root).version == 1


@pytest.mark.parametrize("entry", ENTRIES, ids=repr)
def test_a_receipt_of_another_form_is_refused(foreign, own, outside, entry):
    path = _with_receipt(foreign, lambda content: content["files"].update({"zarr.json": entry}))
    assert _nothing_got_out(foreign.root, own, outside)
    with pytest.raises(FormatError, match="no file of slices"):
        read_receipt(path)


def test_a_receipt_of_another_object_is_refused(foreign, own):
    _with_receipt(foreign, lambda content: content.update(name="../../own"))
    with pytest.raises(FormatError, match="not the one that was committed"):
        import_version(own, foreign.root)


def _links(foreign, outside):
    path = foreign.path("slices", foreign.slice("s1").objects["ingest"])
    return {
        "object": (path, outside),
        "file": (path / "part" / "0", outside / "secret.txt"),
        "folder": (path / "part", outside),
        "new file": (path / "part" / "1", outside / "secret.txt"),
        "receipt": (path.with_name(f"{path.name}.json"), outside / "secret.txt"),
        "kind": (foreign.root / "slices", outside),
        "versions": (foreign.root / "versions", outside),
        "record": (foreign.root / "versions" / "00000002.json", outside / "secret.txt"),
        "identity": (foreign.root / "catalog.json", outside / "secret.txt"),
        "staging": (foreign.root / "staging", outside),
        "writers": (foreign.root / "writers", outside),
    }


@pytest.mark.parametrize(
    "what",
    ["object", "file", "folder", "new file", "receipt", "kind", "versions", "record", "identity", "staging", "writers"],
)
def test_a_link_is_named_and_not_followed(foreign, own, outside, what):
    link, target = _links(foreign, outside)[what]
    if link.is_dir():
        shutil.rmtree(link)
    else:
        link.unlink(missing_ok=True)
    link.symlink_to(target)
    refusals = _nothing_got_out(foreign.root, own, outside)
    assert refusals or what in ("new file", "staging", "writers")
    problems = verify_deep(foreign.root)
    assert problems
    assert SECRET not in "".join([*problems, *map(str, refusals)])
    if what in ("kind", "versions", "identity", "staging", "writers", "object"):
        with pytest.raises(FormatError, match="is a link"):
            open_catalog(foreign.root).path("slices", foreign.slice("s1").objects["ingest"])


@pytest.mark.parametrize("name", NAMES)
def test_no_catalog_is_made_among_links(tmp_path, outside, name):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / name).symlink_to(outside)
    with pytest.raises(FormatError, match="is a link"):
        create_store(tmp_path / "new", Change(), message="")
    assert [entry.name for entry in outside.iterdir()] == ["secret.txt"]


def test_the_root_itself_may_be_reached_by_a_link(foreign, tmp_path):
    (tmp_path / "link").symlink_to(foreign.root)
    assert open_catalog(tmp_path / "link").state == foreign.state
    assert verify_deep(tmp_path / "link") == []


def test_a_collection_removes_nothing_outside(foreign, outside):
    key = publish_object(foreign, "graphs", "garbage")
    path = foreign.path("graphs", key)
    receipt = path.with_name(f"{path.name}.json")
    content = json.loads(receipt.read_bytes())
    content["files"] = {"../../../outside/secret.txt": [1, "x"]}
    receipt.write_bytes(canonical_json(content))
    (path / "part" / "out").symlink_to(outside)
    grow_old(foreign.root)
    collected = gc(foreign)
    assert collected.objects == (f"graphs/{path.name}",)
    assert (outside / "secret.txt").read_text() == SECRET


def test_opening_and_checking_run_no_code(foreign, own, tmp_path, monkeypatch):
    """Neither pickle nor eval nor import: the usual ways of a file to become code are closed while it is read."""
    heard = []
    watched = ("pickle.find_class", "exec", "compile", "marshal.loads", "subprocess.Popen", "os.system", "import")

    def hear(event, arguments):
        if listening and event in watched:
            heard.append((event, arguments))

    listening = False
    sys.addaudithook(hear)
    uses = _uses(foreign.root, own, tmp_path / "out")
    for use in uses:
        use()  # whatever loads modules has done so
    shutil.rmtree(tmp_path / "out")
    fresh = tiny_catalog(tmp_path / "fresh")
    listening = True
    for use in _uses(foreign.root, fresh, tmp_path / "out"):
        use()
    listening = False
    assert [event for event, _ in heard] == []


def test_no_settings_of_a_foreign_catalog_are_trusted_as_paths(foreign, own, outside):
    foreign = commit(foreign, Change(config={"embedder": {"checkpoint": str(outside)}}), message="")
    imported = import_version(own, foreign.root)
    assert imported.state.config == own.state.config


@pytest.mark.parametrize("key", ["../x", "a/b", "..", ".hidden"])
def test_no_path_is_made_of_such_a_key(own, key):
    with pytest.raises(InputError, match="is not a key"):
        own.path("slices", key)


@pytest.mark.parametrize("part", ["X_fp", "X_fp/c", "X_fp/c/0", "X_fp/c/0/0"])
def test_rows_are_not_read_through_a_link(tmp_path, outside, part):
    for folder in (tmp_path / "object", outside / "object"):
        create_arrays(folder, {"X_fp": ArraySpec((4, 2), "float16", 2, ("cell", "k"))})
        write_rows(folder, "X_fp", 0, np.ones((4, 2), np.float16))
    assert read_rows(tmp_path / "object", "X_fp", 0, 4).all()
    link = tmp_path / "object" / part
    shutil.rmtree(link) if link.is_dir() else link.unlink()
    link.symlink_to(outside / "object" / part)
    for read in (lambda path: read_rows(path, "X_fp", 0, 4), lambda path: read_row_blocks(path, "X_fp", [(0, 1)])):
        with pytest.raises(FormatError, match="reached by a link"):
            read(tmp_path / "object")


def test_a_catalog_that_is_reached_by_a_link_is_read(tmp_path):
    create_arrays(tmp_path / "atlas" / "object", {"X_fp": ArraySpec((4, 2), "float16", 2, ("cell", "k"))})
    write_rows(tmp_path / "atlas" / "object", "X_fp", 0, np.ones((4, 2), np.float16))
    (tmp_path / "link").symlink_to(tmp_path / "atlas")
    assert read_rows(tmp_path / "link" / "object", "X_fp", 0, 4).all()
