"""Blocks of values on disk: one file each, gone when the step ends; reading and writing is tested with the kernels."""

from __future__ import annotations

import numpy as np
import pytest

from lloki_atlas.errors import FormatError
from lloki_atlas.store.scratch import ScratchBlocks, scratch_folder


def test_each_block_is_one_file_of_its_size(tmp_path):
    ScratchBlocks(tmp_path / "blocks", 5, 3, 16, "float16")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "blocks").iterdir()}
    assert sizes == {f"block-{block}.bin": 5 * 16 * 2 for block in range(3)}


def test_no_more_than_one_block_is_held(tmp_path):
    store = ScratchBlocks(tmp_path, 5, 3, 16, "float32")
    assert store.read(0) is store.read(2)


def test_a_file_that_is_cut_short_is_reported_with_its_name(tmp_path):
    store = ScratchBlocks(tmp_path, 5, 1, 16, "float32")
    (tmp_path / "block-0.bin").write_bytes(b"12")
    with pytest.raises(FormatError, match=r"block-0\.bin is cut short"):
        store.read(0)


def test_a_folder_is_gone_at_the_end(tmp_path):
    with scratch_folder(tmp_path / "slice") as folder:
        ScratchBlocks(folder, 5, 2, 16, "float32").write_rows(0, 0, np.ones((5, 16), np.float32))
        assert folder.parent == tmp_path
        assert len(list(folder.iterdir())) == 2
    assert not list(tmp_path.iterdir())


def test_a_folder_is_gone_after_an_error(tmp_path):
    def fail():
        with scratch_folder(tmp_path / "slice") as folder:
            folder.mkdir()
            raise ZeroDivisionError("a defect")

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_never_filled_is_no_error(tmp_path):
    with scratch_folder(tmp_path / "slice") as folder:
        assert not folder.exists()


def test_two_steps_at_once_have_folders_of_their_own(tmp_path):
    with scratch_folder(tmp_path / "slice") as one, scratch_folder(tmp_path / "slice") as other:
        assert one != other
