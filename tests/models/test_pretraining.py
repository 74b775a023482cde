"""Training a small model of scGPT's architecture: same bytes, the loop's promises, and the checkpoint it writes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from support.scgpt_oracle import embed_with_package, import_scgpt

from lloki_atlas.errors import CheckpointError, InputError
from lloki_atlas.models.pretraining import export, train
from lloki_atlas.models.pretraining_batches import Augmentation, Panel, TrainingCells, batches
from lloki_atlas.models.pretraining_steps import PretrainingConfig
from lloki_atlas.models.scgpt import load_scgpt
from lloki_atlas.models.tokens import tokenize

N_GENES, N_KINDS = 40, 3
SYMBOLS = tuple(f"GENE{i}" for i in range(N_GENES))
CONFIG = PretrainingConfig(
    n_layers=1,
    width=16,
    n_heads=2,
    n_epochs=3,
    batch_cells=24,
    random_state=1,
    augmentation=Augmentation(panel_genes=(10, 40)),
)


def make_cells(n_cells=72, *, seed=0) -> TrainingCells:
    """Cells of three kinds, each with its own ten marker genes."""
    random = np.random.default_rng(seed)
    kind = np.arange(n_cells) % N_KINDS
    rates = np.full((N_KINDS, N_GENES), 0.3)
    for i in range(N_KINDS):
        rates[i, 10 * i : 10 * i + 10] = 6.0
    same = np.stack([np.flatnonzero(kind == kind[cell])[:20] for cell in range(n_cells)])
    return TrainingCells(
        counts=csr_matrix(random.poisson(rates[kind]).astype(np.float32)),
        latent=(np.eye(N_KINDS, 4)[kind] + random.normal(scale=0.05, size=(n_cells, 4))).astype(np.float32),
        gene_latent=random.normal(size=(N_GENES, 4)).astype(np.float32),
        neighbors=same,
        cell_weights=np.full(n_cells, 1 / n_cells),
        gene_weights=np.full(N_GENES, 1 / N_GENES),
        panels=(Panel(np.arange(0, N_GENES, 2), np.zeros(N_GENES // 2), 30.0),),
    )


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def trained(folder, cells=None, config=CONFIG, *, key="k", write=write, **settings):
    training = train(cells or make_cells(), config, key=key, state=folder / "state.pt", write=write, **settings)
    export(folder, training, SYMBOLS, config, write=write)
    return training


def content(folder):
    return {name: (folder / name).read_bytes() for name in ("args.json", "vocab.json", "best_model.pt")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed training and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return trained(folder, device="cpu"), folder


def test_equal_settings_give_equal_bytes_and_another_seed_others(whole, tmp_path):
    trained(tmp_path / "same", device="cpu")
    trained(tmp_path / "other", config=dataclasses.replace(CONFIG, random_state=2), device="cpu")
    assert content(tmp_path / "same") == content(whole[1])
    assert content(tmp_path / "other")["best_model.pt"] != content(whole[1])["best_model.pt"]


@pytest.mark.parametrize("n_before", [1, 2])
def test_goes_on_from_a_state_with_the_same_bytes(whole, tmp_path, n_before):
    class StopError(Exception):
        pass

    n_written = 0

    def stopping(path, data):
        nonlocal n_written
        write(path, data)
        n_written += 1
        if n_written == n_before:
            raise StopError

    with pytest.raises(StopError):
        trained(tmp_path, write=stopping, device="cpu")
    assert not (tmp_path / "best_model.pt").exists()
    training = trained(tmp_path, device="cpu")
    assert [losses["epoch"] for losses in training.history] == [1, 2, 3]
    assert content(tmp_path) == content(whole[1])


def test_the_random_state_and_the_threads_of_the_caller_are_left_alone(tmp_path):
    threads = torch.get_num_threads()
    torch.manual_seed(7)
    wanted = torch.rand(4)
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002 (the global one is what must not change)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    trained(tmp_path, config=dataclasses.replace(CONFIG, n_epochs=1), device="cpu", n_threads=threads + 1)
    assert torch.equal(torch.rand(4), wanted)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert torch.get_num_threads() == threads


def test_time_that_is_used_up_ends_after_a_whole_epoch(tmp_path):
    training = trained(tmp_path, device="cpu", max_seconds=0.0)
    assert len(training.history) == 1
    assert np.isfinite(load_scgpt(tmp_path, device="cpu").embed(np.ones((1, N_GENES)), SYMBOLS)).all()


def test_learns_to_tell_kinds_of_cells_apart(tmp_path):
    config = dataclasses.replace(CONFIG, n_epochs=30, average=0.9)
    cells = make_cells()
    training = trained(tmp_path, cells, config, device="cpu")
    first, last = training.history[0], training.history[-1]
    for name in ("total", "direction", "neighbors", "latent"):
        assert last[name] < 0.8 * first[name]
    unseen = make_cells(60, seed=9)
    rows = load_scgpt(tmp_path, device="cpu").embed(unseen.counts, SYMBOLS)
    cosines = rows @ rows.T - 2 * np.eye(len(rows))
    nearest = np.argsort(-cosines, axis=1)[:, :5]
    kind = np.arange(60) % N_KINDS
    assert (kind[nearest] == kind[:, None]).mean() > 0.9


def test_loads_strictly_in_the_scgpt_package_and_embeds_alike(whole, monkeypatch):
    scgpt = import_scgpt()
    _, folder = whole
    args = json.loads((folder / "args.json").read_text())
    vocabulary = json.loads((folder / "vocab.json").read_text())
    model = scgpt.model.TransformerModel(
        ntoken=len(vocabulary),
        d_model=args["embsize"],
        nhead=args["nheads"],
        d_hid=args["d_hid"],
        nlayers=args["nlayers"],
        nlayers_cls=args["n_layers_cls"],
        n_cls=args["n_cls"],
        vocab=vocabulary,
        dropout=args["dropout"],
        pad_token=args["pad_token"],
        pad_value=args["pad_value"],
    )
    model.load_state_dict(torch.load(folder / "best_model.pt"), strict=True)
    random = np.random.default_rng(0)
    rows = np.zeros((6, N_GENES), dtype=np.float32)
    for row, n_values in zip(rows, (2, 5, 11, 20, 33, 40), strict=True):
        row[random.permutation(N_GENES)[:n_values]] = random.permutation(n_values) + random.uniform(0.1, 0.9, n_values)
    ours, theirs = load_scgpt(folder, device="cpu").embed(rows, SYMBOLS), embed_with_package(folder, rows, SYMBOLS)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    monkeypatch.setattr("lloki_atlas.models.scgpt._multiplies", lambda *_: True)
    half = load_scgpt(folder, device="cpu", precision="bfloat16").embed(rows, SYMBOLS)
    assert (half * theirs).sum(axis=1).min() >= 0.9999


def test_the_heads_are_those_that_the_package_applies(whole):
    scgpt = import_scgpt()
    model = whole[0].average
    rows = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    bins = scgpt.model.model.ExprDecoder(16)
    bins.load_state_dict(model.decoder.state_dict())
    latent = scgpt.model.model.ClsDecoder(16, 4)
    latent.load_state_dict(model.cls_decoder.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model.predict_bins(rows), bins(rows)["pred"])
        torch.testing.assert_close(model.predict_latent(rows), latent(rows))


def test_the_module_computes_what_the_engine_embeds(whole):
    training, folder = whole
    counts = make_cells(9, seed=4).counts
    engine = load_scgpt(folder, device="cpu")
    view = tokenize(counts, np.arange(N_GENES), n_bins=51, max_genes=1199)
    (batch,) = batches(view, np.arange(9), pad=N_GENES, cls=N_GENES + 1, n_parts=1)
    for cls_only in (True, False):
        with torch.no_grad():
            rows = training.average(torch.from_numpy(batch.genes), torch.from_numpy(batch.digits), cls_only=cls_only)
        unit = torch.nn.functional.normalize(rows[:, 0], dim=1).numpy()
        np.testing.assert_allclose(unit, engine.embed(counts, SYMBOLS)[batch.rows], rtol=0, atol=1e-5)


def test_refuses_the_state_of_another_training_and_a_damaged_one(tmp_path):
    trained(tmp_path, device="cpu")
    with pytest.raises(CheckpointError, match="other settings or data"):
        trained(tmp_path, device="cpu", key="another")
    (tmp_path / "state.pt").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="damaged"):
        trained(tmp_path, device="cpu")


def test_refuses_settings_that_make_no_model(tmp_path):
    with pytest.raises(InputError, match="multiple of the heads"):
        PretrainingConfig(width=10, n_heads=4)
    with pytest.raises(InputError, match="at least 2"):
        PretrainingConfig(batch_cells=1)
    with pytest.raises(InputError, match="bfloat16"):
        PretrainingConfig(precision="float8")
    with pytest.raises(InputError, match="wider model"):
        trained(tmp_path, config=dataclasses.replace(CONFIG, width=2), device="cpu")
    with pytest.raises(InputError, match="no-such-device"):
        trained(tmp_path, device="no-such-device")


def test_a_training_that_diverges_says_so(tmp_path):
    with pytest.raises(InputError, match="lower the learning rate"):
        trained(tmp_path, config=dataclasses.replace(CONFIG, learning_rate=float("inf")), device="cpu")
    assert not (tmp_path / "best_model.pt").exists()
