"""`lloki-atlas pretrain`: what it prints, what it refuses, and that an atlas can be made with what it leaves."""

from __future__ import annotations

import pytest
from support.commands import run_main

from lloki_atlas.simulation import simulate

TINY = ["--organism", "mouse", "--layers", 1, "--width", 16, "--heads", 2, "--epochs", 2, "--threads", 1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Simulated slices and their reference."""
    return simulate(tmp_path_factory.mktemp("data"), n_cells=240, n_slices=4).parent


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Arguments of a training, and how it ended."""
    out = tmp_path_factory.mktemp("trained") / "model"
    arguments = ["pretrain", data / "reference.h5ad", out, *TINY, "--panels", data / "simfish_1.h5ad"]
    return arguments, run_main(*arguments, "--json", "--quiet")


def test_prints_one_document_and_nothing_else(trained):
    arguments, result = trained
    assert result.code == 0, result.err
    assert result.err == ""
    assert result.json["checkpoint"] == str(arguments[2])
    assert result.json["n_epochs_done"] == 2
    assert len(result.json["lineage"]["panels"]) == 1


def test_again_it_is_done_and_says_what_to_do_next(trained):
    arguments, _ = trained
    result = run_main(*arguments, "--quiet")
    assert result.code == 0
    assert f"--embedder scgpt:{arguments[2]}" in result.out


def test_an_atlas_is_made_with_it(trained, data, tmp_path):
    arguments, _ = trained
    created = run_main(
        "create", tmp_path / "atlas", "--reference", data / "reference.h5ad", "--organism", "mouse",
        "--embedder", f"scgpt:{arguments[2]}",
    )  # fmt: skip
    assert created.code == 0, created.err


def test_progress_goes_to_standard_error(data, tmp_path):
    result = run_main("pretrain", data / "reference.h5ad", tmp_path / "model", *TINY)
    assert result.code == 0
    assert "epochs" in result.err
    assert "cells/s" in result.err
    assert "cells/s" not in result.out


@pytest.mark.parametrize(
    ("changed", "word", "code"),
    [
        (["--width", 10, "--heads", 4], "multiple of the heads", 3),
        (["--panels", "nowhere.h5ad"], "nowhere.h5ad", 3),
        (["--organism", "yeast"], "yeast", 3),
        (["--device", "abacus"], "abacus", 3),
        (["--precision", "float8"], "bfloat16", 3),
        (["--epochs", 0], "--epochs", 2),
    ],
)
def test_what_cannot_be_used_is_one_line(data, tmp_path, changed, word, code):
    result = run_main("pretrain", data / "reference.h5ad", tmp_path / "out", *TINY, "--quiet", *changed)
    assert result.code == code
    assert word in result.err
    if code == 3:
        assert len(result.err.splitlines()) == 1
    assert result.out == ""
    assert not (tmp_path / "out").exists()


def test_a_folder_with_another_model_is_refused(trained):
    arguments, _ = trained
    result = run_main(*arguments, "--quiet", "--seed", 5)
    assert result.code == 3
    assert "choose another folder" in result.err
