"""Objects: published once and whole, and every later change of a byte is found."""

from __future__ import annotations

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.folders import folder_digest

from lloki_atlas.errors import FormatError, NotFoundError
from lloki_atlas.store import publishing
from lloki_atlas.store.objects import check_object, file_digests, is_complete, read_receipt, require_whole
from lloki_atlas.store.publishing import publish


def _staged(folder, text="text"):
    (folder / "c").mkdir(parents=True)
    (folder / "zarr.json").write_text("{}")
    (folder / "c" / "0").write_text(text * 10)
    return folder


@pytest.fixture
def published(tmp_path):
    final = tmp_path / "graphs" / "k.zarr"
    publish(_staged(tmp_path / "staging" / "one"), final, lineage={"stage": "propagate"})
    return final


def test_a_published_object_is_complete_and_its_staging_is_gone(tmp_path, published):
    assert is_complete(published)
    assert check_object(published) == []
    assert list((tmp_path / "staging").iterdir()) == []


def test_the_receipt_has_lineage_sizes_and_digests(published):
    receipt = read_receipt(published)
    assert receipt.lineage == {"stage": "propagate"}
    assert receipt.files == file_digests(published)
    assert receipt.files["c/0"][0] == 40
    assert len(receipt.digest) == 32


def test_equal_content_has_an_equal_receipt_digest(tmp_path, published):
    again = tmp_path / "elsewhere" / "k.zarr"
    publish(_staged(tmp_path / "s2"), again, lineage={"stage": "propagate"})
    assert read_receipt(again).digest == read_receipt(published).digest


@pytest.mark.parametrize("other", [{"text": "txet"}, {"lineage": {"stage": "embed"}}])
def test_other_content_has_another_receipt_digest(tmp_path, published, other):
    again = tmp_path / "elsewhere" / "k.zarr"
    staged = _staged(tmp_path / "s2", other.get("text", "text"))
    publish(staged, again, lineage=other.get("lineage", {"stage": "propagate"}))
    assert read_receipt(again).digest != read_receipt(published).digest


def test_publishing_again_keeps_the_first_object_and_drops_the_staging(tmp_path, published):
    before = folder_digest(published.parent)
    receipt = publish(_staged(tmp_path / "staging" / "two", "other"), published, lineage={"stage": "other"})
    assert folder_digest(published.parent) == before
    assert receipt == read_receipt(published)
    assert not (tmp_path / "staging" / "two").exists()


def test_a_crash_before_the_rename_leaves_nothing_visible_and_a_retry_succeeds(tmp_path, monkeypatch):
    staged, final = _staged(tmp_path / "s"), tmp_path / "graphs" / "k.zarr"

    def crash(*_args):
        raise OSError(errno.EIO, "crash")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", crash)
        with pytest.raises(OSError, match="crash"):
            publish(staged, final, lineage={})
    assert not final.exists()
    assert not is_complete(final)
    publish(staged, final, lineage={})
    assert check_object(final) == []


@pytest.mark.parametrize("stage_again", [False, True])
def test_a_crash_between_rename_and_receipt_is_mended_by_a_retry(tmp_path, monkeypatch, stage_again):
    staged, final = _staged(tmp_path / "s"), tmp_path / "graphs" / "k.zarr"

    def crash(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "create_exclusive", crash)
        with pytest.raises(OSError, match="No space"):
            publish(staged, final, lineage={})
    assert final.exists()
    assert not is_complete(final)
    if stage_again:
        _staged(staged)
    publish(staged, final, lineage={})
    assert is_complete(final)
    assert check_object(final) == []
    assert not staged.exists()


def test_publishing_nothing_is_refused(tmp_path):
    with pytest.raises(NotFoundError, match="nothing to publish"):
        publish(tmp_path / "none", tmp_path / "graphs" / "k.zarr", lineage={})


