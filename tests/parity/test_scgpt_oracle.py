"""scGPT's embedding against the published package and against a plain float64 form.

Tolerance: 1e-5, largest absolute difference of unit rows; float32 rounding stays below 1e-6, over twelve layers of the
published width too. In half precision: cosine of at least 0.9999 for every cell.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import NAMINGS, write_checkpoint
from support.scgpt_oracle import bin_with_package, embed_with_package
from support.tokens import bin_values

from lloki_atlas.models.scgpt import load_scgpt
from lloki_atlas.models.tokens import tokenize

TOLERANCE = 1e-5
GENES = tuple(f"GENE{i}" for i in range(130))


def distinct_rows(n_cells: int = 7, *, random_state: int = 0) -> np.ndarray:
    """Cells of 2 genes up to all of them, with distinct values: padded lengths 32 to 160."""
    generator = np.random.default_rng(random_state)
    rows = np.zeros((n_cells, len(GENES)), dtype=np.float32)
    for cell, n_values in enumerate(np.linspace(2, len(GENES), n_cells).astype(int)):
        columns = generator.permutation(len(GENES))[:n_values]
        rows[cell, columns] = generator.permutation(n_values) + generator.uniform(0.1, 0.9, n_values) + 1
    return rows[generator.permutation(n_cells)]


def textbook_embedding(folder: Path, rows: np.ndarray, genes: tuple[str, ...]) -> np.ndarray:
    """One cell at a time, no padding, no mask, every row of every layer, float64."""
    state = {k: v.numpy().astype(np.float64) for k, v in torch.load(folder / "best_model.pt").items()}
    args = json.loads((folder / "args.json").read_text())
    vocabulary = json.loads((folder / "vocab.json").read_text())

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ state[f"{name}weight"].T + state[f"{name}bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(axis=1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attention(x: np.ndarray, name: str) -> np.ndarray:
        joined = []
        for q, k, v in zip(
            *(np.split(part, args["nheads"], axis=1) for part in np.split(linear(x, f"{name}.in_proj_"), 3, axis=1)),
            strict=True,
        ):
            weights = np.exp(q @ k.T / np.sqrt(q.shape[1]))
            joined.append(weights / weights.sum(axis=1, keepdims=True) @ v)
        return linear(np.concatenate(joined, axis=1), f"{name}.out_proj.")

    embedding = []
    for row in rows:
        present = np.flatnonzero(row)
        edges = np.quantile(row[present], np.linspace(0, 1, args["n_bins"] - 1))
        values = np.array([args["pad_value"], *(np.sum(edges <= value) for value in row[present])], dtype=np.float64)
        tokens = [vocabulary["<cls>"], *(vocabulary[genes[column]] for column in present)]
        hidden = np.maximum(linear(values[:, None], "value_encoder.linear1."), 0)
        x = norm(state["encoder.embedding.weight"][tokens], "encoder.enc_norm")
        x = x + norm(linear(hidden, "value_encoder.linear2."), "value_encoder.norm")
        for i in range(args["nlayers"]):
            layer = f"transformer_encoder.layers.{i}"
            x = norm(x + attention(x, f"{layer}.self_attn"), f"{layer}.norm1")
            x = norm(x + linear(np.maximum(linear(x, f"{layer}.linear1."), 0), f"{layer}.linear2."), f"{layer}.norm2")
        embedding.append(x[0] / np.linalg.norm(x[0]))
    return np.array(embedding)


@pytest.mark.parametrize("naming", ["mha", "flash"])
def test_equals_the_package_for_either_naming_of_the_attention_weights(tmp_path, naming):
    folder = write_checkpoint(tmp_path, genes=GENES, naming=naming)
    rows = distinct_rows()
    ours = load_scgpt(folder, device="cpu").embed(rows, GENES)
    np.testing.assert_allclose(ours, embed_with_package(folder, rows, GENES), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_equals_the_package_whatever_its_batches_are_padded_to(tmp_path, batch_size):
    folder = write_checkpoint(tmp_path, genes=GENES)
    rows = distinct_rows(random_state=1)
    ours = load_scgpt(folder, device="cpu").embed(rows, GENES)
    theirs = embed_with_package(folder, rows, GENES, batch_size=batch_size)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_equals_the_package_where_it_drops_genes(tmp_path):
    folder = write_checkpoint(tmp_path, genes=GENES[:60])
    rows = distinct_rows(5, random_state=2)
    rows[:, 0] = np.linspace(200, 300, 5)  # a gene that stays
    ours = load_scgpt(folder, device="cpu").embed(rows, GENES)
    np.testing.assert_allclose(ours, embed_with_package(folder, rows, GENES), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("pad_value", [-2, 0])
def test_equals_the_package_for_the_pad_value_that_the_file_says(tmp_path, pad_value):
    folder = write_checkpoint(tmp_path, genes=GENES, args={"pad_value": pad_value})
    rows = distinct_rows(3, random_state=3)
    ours = load_scgpt(folder, device="cpu").embed(rows, GENES)
    np.testing.assert_allclose(ours, embed_with_package(folder, rows, GENES), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("n_values", [2, 3, 49, 50, 51, 99, 148, 400])
def test_bins_of_distinct_values_equal_the_package(n_values):
    values = np.random.default_rng(n_values).gamma(2.0, size=n_values).astype(np.float32)
    np.testing.assert_array_equal(bin_values(values, n_bins=51), bin_with_package(values))


def test_bins_of_equal_values_lie_where_the_package_may_draw_them():
    values = np.random.default_rng(0).poisson(1.5, size=80).astype(np.float32) + 1
    draws = np.stack([bin_with_package(values) for _ in range(200)])
    ours = bin_values(values, n_bins=51)
    for value in np.unique(values):
        drawn = draws[:, values == value]
        assert drawn.min() <= ours[values == value][0] <= drawn.max()


@pytest.mark.parametrize("naming", sorted(NAMINGS))
@pytest.mark.parametrize("nlayers", [1, 3])
def test_equals_the_textbook_form(tmp_path, naming, nlayers):
    plain = write_checkpoint(tmp_path / "plain", genes=GENES, nlayers=nlayers)
    folder = write_checkpoint(tmp_path / "named", genes=GENES, nlayers=nlayers, naming=naming)
    rows = distinct_rows(random_state=4)
    ours = load_scgpt(folder, device="cpu").embed(rows, GENES)
    np.testing.assert_allclose(ours, textbook_embedding(plain, rows, GENES), rtol=0, atol=TOLERANCE)


def test_honours_every_setting_of_the_file(tmp_path):
    settings = {"embsize": 24, "nheads": 3, "d_hid": 20, "args": {"n_bins": 11, "pad_value": -1.5}}
    folder = write_checkpoint(tmp_path, genes=GENES, **settings)
    rows = distinct_rows(random_state=5)
    ours = load_scgpt(folder, device="cpu").embed(rows, GENES)
    np.testing.assert_allclose(ours, textbook_embedding(folder, rows, GENES), rtol=0, atol=TOLERANCE)


def test_clips_bins_past_512_as_the_package_does(tmp_path):
    folder = write_checkpoint(tmp_path, genes=GENES, args={"n_bins": 901})
    model = load_scgpt(folder, device="cpu")
    assert torch.equal(model.value_table[512], model.value_table[900])
    assert not torch.equal(model.value_table[511], model.value_table[512])


@pytest.fixture(scope="module")
def published_size(tmp_path_factory):
    """Random weights in the shapes of the published model, cells of 240 to 360 genes, and the package's embedding."""
    genes = tuple(f"GENE{i}" for i in range(400))
    folder = write_checkpoint(
        tmp_path_factory.mktemp("published"), genes=genes, embsize=512, nheads=8, d_hid=512, nlayers=12
    )
    generator = np.random.default_rng(6)
    rows = np.zeros((6, 400), dtype=np.float32)
    for row, n_values in zip(rows, np.linspace(240, 360, 6).astype(int), strict=True):
        row[generator.permutation(400)[:n_values]] = generator.permutation(n_values) + generator.uniform(1, 1.9)
    return folder, genes, rows, embed_with_package(folder, rows, genes)


