"""Training on a sample in memory, and the checkpoint."""

from __future__ import annotations

import dataclasses
import json
import warnings
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
from lloki_atlas.models.threads import single_thread
from lloki_atlas.models.training import train_autoencoder_on

PLATFORMS = ["MERFISH|a", "Xenium|b"]
CONFIG = AutoencoderConfig(n_epochs=3, chunk_cells=80, n_neighbors_mutual=10, n_neighbors_conservation=5)
LINEAGE = {"sample": "0123", "slices": ["one", "two"]}


@dataclasses.dataclass
class Sample:
    embeddings: np.ndarray
    platform: np.ndarray
    types: np.ndarray

    def train(self, config: AutoencoderConfig = CONFIG, platforms: list[str] | None = None, **options):
        names = platforms or [f"platform {code}" for code in range(self.platform.max() + 1)]
        return train_autoencoder_on(
            self.embeddings, self.platform, 10 * self.platform + 1, names, config=config, **options
        )


def sample(n: int = 160, *, n_platforms: int = 2, n_types: int = 4, offset: float = 0.5, seed: int = 0) -> Sample:
    """Cell types that every platform shows, shifted by an offset of its own."""
    rng = np.random.default_rng(seed)
    types, platform = rng.integers(0, n_types, n), np.arange(n) % n_platforms
    centers, shifts = rng.normal(size=(n_types, 512)), rng.normal(size=(n_platforms, 512))
    values = centers[types] + offset * shifts[platform] + 0.3 * rng.normal(size=(n, 512))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return Sample(values.astype(np.float32), platform, types)


def bits(model: ConditionalAutoencoder) -> bytes:
    return b"".join(weight.numpy().tobytes() for weight in model.state_dict().values())


def latents_of(model: ConditionalAutoencoder, cells: Sample) -> np.ndarray:
    encoder, found = FrozenEncoder(model), np.empty((len(cells.platform), 128), np.float32)
    for code in np.unique(cells.platform):
        found[cells.platform == code] = encoder.encode(cells.embeddings[cells.platform == code], int(code))
    return found


