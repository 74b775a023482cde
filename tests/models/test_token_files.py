"""The token of a platform on disk: loaded together with the autoencoder beside it, refused without it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from lloki_atlas.config import AutoencoderConfig, digest
from lloki_atlas.errors import CheckpointError
from lloki_atlas.models.autoencoder import ConditionalAutoencoder
from lloki_atlas.models.autoencoder_files import (
    load_encoder,
    load_model,
    save_checkpoint,
    save_token,
    token_description,
    weight_files,
)
from lloki_atlas.models.encoder import FrozenEncoder
from lloki_atlas.models.platform_token import Token, with_token

PLATFORMS = ["MERFISH|a", "Xenium|b"]
NEW = "ISS|c"
ROWS = np.random.default_rng(0).normal(size=(300, 512)).astype(np.float32)
NUMBERS = np.random.default_rng(1).normal(size=(2, 10)).astype(np.float32)


def model(seed: int = 5) -> ConditionalAutoencoder:
    return ConditionalAutoencoder(PLATFORMS, random_state=seed)


def put(folder: Path, seed: int = 5) -> Path:
    """An autoencoder and a token of it, side by side; the folder of the token."""
    save_checkpoint(folder / "base", model(seed), config=AutoencoderConfig(), history=[], lineage={})
    save_token(
        folder / "token",
        Token(NEW, *NUMBERS),
        model=folder / "base",
        settings={"random_state": 3},
        history=[{"epoch": 1, "total": 0.5}],
        evidence={"paired": 0.75},
        lineage={"slices": {"one": "key"}},
    )
    return folder / "token"


@pytest.fixture
def token(tmp_path: Path) -> Path:
    return put(tmp_path)


def redescribe(folder: Path, **changes: object) -> None:
    path = folder / "token.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    data = safetensors.torch.save(weights)
    (folder / "token.safetensors").write_bytes(data)
    redescribe(folder, weights_digest=digest(data))


def test_what_is_loaded_is_the_autoencoder_with_the_token(token: Path):
    expected, found = with_token(model(), Token(NEW, *NUMBERS)), load_model(token)
    assert found.platforms == (*PLATFORMS, NEW)
    for name, value in expected.state_dict().items():
        assert found.state_dict()[name].numpy().tobytes() == value.numpy().tobytes()
    encoder = FrozenEncoder(expected)
    for platform in (*PLATFORMS, NEW):
        assert load_encoder(token).encode(ROWS, platform).tobytes() == encoder.encode(ROWS, platform).tobytes()


def test_the_autoencoder_alone_does_not_know_the_platform(token: Path):
    assert load_model(token.parent / "base").platforms == tuple(PLATFORMS)


def test_a_token_says_what_it_belongs_to_and_what_was_measured(token: Path):
    found = token_description(token)
    base = json.loads((token.parent / "base" / "autoencoder.json").read_text())
    assert (found["platform"], found["model"], found["model_digest"]) == (NEW, "base", base["weights_digest"])
    assert found["settings"] == {"random_state": 3}
    assert found["history"] == [{"epoch": 1, "total": 0.5}]
    assert found["evidence"] == {"paired": 0.75}
    assert found["lineage"] == {"slices": {"one": "key"}}


def test_equal_tokens_give_equal_bytes(tmp_path: Path):
    folders = [put(tmp_path / name) for name in "xy"]
    for name in ("token.json", "token.safetensors"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1


def test_a_token_is_small(token: Path):
    assert (token / "token.safetensors").stat().st_size < 500


def test_what_has_to_be_watched_are_both_files_of_weights(token: Path):
    base = token.parent / "base"
    assert weight_files(token) == [token / "token.safetensors", base / "weights.safetensors"]
    assert weight_files(base) == [base / "weights.safetensors"]
    assert weight_files(token.parent / "nothing") == [token.parent / "nothing" / "weights.safetensors"]


def test_the_token_of_another_autoencoder_is_refused(token: Path):
    save_checkpoint(token.parent / "base", model(6), config=AutoencoderConfig(), history=[], lineage={})
    with pytest.raises(CheckpointError, match=r"belongs to an autoencoder with digest .* has .*: restore the folder"):
        load_model(token)


def test_a_token_without_its_autoencoder_is_refused(token: Path):
    (token.parent / "base" / "autoencoder.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*base/autoencoder\.json"):
        load_model(token)


def test_numbers_that_are_not_those_that_were_saved_are_refused(token: Path):
    path = token / "token.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=r"has digest .* the weights are not those that were saved"):
        load_model(token)


def test_missing_numbers_are_refused(token: Path):
    (token / "token.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read the weights .*token\.safetensors"):
        load_encoder(token)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"encoder_token": torch.zeros(10)}, r"'decoder_token' .*: found nothing, expected float32 \(10,\)"),
        (
            {"encoder_token": torch.zeros(9), "decoder_token": torch.zeros(10)},
            r"'encoder_token' .*: found float32 \(9,\), expected float32 \(10,\)",
        ),
        (
            {"encoder_token": torch.zeros(10), "decoder_token": torch.zeros(10, dtype=torch.float64)},
            r"'decoder_token' .*: found float64 \(10,\), expected float32",
        ),
        (
            {"encoder_token": torch.zeros(10), "decoder_token": torch.zeros(10), "more": torch.zeros(1)},
            r"'more' .*: found float32 \(1,\), expected nothing",
        ),
    ],
    ids=["missing", "shape", "type", "unknown"],
)
def test_numbers_of_another_form_are_refused_by_name(token: Path, weights: dict[str, torch.Tensor], message: str):
    rewrite(token, weights)
    with pytest.raises(CheckpointError, match=message):
        load_model(token)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"platform": None}, "'platform' in .*: found NoneType, expected str"),
        ({"model": 5}, "'model' in .*: found int, expected str"),
        ({"lineage": []}, "'lineage' in .*: found list, expected dict"),
        ({"format": 99}, "has format 99, this version reads 1: update lloki-atlas"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(token: Path, changes: dict[str, object], message: str):
    redescribe(token, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_model(token)


def test_a_garbled_description_is_refused(token: Path):
    (token / "token.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*token\.json"):
        weight_files(token)
