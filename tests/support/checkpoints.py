"""Tiny scGPT checkpoints with random weights, in the layout of the official ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

SPECIAL = ("<pad>", "<cls>", "<eoc>")
# torch, flash attention, and flash attention as newer releases of scgpt save it
NAMINGS = {"mha": "in_proj_", "flash": "Wqkv.", "impl": "_impl.Wqkv."}

State = dict[str, torch.Tensor]


def write_checkpoint(
    folder: Path,
    *,
    genes: Sequence[str],
    naming: str = "mha",
    embsize: int = 32,
    nheads: int = 4,
    d_hid: int = 48,
    nlayers: int = 2,
    random_state: int = 0,
    args: dict[str, Any] | None = None,
    edit: Callable[[State], None] | None = None,
) -> Path:
    """Write the three files; `args` overrides settings (None removes one), `edit` changes the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "embsize": embsize,
        "nheads": nheads,
        "d_hid": d_hid,
        "nlayers": nlayers,
        "n_layers_cls": 3,
        "dropout": 0.2,
        "pad_token": "<pad>",
        "pad_value": -2,
        "mask_value": -1,
        "n_bins": 51,
        "max_seq_len": 1200,
        "input_style": "binned",
        "input_emb_style": "continuous",
        "fast_transformer": naming != "mha",
    }
    settings.update(args or {})
    (folder / "args.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    tokens = [*genes, *SPECIAL]
    (folder / "vocab.json").write_text(json.dumps({token: row for row, token in enumerate(tokens)}))
    state = random_state_dict(
        n_tokens=len(genes) + len(SPECIAL),
        embsize=embsize,
        d_hid=d_hid,
        nlayers=nlayers,
        naming=naming,
        random_state=random_state,
    )
    if edit is not None:
        edit(state)
    torch.save(state, folder / "best_model.pt")
    return folder


def random_state_dict(
    *, n_tokens: int, embsize: int, d_hid: int, nlayers: int, naming: str = "mha", random_state: int = 0
) -> State:
    """Every parameter of a published checkpoint, the heads that the embedding does not use included."""
    generator = torch.Generator().manual_seed(random_state)
    state: State = {}

    def draw(name: str, *shape: int, mean: float = 0.0, sd: float = 0.3) -> None:
        state[name] = mean + sd * torch.randn(*shape, generator=generator)

    def linear(name: str, n_in: int, n_out: int, joint: str = ".") -> None:
        draw(f"{name}{joint}weight", n_out, n_in, sd=1.2 * n_in**-0.5)
        draw(f"{name}{joint}bias", n_out, sd=0.1)

    def norm(name: str) -> None:
        draw(f"{name}.weight", embsize, mean=1.0)
        draw(f"{name}.bias", embsize)

    draw("encoder.embedding.weight", n_tokens, embsize)
    norm("encoder.enc_norm")
    linear("value_encoder.linear1", 1, embsize)
    linear("value_encoder.linear2", embsize, embsize)
    norm("value_encoder.norm")
    for layer in range(nlayers):
        name = f"transformer_encoder.layers.{layer}"
        linear(f"{name}.self_attn.{NAMINGS[naming]}"[:-1], embsize, 3 * embsize, NAMINGS[naming][-1])
        linear(f"{name}.self_attn.{'_impl.' if naming == 'impl' else ''}out_proj", embsize, embsize)
        linear(f"{name}.linear1", embsize, d_hid)
        linear(f"{name}.linear2", d_hid, embsize)
        norm(f"{name}.norm1")
        norm(f"{name}.norm2")
    draw("flag_encoder.weight", 2, embsize)
    for index, n_out in ((0, embsize), (2, embsize), (4, 1)):
        linear(f"decoder.fc.{index}", embsize, n_out)
    for index in (0, 3):
        linear(f"cls_decoder._decoder.{index}", embsize, embsize)
        norm(f"cls_decoder._decoder.{index + 2}")
    linear("cls_decoder.out_layer", embsize, 1)
    linear("mvc_decoder.gene2query", embsize, embsize)
    draw("mvc_decoder.W.weight", embsize, embsize)
    return state