def mixing(rows: np.ndarray, platform: np.ndarray, k: int = 10) -> float:
    """Share of another platform among mutual neighbours."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    near = np.zeros(cosines.shape, bool)
    np.put_along_axis(near, np.argsort(-cosines, axis=1)[:, :k], True, axis=1)
    left, right = np.nonzero(near & near.T)
    return float((platform[left] != platform[right]).mean())


@pytest.fixture(scope="module")
def trained() -> tuple[Sample, ConditionalAutoencoder, list[dict[str, float]]]:
    cells = sample(300, offset=0.8)
    config = dataclasses.replace(CONFIG, n_epochs=60, chunk_cells=150, learning_rate=2e-3)
    model, history = cells.train(config)
    return cells, model, history


@pytest.mark.parametrize("name", ["total", "reconstruction", "triplet", "conservation"])
def test_losses_fall(trained, name: str):
    history = trained[2]
    assert history[-1][name] < 0.7 * history[0][name]


def test_platforms_mix(trained):
    cells, model, _ = trained
    before, after = mixing(cells.embeddings, cells.platform), mixing(latents_of(model, cells), cells.platform)
    assert before < 0.05
    assert after > before + 0.25


def test_cell_types_stay_apart(trained):
    cells, model, _ = trained
    assert mixing(latents_of(model, cells), cells.types) < 0.02


def test_no_cell_ends_with_a_latent_of_zeros(trained):
    cells, model, _ = trained
    assert latents_of(model, cells).max(axis=1).min() > 0


def test_total_is_the_weighted_sum(trained):
    for losses in trained[2]:
        expected = losses["reconstruction"] + 0.2 * losses["triplet"] + 1.0 * losses["conservation"]
        assert losses["total"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n_epochs", [1, 4])
def test_n_epochs_is_honoured(n_epochs: int):
    _, history = sample(60).train(dataclasses.replace(CONFIG, n_epochs=n_epochs))
    assert [losses["epoch"] for losses in history] == list(range(1, n_epochs + 1))


def test_progress_hears_of_every_epoch():
    heard: list[tuple[int, int, dict[str, float]]] = []
    _, history = sample(60).train(progress=lambda *said: heard.append(said))
    assert [said[:2] for said in heard] == [(1, 3), (2, 3), (3, 3)]
    assert [said[2] for said in heard] == history


def test_equal_inputs_give_equal_bytes():
    assert bits(sample().train()[0]) == bits(sample().train()[0])


def test_another_random_state_gives_another_model():
    other = dataclasses.replace(CONFIG, random_state=1)
    assert bits(sample().train()[0]) != bits(sample().train(other)[0])


@pytest.mark.parametrize("random_state", [-1, 2**40])
def test_any_whole_number_seeds(random_state: int):
    sample(40).train(dataclasses.replace(CONFIG, n_epochs=1, random_state=random_state))


@pytest.mark.parametrize("n_threads", [2, 3])
def test_threads_outside_change_no_byte_and_are_left_as_they_were(n_threads: int):
    expected = bits(sample().train()[0])
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        assert bits(sample().train()[0]) == expected
        assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)


def test_global_random_states_are_neither_read_nor_changed():
    expected = bits(sample().train()[0])
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002 - the global state is the point
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert bits(sample().train()[0]) == expected
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == np.random.get_state()[1].tolist()  # noqa: NPY002


def test_training_works_where_gradients_are_off():
    expected = bits(sample().train()[0])
    with torch.no_grad():
        assert bits(sample().train()[0]) == expected


def test_chunks_are_drawn_anew_in_every_epoch():
    still = dataclasses.replace(CONFIG, n_epochs=2, learning_rate=1e-30)
    history = sample().train(still)[1]
    assert history[0]["conservation"] != history[1]["conservation"]


def test_one_platform_has_no_triplets():
    _, history = sample(80, n_platforms=1).train()
    assert {losses["triplet"] for losses in history} == {0.0}
    assert {losses["n_triplets"] for losses in history} == {0}
    assert history[-1]["total"] < history[0]["total"]


def test_a_platform_of_three_cells_does_not_crash_and_is_told():
    cells = sample(160)
    cells.platform[cells.platform == 1] = 0
    cells.platform[:3] = 1
    with pytest.warns(UserWarning, match="'platform 1' has 3 cells"):
        model, history = cells.train()
    assert history[-1]["n_triplets"] > 0
    assert np.isfinite(latents_of(model, cells)).all()


@pytest.mark.parametrize("n", [1, 2])
def test_a_handful_of_cells_does_not_crash(n: int):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, history = sample(n, n_platforms=n).train()
    assert np.isfinite(history[-1]["total"])


def test_identical_cells_do_not_crash():
    cells = sample(60)
    cells.embeddings[:] = cells.embeddings[0]
    model, history = cells.train()
    assert np.isfinite(history[-1]["total"])
    assert np.isfinite(latents_of(model, cells)).all()


def test_labels_change_the_training():
    cells = sample(160)
    assert bits(cells.train(labels=cells.types)[0]) != bits(cells.train()[0])


def test_unknown_labels_leave_the_training_as_it_is():
    cells = sample(160)
    assert bits(cells.train(labels=np.full(160, -1))[0]) == bits(cells.train()[0])


def test_embeddings_that_are_not_finite_are_refused_by_row():
    cells = sample(60)
    cells.embeddings[17, 3] = np.nan
    with pytest.raises(InputError, match="first: row 17"):
        cells.train()


@pytest.mark.parametrize("change", ["width", "none", "short", "float", "missing", "beyond"])
def test_arrays_that_do_not_fit_are_refused(change: str):
    cells = sample(60)
    if change == "width":
        cells.embeddings = cells.embeddings[:, :100]
    elif change == "none":
        cells.embeddings, cells.platform = cells.embeddings[:0], np.array([0, 1])
    elif change == "short":
        cells.platform = cells.platform[:-1]
    elif change == "float":
        cells.platform = cells.platform.astype(float)
    with pytest.raises(InputError):
        cells.train(platforms={"missing": ["a", "b", "c"], "beyond": ["a"]}.get(change, ["a", "b"]))


def test_divergence_is_an_error_that_names_the_setting():
    with pytest.raises(InputError, match="learning_rate"):
        sample(60).train(dataclasses.replace(CONFIG, n_epochs=20, learning_rate=1e18))


def test_single_thread_restores_the_setting_after_an_error():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError), single_thread():
            _ = 1 // (torch.get_num_threads() - 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


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
    cells = sample(30).embeddings
    for platform in PLATFORMS:
        assert load_encoder(checkpoint).encode(cells, platform).tobytes() == encoder.encode(cells, platform).tobytes()


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
        model, history = sample(60).train(platforms=PLATFORMS)
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
