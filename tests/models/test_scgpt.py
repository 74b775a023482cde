import dataclasses
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from support.checkpoints import NAMINGS, write_checkpoint

from lloki_atlas.errors import InputError, MemoryBudgetError
from lloki_atlas.models import scgpt
from lloki_atlas.models.scgpt import embed_cells, load_scgpt

GENES = tuple(f"GENE{i}" for i in range(70))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), genes=GENES)


@pytest.fixture(scope="module")
def model(folder):
    return load_scgpt(folder, device="cpu")


@pytest.fixture(scope="module")
def rows():
    """300 cells of 0 to 70 genes: padded lengths 32, 64 and 96, more than one batch of the shortest."""
    generator = np.random.default_rng(0)
    rate = generator.uniform(0, 3, size=(300, 1)) ** 2
    rows = generator.poisson(rate, size=(300, len(GENES))).astype(np.float32)
    rows[[5, 200]] = 0
    return rows


@pytest.fixture(scope="module")
def embedding(model, rows):
    return model.embed(rows, GENES)


# embedding


def test_rows_are_unit_float32_vectors_of_the_models_width(model, rows, embedding):
    present = rows.any(axis=1)
    assert (embedding.dtype, embedding.shape) == (np.float32, (300, 32))
    np.testing.assert_allclose(np.linalg.norm(embedding[present], axis=1), 1, atol=1e-6)


def test_an_empty_cell_is_nan_and_counted(model, rows):
    result = embed_cells(model, rows, GENES)
    empty = ~rows.any(axis=1)
    assert np.isnan(result.values[empty]).all()
    assert np.isfinite(result.values[~empty]).all()
    assert result.n_empty == empty.sum() >= 2


def test_a_cell_of_unknown_genes_alone_is_nan(model):
    result = embed_cells(model, np.array([[1, 0], [1, 1]], np.float32), ["UNKNOWN", "GENE3"])
    assert np.isnan(result.values).all(axis=1).tolist() == [True, False]
    assert (result.n_genes, result.n_empty) == (1, 1)


def test_unknown_genes_do_not_count(model):
    known = model.embed(np.array([[4, 2]], np.float32), ["GENE1", "GENE2"])
    mixed = model.embed(np.array([[4, 9, 2]], np.float32), ["GENE1", "UNKNOWN", "GENE2"])
    assert mixed.tobytes() == known.tobytes()


def test_cells_of_different_genes_or_values_differ(model):
    rows = np.array([[4, 2, 0], [2, 4, 0], [4, 0, 2]], np.float32)
    a, b, c = model.embed(rows, GENES[:3])
    assert min(np.abs(a - b).max(), np.abs(a - c).max(), np.abs(b - c).max()) > 1e-3


def test_no_cells_give_no_rows(model):
    assert model.embed(np.empty((0, len(GENES)), np.float32), GENES).shape == (0, 32)


def test_a_slice_without_any_known_gene_is_refused(model):
    with pytest.raises(InputError, match="none of the 2 genes"):
        model.embed(np.ones((1, 2), np.float32), ["UNKNOWN", ""])


@pytest.mark.parametrize("max_seq_len", [2, 33, 70])
def test_too_many_genes_are_cut_to_the_largest_values_and_counted(tmp_path, max_seq_len):
    model = load_scgpt(write_checkpoint(tmp_path, genes=GENES, args={"max_seq_len": max_seq_len}), device="cpu")
    rows = np.stack([np.arange(70, 0, -1), np.r_[1, np.zeros(69)]]).astype(np.float32)
    result = embed_cells(model, rows, GENES)
    assert (result.n_truncated, result.n_dropped) == (1, 71 - max_seq_len)
    assert np.isfinite(result.values).all()


# one result a cell


def test_permuted_cells_have_the_same_bytes(model, rows, embedding):
    order = np.random.default_rng(1).permutation(len(rows))
    assert model.embed(rows[order], GENES).tobytes() == embedding[order].tobytes()


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (17, 18), (0, 150), (131, 300)])
def test_a_part_of_the_cells_has_the_same_bytes(model, rows, embedding, start, stop):
    assert model.embed(rows[start:stop], GENES).tobytes() == embedding[start:stop].tobytes()