def test_leftovers_of_a_killed_writer_are_not_published(tmp_path):
    staged = _staged(tmp_path / "s")
    (staged / "c" / f"1.{'0f' * 16}.partial").write_text("half")
    publish(staged, tmp_path / "graphs" / "k.zarr", lineage={})
    assert sorted(file_digests(tmp_path / "graphs" / "k.zarr")) == ["c/0", "zarr.json"]


def test_a_symbolic_link_is_not_published(tmp_path):
    staged = _staged(tmp_path / "s")
    (staged / "link").symlink_to(staged / "zarr.json")
    with pytest.raises(FormatError, match="link"):
        publish(staged, tmp_path / "graphs" / "k.zarr", lineage={})


def test_eight_publishers_of_one_object_all_get_one_receipt(tmp_path):
    final = tmp_path / "graphs" / "k.zarr"
    staged = [_staged(tmp_path / "staging" / str(number)) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        receipts = list(pool.map(lambda folder: publish(folder, final, lineage={}), staged))
    assert len({receipt.digest for receipt in receipts}) == 1
    assert check_object(final) == []
    assert list((tmp_path / "staging").iterdir()) == []


def test_a_deleted_folder_published_with_other_bytes_gets_a_receipt_that_fits(tmp_path, published):
    shutil.rmtree(published)
    publish(_staged(tmp_path / "s", "other"), published, lineage={})
    assert check_object(published) == []


def _flip(path):
    data = bytearray((path / "c" / "0").read_bytes())
    data[7] ^= 1
    (path / "c" / "0").write_bytes(data)


DAMAGE = {
    "was altered": _flip,
    "has 39 bytes where 40 were written": lambda path: os.truncate(path / "c" / "0", 39),
    "c/0 is missing": lambda path: (path / "c" / "0").unlink(),
    "c/1 is not in its receipt": lambda path: (path / "c" / "1").write_text("x"),
    "whole folder is missing": shutil.rmtree,
    "has no receipt": lambda path: path.with_name("k.zarr.json").unlink(),
    "is garbled": lambda path: os.truncate(path.with_name("k.zarr.json"), 30),
}


@pytest.mark.parametrize("sentence", DAMAGE)
def test_damage_is_one_sentence_that_names_the_object(published, sentence):
    DAMAGE[sentence](published)
    (problem,) = check_object(published)
    assert sentence in problem
    assert problem.startswith("graphs/k.zarr: ")
    assert problem.endswith(".")


def test_a_receipt_of_a_newer_format_is_refused(published):
    receipt = published.with_name("k.zarr.json")
    receipt.write_text(receipt.read_text().replace('"format":1', '"format":2'))
    with pytest.raises(FormatError, match="update lloki-atlas"):
        read_receipt(published)


@settings(deadline=None, max_examples=25)
@given(position=st.integers(0, 39), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory, position, bit):
    folder = tmp_path_factory.mktemp("flip")
    publish(_staged(folder / "s"), folder / "k", lineage={})
    data = bytearray((folder / "k" / "c" / "0").read_bytes())
    data[position] ^= 1 << bit
    (folder / "k" / "c" / "0").write_bytes(data)
    assert len(check_object(folder / "k")) == 1


@pytest.mark.parametrize("damage", ["gone", "shorter", "another"])
def test_an_object_that_is_not_whole_is_refused(tmp_path, damage):
    final = tmp_path / "graphs" / "k.zarr"
    publish(_staged(tmp_path / "s"), final, lineage={})
    require_whole(final)
    file = next(path for path in sorted(final.rglob("*")) if path.is_file() and path.stat().st_size)
    if damage == "gone":
        file.unlink()
    elif damage == "shorter":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        (final / "stray").write_bytes(b"1")
    with pytest.raises(FormatError, match=r"file .* of graphs/k.zarr (is|has) .*: restore it from a copy"):
        require_whole(final)


def test_what_is_not_published_is_not_looked_at(tmp_path):
    require_whole(_staged(tmp_path / "s"))
    require_whole(tmp_path / "nothing")
