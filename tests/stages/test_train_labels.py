"""Labels as small integers, numbered over all slices."""

from __future__ import annotations

import numpy as np
import pytest
from support.stores import tiny_slice, write_slice

from lloki_atlas.errors import InputError
from lloki_atlas.stages import train_labels
from lloki_atlas.stages.train_labels import label_codes
from lloki_atlas.store.slices import SliceStore


def store(path, labels, column="cell_type"):
    data = tiny_slice(len(labels))
    data.obs["cell_type"] = labels
    return SliceStore(write_slice(path, data, label_columns=[column]))


def test_labels_are_numbered_in_alphabetical_order_over_slices_and_gaps_are_negative(tmp_path):
    one = store(tmp_path / "one", ["T", "nan", "B", "", "T"])
    other = store(tmp_path / "other", ["None", "Unassigned", "A", "unlabelled"])
    codes, n_labels = label_codes([one, other], "cell_type")
    np.testing.assert_array_equal(codes[0], [2, -1, 1, -1, 2])
    np.testing.assert_array_equal(codes[1], [-1, -1, 0, -1])
    assert n_labels == 3
    assert {part.dtype for part in codes} == {np.dtype(np.int16)}


def test_the_order_of_slices_changes_no_number(tmp_path):
    one, other = store(tmp_path / "one", ["T", "C"]), store(tmp_path / "other", ["A", "T"])
    forth, back = label_codes([one, other], "cell_type")[0], label_codes([other, one], "cell_type")[0]
    assert [part.tolist() for part in forth] == [part.tolist() for part in back[::-1]]


def test_no_labels_at_all_are_all_gaps(tmp_path):
    codes, n_labels = label_codes([store(tmp_path / "one", ["", "nan"])], "cell_type")
    np.testing.assert_array_equal(codes[0], [-1, -1])
    assert n_labels == 0


def test_a_slice_without_the_column_has_no_labels(tmp_path):
    with_column, without = store(tmp_path / "one", ["T", "B"]), store(tmp_path / "other", ["T", "B"], column="note")
    codes, n_labels = label_codes([without, with_column], "cell_type")
    np.testing.assert_array_equal(codes[0], [-1, -1])
    np.testing.assert_array_equal(codes[1], [1, 0])
    assert n_labels == 2


def test_labels_that_are_read_in_parts_are_the_same(tmp_path, monkeypatch):
    labels = [["T", "B", "", "C", "A"][row * 7 % 5] for row in range(23)]
    whole = label_codes([store(tmp_path / "one", labels)], "cell_type")[0][0]
    monkeypatch.setattr(train_labels, "PART_CELLS", 4)
    np.testing.assert_array_equal(label_codes([SliceStore(tmp_path / "one")], "cell_type")[0][0], whole)
    np.testing.assert_array_equal(whole, [{"A": 0, "B": 1, "C": 2, "T": 3}.get(name, -1) for name in labels])


def test_a_column_with_more_labels_than_cell_types_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train_labels, "MAX_LABELS", 3)
    with pytest.raises(InputError, match="'cell_type' has more than 3 different labels"):
        label_codes([store(tmp_path / "one", ["a", "b", "c", "d"])], "cell_type")
