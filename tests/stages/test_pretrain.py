"""Pretraining on a reference: the folder it leaves, what it takes of slices, and how it ends and goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from anndata import AnnData, read_h5ad
from scipy.sparse import csr_matrix
from support.folders import folder_digest
from support.scgpt_oracle import embed_with_package

from lloki_atlas.errors import CheckpointError, InputError
from lloki_atlas.models.pretraining_steps import LOSSES
from lloki_atlas.models.scgpt import load_scgpt
from lloki_atlas.stages.create import reference_key
from lloki_atlas.stages.pretrain import pretrain
from lloki_atlas.stages.pretrain_cells import known_panels, training_cells
from lloki_atlas.stages.pretrain_report import loss_curve

SETTINGS = {
    "n_layers": 1,
    "width": 16,
    "n_heads": 2,
    "n_epochs": 2,
    "batch_cells": 64,
    "n_threads": 1,
    "progress": False,
}
FILES = {"args.json", "vocab.json", "best_model.pt", "training.json", "loss.svg"}


@pytest.fixture(scope="module")
def panel(sources):
    return sources / "simfish_1.h5ad"


@pytest.fixture(scope="module")
def finished(profile, panel, tmp_path_factory):
    """Folder and report of a finished training."""
    folder = tmp_path_factory.mktemp("finished") / "model"
    return folder, pretrain(profile, folder, panels=[panel], **SETTINGS)


def copy(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "model")


def test_the_folder_is_a_checkpoint_with_every_gene_of_the_reference(finished, profile):
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} == FILES
    model = load_scgpt(folder, device="cpu")
    assert set(profile.symbols) < set(model.vocabulary.tokens)
    rows = model.embed(profile.counts[:20], profile.symbols)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert len(np.unique(rows.round(4), axis=0)) == 20


def test_the_package_embeds_mixed_cells_alike(finished, profile):
    folder, _ = finished
    mixing = np.random.default_rng(0).dirichlet(np.ones(20), size=12).astype(np.float32)
    rows = mixing @ profile.counts[:20].toarray()
    for row in rows:  # the package draws the bins of equal values at random
        values, counts = np.unique(row, return_counts=True)
        row[np.isin(row, values[counts > 1])] = 0
    assert (np.count_nonzero(rows, axis=1) > 20).all()
    ours = load_scgpt(folder, device="cpu").embed(rows, profile.symbols)
    theirs = embed_with_package(folder, rows, profile.symbols)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_the_report_says_settings_lineage_and_losses(finished, profile):
    folder, report = finished
    assert json.loads((folder / "training.json").read_text()) == report
    assert report["lineage"]["reference"] == reference_key(profile)
    assert report["settings"]["width"] == 16
    assert [losses["epoch"] for losses in report["history"]] == [1, 2]
    assert all(np.isfinite(losses[name]) for losses in report["history"] for name in LOSSES)
    (known,) = report["lineage"]["panels"]
    assert set(known["symbols"]) < set(profile.symbols)


def test_a_finished_folder_is_left_as_it_is(finished, profile, panel, tmp_path):
    folder = copy(finished, tmp_path)
    (folder / "unfinished.pt").write_bytes(b"left by a process that was killed after its last file")
    assert pretrain(profile, folder, panels=[panel], **SETTINGS) == finished[1]
    assert folder_digest(folder) == folder_digest(finished[0])


@pytest.mark.parametrize("changed", [{"width": 8}, {"random_state": 1}, {"n_epochs": 3}, {"panels": []}])
def test_a_finished_folder_of_other_settings_is_refused(finished, profile, panel, tmp_path, changed):
    folder = copy(finished, tmp_path)
    with pytest.raises(CheckpointError, match="choose another folder"):
        pretrain(profile, folder, **{"panels": [panel], **SETTINGS, **changed})
    assert folder_digest(folder) == folder_digest(finished[0])


def test_a_foreign_checkpoint_is_refused(finished, profile, tmp_path):
    folder = copy(finished, tmp_path)
    (folder / "training.json").unlink()
    before = folder_digest(folder)
    with pytest.raises(CheckpointError, match="made otherwise"):
        pretrain(profile, folder, **SETTINGS)
    assert folder_digest(folder) == before


def test_a_killed_training_goes_on_to_the_same_bytes(sources, profile, panel, tmp_path):
    settings = {**SETTINGS, "n_epochs": 8, "device": "cpu"}
    program = (
        "import sys; from lloki_atlas import pretrain; "
        f"pretrain(sys.argv[1], sys.argv[2], organism='mouse', panels=[sys.argv[3]], **{settings!r})"
    )
    killed, state = tmp_path / "killed", tmp_path / "killed" / "unfinished.pt"
    command = [sys.executable, "-c", program, str(sources / "reference.h5ad"), str(killed), str(panel)]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 100
        while not state.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert state.exists()
    assert not (killed / "best_model.pt").exists()
    for folder in (killed, tmp_path / "whole"):
        pretrain(sources / "reference.h5ad", folder, organism="mouse", panels=[panel], **settings)
    for name in FILES:
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not state.exists()


def test_the_time_allowed_ends_the_training_with_a_checkpoint(profile, tmp_path):
    report = pretrain(profile, tmp_path, minutes=0, **{**SETTINGS, "n_epochs": 50})
    assert report["n_epochs_done"] == 1
    load_scgpt(tmp_path, device="cpu")


def test_training_cells_even_out_common_and_rare_cells_and_know_their_neighbours(profile):
    cells = training_cells(profile, [], n_latent=12, random_state=0)
    n_cells = len(profile.totals)
    assert cells.latent.shape == (n_cells, 12)
    assert cells.gene_latent.shape == (len(profile.symbols), 12)
    assert (np.abs(cells.gene_latent) <= 1.01).all()
    assert (cells.neighbors != np.arange(n_cells)[:, None]).all()
    np.testing.assert_allclose([cells.cell_weights.sum(), cells.gene_weights.sum()], 1)
    labels = np.array(profile.labels)
    kinds, sizes = np.unique(labels, return_counts=True)
    drawn = [cells.cell_weights[labels == kind].sum() * n_cells / size for kind, size in zip(kinds, sizes, strict=True)]
    assert drawn[np.argmin(sizes)] > drawn[np.argmax(sizes)]
    assert np.mean(labels[cells.neighbors[:, :5]] == labels[:, None]) > 0.8


def test_gene_latents_are_correlations_with_the_factors(profile):
    cells = training_cells(profile, [], n_latent=3, random_state=0)
    logs = np.log1p(profile.counts.toarray() / profile.totals[:, None] * profile.target_total)
    for gene in np.argsort(-logs.std(axis=0))[:5]:
        wanted = [np.corrcoef(logs[:, gene], profile.factors[:, i])[0, 1] for i in range(3)]
        np.testing.assert_allclose(cells.gene_latent[gene], wanted, atol=0.02)


def test_gains_of_a_panel_are_those_of_its_platform(profile):
    genes = list(profile.symbols[:20])
    gain = np.where(np.arange(20) < 10, 4.0, 1.0)
    mean = np.asarray(profile.counts[:, :20].mean(axis=0)).ravel()
    counts = csr_matrix(np.tile(np.round(1000 * mean * gain), (5, 1)).astype(np.float32))
    slice_ = AnnData(counts)
    slice_.var_names = genes
    (known,) = known_panels([slice_], profile, gene_map=None)
    seen = known.log_gain[mean > 0.01]
    np.testing.assert_allclose(
        seen - seen.mean(), np.log(gain[mean > 0.01]) - np.log(gain[mean > 0.01]).mean(), atol=0.1
    )
    assert known.depth == pytest.approx(counts[0].sum())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reference": "no-such.h5ad"}, "no-such.h5ad"),
        ({"organism": None}, "organism"),
        ({"organism": "yeast"}, "yeast"),
        ({"panels": ["no-such-slice.h5ad"]}, "no-such-slice.h5ad"),
        ({"colour": "blue"}, "no setting 'colour'"),
        ({"n_heads": 3}, "multiple of the heads"),
        ({"device": "no-such-device"}, "no-such-device"),
    ],
)
def test_what_cannot_be_used_is_refused_and_leaves_nothing(sources, tmp_path, given, message):
    arguments = {"reference": sources / "reference.h5ad", "organism": "mouse", **SETTINGS, **given}
    with pytest.raises(InputError, match=message):
        pretrain(arguments.pop("reference"), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_slice_of_other_genes_is_refused(profile, panel, tmp_path):
    strange = read_h5ad(panel)
    strange.var_names = [f"Unheard{i}" for i in range(strange.n_vars)]
    with pytest.raises(InputError, match="shares 0 genes"):
        pretrain(profile, tmp_path / "out", panels=[strange], **SETTINGS)


@pytest.mark.parametrize("n_epochs", [1, 5])
def test_the_curve_is_a_drawing_of_every_loss(n_epochs):
    history = [{"epoch": i + 1, **dict.fromkeys(LOSSES, 1.0 / (i + 1))} for i in range(n_epochs)]
    drawn = ET.fromstring(loss_curve(history))
    lines = [part for part in drawn if part.tag.endswith("polyline") and part.get("stroke-width")]
    assert len(lines) == len(LOSSES)
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        assert len(points) == n_epochs
        assert all(0 <= x <= 640 and 0 <= y <= 360 for x, y in points)
        assert [y for _, y in points] == sorted(y for _, y in points)