def test_equals_the_package_at_the_published_size(published_size):
    folder, genes, rows, theirs = published_size
    np.testing.assert_allclose(load_scgpt(folder, device="cpu").embed(rows, genes), theirs, rtol=0, atol=TOLERANCE)


# with the type's own products, and with float32 products of rounded weights, whatever this processor has
@pytest.mark.parametrize(("precision", "products"), [("bfloat16", True), ("bfloat16", False), ("float16", False)])
def test_half_precision_keeps_the_direction_of_every_cell(published_size, monkeypatch, precision, products):
    monkeypatch.setattr("lloki_atlas.models.scgpt._multiplies", lambda *_: products)
    folder, genes, rows, theirs = published_size
    ours = load_scgpt(folder, device="cpu", precision=precision).embed(rows, genes)
    assert ours.dtype == np.float32
    assert np.abs(ours - theirs).max() > TOLERANCE  # it is another arithmetic
    assert (ours * theirs).sum(axis=1).min() >= 0.9999


def test_the_random_rule_draws_bins_as_often_as_the_package():
    values = np.repeat(np.arange(1, 9, dtype=np.float32), 12)
    n_draws = 600
    theirs = np.stack([bin_with_package(values) for _ in range(n_draws)])
    drawn = [
        tokenize(values[None], np.arange(96), n_bins=51, max_genes=96, mode="reference", random_state=seed).digits
        for seed in range(n_draws)
    ]
    ours = np.stack(drawn)
    for value in np.unique(values):
        a, b = (bins[:, values == value].ravel().astype(int) for bins in (ours, theirs))
        assert (a.min(), a.max()) == (b.min(), b.max())
        counts = np.stack([np.bincount(bins, minlength=51) for bins in (a, b)])
        assert np.abs(counts[0] - counts[1]).max() < 5 * np.sqrt(2 * counts.mean(axis=0).max())
