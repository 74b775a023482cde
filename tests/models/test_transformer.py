import numpy as np
import pytest
import torch
from support.checkpoints import write_checkpoint
from torch.nn import functional

from lloki_atlas.models import transformer
from lloki_atlas.models.checkpoint import read_checkpoint
from lloki_atlas.models.transformer import Layer, encode_packed, encode_padded

HEADS, WIDTH = 4, 32
LENGTHS = (3, 17, 1, 9)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return read_checkpoint(write_checkpoint(tmp_path_factory.mktemp("c"), genes=["A"], nlayers=3)).weights


@pytest.fixture(scope="module")
def layers(weights):
    return tuple(Layer.of(*parts(weights, i)) for i in range(3))


def parts(weights, i):
    names = ("self_attn.in_proj_", "self_attn.out_proj.", "linear1.", "linear2.", "norm1.", "norm2.")
    prefix = f"transformer_encoder.layers.{i}."
    return [(weights[f"{prefix}{name}weight"], weights[f"{prefix}{name}bias"]) for name in names]


@pytest.fixture(scope="module")
def cells():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, WIDTH, generator=generator) for length in LENGTHS]


def plain(weights, x):
    """Every row of every layer, as the equations say, float64."""
    x = x.double()
    for i in range(3):
        qkv, out, linear1, linear2, norm1, norm2 = [[p.double() for p in pair] for pair in parts(weights, i)]
        joint = x @ qkv[0].T + qkv[1]
        heads = [part.unflatten(1, (HEADS, -1)).transpose(0, 1) for part in joint.split(WIDTH, dim=1)]
        scores = heads[0] @ heads[1].transpose(1, 2) / np.sqrt(WIDTH // HEADS)
        attended = (scores.softmax(2) @ heads[2]).transpose(0, 1).flatten(1)
        x = functional.layer_norm(x + attended @ out[0].T + out[1], (WIDTH,), *norm1)
        hidden = torch.relu(x @ linear1[0].T + linear1[1])
        x = functional.layer_norm(x + hidden @ linear2[0].T + linear2[1], (WIDTH,), *norm2)
    return x[0]


def test_a_cell_alone_is_what_the_equations_say(weights, layers, cells):
    for cell in cells:
        row = encode_padded(layers, cell[None], None, n_heads=HEADS)[0]
        torch.testing.assert_close(row.double(), plain(weights, cell), rtol=0, atol=2e-5)


def test_padding_changes_nothing_that_matters(layers, cells):
    longest = max(LENGTHS)
    x, keys = torch.full((len(cells), longest, WIDTH), 7.0), torch.zeros(len(cells), longest, dtype=torch.bool)
    for row, cell in enumerate(cells):
        x[row, : len(cell)], keys[row, : len(cell)] = cell, True
    together = encode_padded(layers, x, keys, n_heads=HEADS)
    alone = torch.cat([encode_padded(layers, cell[None], None, n_heads=HEADS) for cell in cells])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_one_layer_is_enough(weights, cells):
    layer = (Layer.of(*parts(weights, 0)),)
    assert encode_padded(layer, cells[1][None], None, n_heads=HEADS).shape == (1, WIDTH)


def cell_by_cell(q, k, v, q_offsets, k_offsets, q_longest, k_longest):
    """What the kernel for packed cells computes, (n_tokens, heads, head width)."""
    assert q_longest == int(q_offsets.diff().max())
    assert k_longest == int(k_offsets.diff().max())
    found = []
    for i in range(len(q_offsets) - 1):
        rows, keys = slice(*q_offsets[i : i + 2].tolist()), slice(*k_offsets[i : i + 2].tolist())
        turned = (part.transpose(0, 1) for part in (q[rows], k[keys], v[keys]))
        found.append(functional.scaled_dot_product_attention(*turned).transpose(0, 1))
    return torch.cat(found)


def pack(cells):
    offsets = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32)
    return torch.cat(cells), offsets, max(LENGTHS)


def test_packed_cells_are_padded_cells(layers, cells, monkeypatch):
    monkeypatch.setattr(transformer, "variable_length_attention", cell_by_cell)
    monkeypatch.setattr(transformer, "_product", lambda x, weight: x @ weight)
    monkeypatch.setattr(transformer, "_plus", lambda x, y, parameters: x + y @ parameters[0] + parameters[1])
    packed = encode_packed(layers, *pack(cells), n_heads=HEADS, dtype=torch.float32)
    alone = torch.cat([encode_padded(layers, cell[None], None, n_heads=HEADS) for cell in cells])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_for_packed_cells_agrees_with_a_loop_over_cells(dtype):
    generator = torch.Generator("cuda").manual_seed(2)
    q, k, v = torch.randn(3, sum(LENGTHS), HEADS, 64, generator=generator, device="cuda").to(dtype)
    offsets = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32, device="cuda")
    arguments = (q, k, v, offsets, offsets, max(LENGTHS), max(LENGTHS))
    torch.testing.assert_close(
        transformer.variable_length_attention(*arguments), cell_by_cell(*arguments), rtol=2e-2, atol=2e-2
    )


def test_weights_are_rounded_to_one_type_and_kept_in_another(layers):
    moved = layers[0].to(torch.device("cpu"), products=torch.float32, rounded=torch.bfloat16)
    assert moved.qkv[0].dtype == torch.float32
    assert torch.equal(moved.qkv[0], layers[0].qkv[0].bfloat16().float())
    assert not torch.equal(moved.qkv[0], layers[0].qkv[0])
    assert torch.equal(moved.norm1[0], layers[0].norm1[0])


@pytest.mark.parametrize("padded", [True, False])
def test_half_precision_is_close_and_adds_up_in_float32(layers, cells, monkeypatch, padded):
    monkeypatch.setattr(transformer, "variable_length_attention", cell_by_cell)
    half = [layer.to(torch.device("cpu"), products=torch.bfloat16, rounded=torch.bfloat16) for layer in layers[:-1]]
    half.append(layers[-1])
    if padded:
        rows = torch.cat([encode_padded(tuple(half), cell[None], None, n_heads=HEADS) for cell in cells])
    else:
        monkeypatch.setattr(transformer, "_product", lambda x, weight: x @ weight)
        monkeypatch.setattr(transformer, "_plus", lambda x, y, p: (y @ p[0] + p[1]).float() + x)
        rows = encode_packed(tuple(half), *pack(cells), n_heads=HEADS, dtype=torch.bfloat16)
    whole = torch.cat([encode_padded(layers, cell[None], None, n_heads=HEADS) for cell in cells])
    assert rows.dtype == torch.float32
    assert functional.cosine_similarity(rows, whole).min() > 0.9995
    assert not torch.equal(rows, whole)