def test_one_cell_has_the_same_bytes_at_every_place_of_every_batch(model, rows):
    for row in rows[[np.argmin(np.where(rows.any(axis=1), rows.sum(axis=1), np.inf)), np.argmax(rows.sum(axis=1))]]:
        copies = model.embed(np.tile(row, (150, 1)), GENES)
        assert len({copy.tobytes() for copy in copies}) == 1


def test_csr_rows_have_the_same_bytes(model, rows, embedding):
    assert model.embed(csr_matrix(rows), GENES).tobytes() == embedding.tobytes()


def test_the_order_of_the_genes_changes_no_byte(model, rows, embedding):
    order = np.random.default_rng(2).permutation(len(GENES))
    assert model.embed(rows[:, order], [GENES[i] for i in order]).tobytes() == embedding.tobytes()


def test_equal_values_give_the_same_bytes_in_every_call(model):
    rows = np.full((2, len(GENES)), 3, np.float32)
    first, second = model.embed(rows, GENES), model.embed(rows, GENES)
    assert first.tobytes() == second.tobytes()
    assert first[0].tobytes() == first[1].tobytes()


def test_the_wide_model_has_the_same_bytes_at_every_place(tmp_path):
    folder = write_checkpoint(tmp_path, genes=GENES, embsize=512, nheads=8, d_hid=512)
    model = load_scgpt(folder, device="cpu")
    rows = np.random.default_rng(3).poisson(2.0, size=(20, len(GENES))).astype(np.float32)
    whole = model.embed(rows, GENES)
    for cell in (0, 7, 19):
        assert model.embed(rows[cell : cell + 1], GENES).tobytes() == whole[cell].tobytes()
    assert model.embed(rows[::-1], GENES).tobytes() == whole[::-1].tobytes()


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_the_callers_threads_change_no_byte_and_are_restored(model, rows, embedding, n_threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(n_threads)
        assert model.embed(rows[:40], GENES).tobytes() == embedding[:40].tobytes()
        assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)


def test_the_callers_settings_are_restored_after_an_error(model, rows, monkeypatch):
    def fail(*_):
        assert torch.get_num_threads() == 1
        assert torch.get_float32_matmul_precision() == "highest"
        raise RuntimeError("out of memory")

    monkeypatch.setattr(scgpt, "_encode", fail)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(2)
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(RuntimeError, match="out of memory"):
            model.embed(rows, GENES)
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (2, "medium")
        assert not torch.is_inference_mode_enabled()
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batches_of_any_size_and_order_have_the_same_bytes(model, rows, embedding, batch_size):
    order = np.random.default_rng(5).permutation(len(rows))
    parts = [model.embed(rows[order[start : start + batch_size]], GENES) for start in range(0, len(rows), batch_size)]
    assert np.concatenate(parts).tobytes() == embedding[order].tobytes()


@pytest.mark.parametrize("n_threads", [2, 5])
def test_threads_change_no_byte_and_no_setting(model, rows, embedding, n_threads):
    before = torch.get_float32_matmul_precision()
    assert model.embed(rows, GENES, n_threads=n_threads).tobytes() == embedding.tobytes()
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_follows_from_the_cell_alone_too(folder, rows, precision, monkeypatch):
    monkeypatch.setattr(scgpt, "_multiplies", lambda *_: True)
    half = load_scgpt(folder, device="cpu", precision=precision)
    assert half.dtype == getattr(torch, precision)
    whole, order = half.embed(rows[:60], GENES), np.random.default_rng(6).permutation(60)
    assert half.embed(rows[:60][order], GENES).tobytes() == whole[order].tobytes()
    assert half.embed(rows[17:18], GENES).tobytes() == whole[17:18].tobytes()


# a device without memory


def without_memory(monkeypatch, *, most_tokens):
    """A device that has room for so many tokens."""
    tried, encode = [], scgpt._encode

    def limited(model, batch):
        tried.append(batch.genes.numel())
        if tried[-1] > most_tokens:
            raise torch.OutOfMemoryError("out of memory")
        return encode(model, batch)

    monkeypatch.setattr(scgpt, "_encode", limited)
    return tried


def on_a_gpu(model, rows, batch_tokens):
    """The path of a GPU, on the CPU."""
    model = dataclasses.replace(model, batch_tokens=[batch_tokens])
    tokens = model.tokens(rows, GENES)
    values = torch.full((len(rows), model.settings.embsize), torch.nan)
    waiting = np.flatnonzero(np.diff(tokens.indptr))
    while len(waiting):
        waiting = scgpt._encode_until_full(values, model, tokens, waiting)
    return model, values.numpy()


