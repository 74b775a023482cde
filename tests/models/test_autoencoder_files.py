"""A trained autoencoder on disk: what is saved comes back, what does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from lloki_atlas.config import AutoencoderConfig, digest
from lloki_atlas.errors import CheckpointError, InputError
from lloki_atlas.models.autoencoder import ConditionalAutoencoder
from lloki_atlas.models.autoencoder_files import load_encoder, save_checkpoint
from lloki_atlas.models.encoder import FrozenEncoder
from lloki_atlas.models.training import train_autoencoder_on

PLATFORMS = ["MERFISH|a", "Xenium|b"]
CONFIG = AutoencoderConfig(n_epochs=3, chunk_cells=80, n_neighbors_mutual=10, n_neighbors_conservation=5)
LINEAGE = {"sample": "0123", "slices": ["one", "two"]}


def cells(n: int = 60, seed: int = 0) -> np.ndarray:
    """Unit vectors."""
    values = np.random.default_rng(seed).normal(size=(n, 512))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = ConditionalAutoencoder(PLATFORMS, random_state=5)
    save_checkpoint(tmp_path / "model", model, config=CONFIG, history=[{"epoch": 1, "total": 0.5}], lineage=LINEAGE)
    return tmp_path / "model"


def rewrite(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Other weights under a digest that fits them."""
    data = safetensors.torch.save(weights)
    (folder / "weights.safetensors").write_bytes(data)
    redescribe(folder, weights_digest=digest(data))


def redescribe(folder: Path, **changes: object) -> None:
    path = folder / "autoencoder.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load((folder / "weights.safetensors").read_bytes())


def test_a_saved_encoder_gives_the_same_bytes(checkpoint: Path):
    encoder = FrozenEncoder(ConditionalAutoencoder(PLATFORMS, random_state=5))
    rows = cells(30)
    for platform in PLATFORMS:
        assert load_encoder(checkpoint).encode(rows, platform).tobytes() == encoder.encode(rows, platform).tobytes()


def test_a_checkpoint_keeps_platforms_in_order(checkpoint: Path):
    assert load_encoder(checkpoint).platforms == tuple(PLATFORMS)


def test_the_description_holds_settings_history_shapes_and_lineage(checkpoint: Path):
    description = json.loads((checkpoint / "autoencoder.json").read_text())
    assert description["config"] == dataclasses.asdict(CONFIG)
    assert description["history"] == [{"epoch": 1, "total": 0.5}]
    assert description["shapes"]["encoder.0.weight"] == [256, 522]
    assert description["lineage"] == LINEAGE
    assert description["weights_digest"] == digest((checkpoint / "weights.safetensors").read_bytes())


def test_a_trained_model_is_saved_in_equal_bytes_twice(tmp_path: Path):
    for name in ("one", "two"):
        platform = np.arange(60) % 2
        model, history = train_autoencoder_on(cells(), platform, platform, PLATFORMS, config=CONFIG)
        save_checkpoint(tmp_path / name, model, config=CONFIG, history=history, lineage=LINEAGE)
    for file in ("weights.safetensors", "autoencoder.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_loading_leaves_the_global_random_state_alone(checkpoint: Path):
    before = torch.get_rng_state()
    load_encoder(checkpoint)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("key", ["encoder.0.weight", "encoder.2.bias", "decoder_tokens.weight"])
def test_a_missing_weight_is_named(checkpoint: Path, key: str):
    weights = weights_of(checkpoint)
    del weights[key]
    rewrite(checkpoint, weights)
    with pytest.raises(CheckpointError, match=rf"'{key}'.*found nothing, expected float32"):
        load_encoder(checkpoint)


def test_an_unknown_weight_is_named(checkpoint: Path):
    rewrite(checkpoint, weights_of(checkpoint) | {"encoder.3.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"'encoder.3.weight'.*found float32 \(2,\), expected nothing"):
        load_encoder(checkpoint)


def test_a_weight_of_another_shape_is_named(checkpoint: Path):
    rewrite(checkpoint, weights_of(checkpoint) | {"encoder.1.weight": torch.zeros(175, 255)})
    with pytest.raises(CheckpointError, match=r"'encoder.1.weight'.*\(175, 255\), expected float32 \(175, 256\)"):
        load_encoder(checkpoint)


def test_a_weight_of_another_dtype_is_named(checkpoint: Path):
    weights = weights_of(checkpoint)
    rewrite(checkpoint, weights | {"encoder.1.bias": weights["encoder.1.bias"].double()})
    with pytest.raises(CheckpointError, match=r"'encoder.1.bias'.*found float64 \(175,\), expected float32"):
        load_encoder(checkpoint)


def test_a_changed_number_is_found_by_the_digest(checkpoint: Path):
    path = checkpoint / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="digest"):
        load_encoder(checkpoint)


@pytest.mark.parametrize("file", ["weights.safetensors", "autoencoder.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "empty"])
def test_a_damaged_file_is_named(checkpoint: Path, file: str, damage: str):
    path = checkpoint / file
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:40] if damage == "cut" else b"")
    with pytest.raises(CheckpointError, match=file):
        load_encoder(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"platforms": None}, "'platforms'"),
        ({"platforms": []}, "platforms"),
        ({"platforms": ["a", "b", "c"]}, "'decoder_tokens.weight'"),
        ({"config": {"token_size": 12}}, "expected float32"),
        ({"config": {"colour": 1}}, "colour"),
        ({"weights_digest": "0" * 32}, "digest"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(checkpoint: Path, change: dict[str, object], message: str):
    redescribe(checkpoint, **change)
    with pytest.raises(CheckpointError, match=message):
        load_encoder(checkpoint)


def test_an_unknown_platform_after_loading_names_the_known_ones(checkpoint: Path):
    with pytest.raises(InputError, match=r"MERFISH\|a, Xenium\|b"):
        load_encoder(checkpoint).encode(np.zeros((1, 512), np.float32), "CosMx|c")
