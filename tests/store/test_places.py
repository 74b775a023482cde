"""Places: a key in a bucket behaves as a path does, and addresses are told from paths."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lloki_atlas.errors import InputError, StorageError
from lloki_atlas.store.durable import create_exclusive, files_below, remove_tree, write_durable, write_whole
from lloki_atlas.store.places import ObjectPlace, place

NAMES = st.text("abc.é -_#", min_size=1, max_size=4).filter(lambda name: name.strip(".") and name == name.strip())


@pytest.fixture(params=["folder", "bucket"])
def root(request, tmp_path):
    """An empty place of either kind."""
    return tmp_path if request.param == "folder" else place(f"{request.getfixturevalue('bucket')}/a/catalog")


def test_what_is_not_there_is_neither_file_nor_folder(root):
    missing = root / "missing"
    assert (missing.exists(), missing.is_file(), missing.is_dir()) == (False, False, False)
    for ask in (missing.read_bytes, missing.stat, missing.unlink):
        with pytest.raises(FileNotFoundError):
            ask()
    missing.unlink(missing_ok=True)


@pytest.mark.parametrize("write", [write_durable, write_whole])
def test_a_file_is_read_as_it_was_written_last(root, write):
    file = root / "folder" / "file.json"
    for content in (b"first", b"", b"second"):
        write(file, content)
        assert file.read_bytes() == content
    assert (file.is_file(), file.is_dir(), file.exists()) == (True, False, True)
    assert (file.parent.is_dir(), file.parent.is_file()) == (True, False)
    assert file.stat().st_size == 6
    assert abs(file.stat().st_mtime - time.time()) < 100


def test_a_file_is_created_once(root):
    assert create_exclusive(root / "x", b"mine") is True
    assert create_exclusive(root / "x", b"theirs") is False
    assert (root / "x").read_bytes() == b"mine"


def test_a_folder_lists_what_is_right_below_it(root):
    for name in ("b/c/d", "b/e", "a", "bb"):
        write_durable(root / name if "/" not in name else root / Path(name).parts[0] / name.partition("/")[2], b"1")
    assert sorted(entry.name for entry in root.iterdir()) == ["a", "b", "bb"]
    assert sorted(entry.name for entry in (root / "b").iterdir()) == ["c", "e"]
    assert sorted(files_below(root)) == ["a", "b/c/d", "b/e", "bb"]
    assert sorted(files_below(root / "b")) == ["c/d", "e"]


def test_removing_a_folder_leaves_those_whose_names_begin_alike(root):
    for name in ("b", "bb", "b.tmp"):
        write_durable(root / name / "file", b"1")
    remove_tree(root / "b")
    remove_tree(root / "b")
    assert sorted(entry.name for entry in root.iterdir()) == ["b.tmp", "bb"]


@given(st.lists(NAMES, min_size=1, max_size=3))
def test_a_key_is_taken_apart_as_a_path_is(names):
    key, path = ObjectPlace("s3://bucket"), Path("root")
    for name in names:
        key, path = key / name, path / name
        assert (key.name, str(key.parent / key.name)) == (path.name, str(key))
    assert str(key) == f"s3://bucket/{'/'.join(names)}"
    assert place(str(key)) == key


@given(st.text("abs3:/.", min_size=1, max_size=12).filter(lambda text: "://" not in text and ":/" not in text))
def test_anything_else_is_a_path(text):
    assert place(text) == Path(text)


def test_a_place_is_taken_as_it_is():
    key = ObjectPlace("s3://bucket", "atlas")
    assert place(key) is key
    assert place(Path("a/b")) == Path("a/b")
    assert place("s3://bucket/atlas/") == key
    assert place("s3://bucket//atlas") == key


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ftp://host/atlas", "use a folder, or one of s3://, gs://, az://"),
        ("s3://bucket/../other", "climbs"),
        ("s3://bucket/a/./b", "climbs"),
        (Path("s3://bucket/atlas"), "went through a path"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(address, message):
    with pytest.raises(InputError, match=message):
        place(address)


def test_names_that_object_storage_treats_apart_come_back(bucket):
    for name in ("a b", "ä", "100%", "a+b", "a=b,c", "~x", "c/0/0", "a#b"):
        (place(f"{bucket}/n") / name).write_bytes(name.encode())
    assert sorted(place(f"{bucket}/n").files()) == sorted(["a b", "ä", "100%", "a+b", "a=b,c", "~x", "c/0/0", "a#b"])
    assert (place(f"{bucket}/n") / "100%").read_bytes() == b"100%"


def test_ranges_of_an_object_end_where_it_ends(bucket):
    file = place(f"{bucket}/x")
    file.write_bytes(b"0123456789")
    assert bytes(file.read_range(2, 3)) == b"234"
    assert len(file.read_range(8, 5)) < 5
    assert len(file.read_range(20, 5)) == 0
    with pytest.raises(FileNotFoundError):
        place(f"{bucket}/y").read_range(0, 1)


def test_more_objects_than_one_answer_holds_are_listed_and_removed(bucket):
    folder = place(f"{bucket}/many")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: (folder / f"{number:04d}").write_bytes(b""), range(1100)))
    assert len(list(folder.files())) == 1100
    folder.remove_below()
    assert not folder.exists()


def test_credentials_that_are_refused_are_no_missing_files(bucket):
    bucket.faults({"kind": "fail", "match": "forbidden", "times": 100})
    with pytest.raises(StorageError, match="run again"):
        place(f"{bucket}/forbidden").read_bytes()