def test_a_full_device_gets_half_as_much_and_the_log_says_so(model, rows, embedding, monkeypatch, caplog):
    tried = without_memory(monkeypatch, most_tokens=1000)
    with caplog.at_level(logging.WARNING, logger="lloki_atlas"):
        after, values = on_a_gpu(model, rows, 4096)
    np.testing.assert_allclose(values, embedding, atol=1e-5)
    full = [size for size in tried if size > 1000]
    assert full
    assert after.batch_tokens[0] == full[-1] // 2
    assert f"ran out of memory with {full[-1]} tokens a batch: going on with {full[-1] // 2}" in caplog.text
    assert len(full) == caplog.text.count("going on") < 4  # halved for good, and not tried again


def test_a_device_without_room_for_one_cell_is_an_error(model, rows, monkeypatch):
    without_memory(monkeypatch, most_tokens=10)
    with pytest.raises(MemoryBudgetError, match="no memory left for one cell"):
        on_a_gpu(model, rows, 4096)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "cosine"), [("float32", 0.999999), ("bfloat16", 0.9999), ("float16", 0.9999)])
def test_cuda_agrees_with_the_cpu(folder, rows, embedding, precision, cosine):
    model = load_scgpt(folder, precision=precision)
    assert model.device.type == "cuda"
    whole = model.embed(rows, GENES)
    present = rows.any(axis=1)
    assert (whole * embedding)[present].sum(axis=1).min() >= cosine
    assert np.isnan(whole[~present]).all()
    order = np.random.default_rng(4).permutation(len(rows))
    np.testing.assert_allclose(model.embed(rows[order], GENES), whole[order], atol=1e-5 if cosine > 0.9999 else 2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_the_device_stays_below_what_is_allowed(tmp_path):
    genes = tuple(f"GENE{i}" for i in range(1300))
    folder = write_checkpoint(tmp_path, genes=genes, embsize=512, nheads=8, d_hid=512, nlayers=12)
    rows = np.random.default_rng(0).gamma(1.0, size=(2000, 1300)).astype(np.float32)
    for precision in ("bfloat16", "float32"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        load_scgpt(folder, precision=precision, device_memory_mb=900).embed(rows, genes)
        assert torch.cuda.max_memory_allocated() <= 900 * 2**20


# loading


@pytest.mark.parametrize("naming", sorted(NAMINGS))
def test_every_naming_of_the_attention_weights_gives_the_same_bytes(tmp_path, rows, embedding, naming):
    model = load_scgpt(write_checkpoint(tmp_path, genes=GENES, naming=naming), device="cpu")
    assert model.embed(rows[:20], GENES).tobytes() == embedding[:20].tobytes()


def test_heads_are_not_needed(tmp_path, rows, embedding):
    def drop_heads(state):
        for name in [n for n in state if n.startswith(("decoder.", "cls_decoder.", "mvc_decoder.", "flag_encoder."))]:
            del state[name]

    model = load_scgpt(write_checkpoint(tmp_path, genes=GENES, edit=drop_heads), device="cpu")
    assert model.embed(rows[:20], GENES).tobytes() == embedding[:20].tobytes()


def test_settings_that_embed_data_does_not_read_have_its_values(tmp_path):
    folder = write_checkpoint(tmp_path, genes=GENES, args={"n_bins": None, "max_seq_len": None})
    settings = load_scgpt(folder, device="cpu").settings
    assert (settings.n_bins, settings.max_seq_len) == (51, 1200)


def test_half_precision_weights_are_read_as_float32(tmp_path):
    def halve(state):
        state.update({name: value.half() for name, value in state.items()})

    model = load_scgpt(write_checkpoint(tmp_path, genes=GENES, edit=halve), device="cpu")
    assert model.embed(np.ones((1, 70), np.float32), GENES).dtype == np.float32


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_by_name(folder, device):
    with pytest.raises(InputError, match=device):
        load_scgpt(folder, device=device)


def test_the_scgpt_package_is_not_imported():
    code = "import sys, lloki_atlas.models.scgpt; sys.exit('scgpt' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
