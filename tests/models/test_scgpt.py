import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from support.checkpoints import NAMINGS, write_checkpoint

from lloki_atlas.errors import InputError
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu_and_with_itself(folder, rows, embedding):
    model = load_scgpt(folder)
    assert model.gene_table.device.type == "cuda"
    whole = model.embed(rows, GENES)
    np.testing.assert_allclose(whole, embedding, atol=1e-5)
    order = np.random.default_rng(4).permutation(len(rows))
    assert model.embed(rows[order], GENES).tobytes() == whole[order].tobytes()
    assert model.embed(rows[17:18], GENES).tobytes() == whole[17:18].tobytes()


# loading


@pytest.mark.parametrize("naming", sorted(NAMINGS))
def test_every_naming_of_the_attention_weights_gives_the_same_bytes(tmp_path, rows, embedding, naming):
    model = load_scgpt(write_checkpoint(tmp_path, genes=GENES, naming=naming), device="cpu")
    assert model.embed(rows[:20], GENES).tobytes() == embedding[:20].tobytes()


def test_special_tokens_missing_from_the_vocabulary_are_appended(tmp_path, rows, embedding):
    model = load_scgpt(write_checkpoint(tmp_path, genes=GENES, special_in_vocabulary=False), device="cpu")
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
    code = "import sys, lloki_atlas.models.scgpt; sys.exit('scgpt' in sys.modules or 'numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
