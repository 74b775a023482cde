"""Training on a sample in memory, and the loop's promises: same bytes, checkpoints, early stopping, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lloki_atlas.config import AutoencoderConfig
from lloki_atlas.errors import InputError
from lloki_atlas.models.autoencoder import ConditionalAutoencoder
from lloki_atlas.models.encoder import FrozenEncoder
from lloki_atlas.models.step import Chunk, TrainingStep
from lloki_atlas.models.threads import single_thread
from lloki_atlas.models.training import MIN_IMPROVEMENT, best_epoch, stalled, train, train_autoencoder_on
from lloki_atlas.models.training_arrays import ArraySource
from lloki_atlas.models.training_chunks import keyed

# as published, but for the weight of conservation, which belongs to other embeddings
CONFIG = AutoencoderConfig(
    preset="paper",
    conservation_weight=1.0,
    n_epochs=3,
    chunk_cells=80,
    n_neighbors_mutual=10,
    n_neighbors_conservation=5,
)


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


def test_weights_that_start_isometric_reconstruct_from_the_outset():
    first = {}
    for start in ("isometric", "random"):
        model, history = sample(400).train(dataclasses.replace(CONFIG, start=start, n_epochs=1, learning_rate=1e-30))
        first[start] = history[0]
        again, _ = sample(400).train(
            dataclasses.replace(CONFIG, start=start, n_epochs=1, learning_rate=1e-30), n_threads=3
        )
        assert bits(model) == bits(again)
    assert first["isometric"]["reconstruction"] < 0.5 * first["random"]["reconstruction"]
    assert first["isometric"]["conservation"] < 0.5 * first["random"]["conservation"]


def test_the_settings_that_are_the_default_train():
    model, history = sample(400).train(AutoencoderConfig(n_epochs=2, chunk_cells=200))
    assert all(np.isfinite(value) for losses in history for value in losses.values())
    assert history[1]["total"] < history[0]["total"]
    assert np.isfinite(latents_of(model, sample(40))).all()


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


def test_one_platform_has_no_triplets_and_is_told():
    with pytest.warns(UserWarning, match=r"one platform \('platform 0'\): no triplets, nothing to mix"):
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


@pytest.mark.filterwarnings("ignore:platform|one platform")
@pytest.mark.parametrize(("n", "n_platforms"), [(2, 1), (3, 2)])
def test_a_handful_of_cells_does_not_crash(n: int, n_platforms: int):
    _, history = sample(n, n_platforms=n_platforms).train()
    assert np.isfinite(history[-1]["total"])


@pytest.mark.parametrize("n", [1, 2])
def test_platforms_of_one_cell_each_are_refused_by_name(n: int):
    with pytest.raises(InputError, match=r"no platform has two cells to train on \(platform 0"):
        sample(n, n_platforms=n).train()


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
    with pytest.warns(UserWarning, match="no cell has a label"):
        unknown = cells.train(labels=np.full(160, -1))[0]
    assert bits(unknown) == bits(cells.train()[0])


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


def patient(**changes) -> AutoencoderConfig:
    return dataclasses.replace(
        CONFIG, **{"chunk_cells": 400, "patience": 2, "held_out": 0.3, "n_epochs": 30, **changes}
    )


class Contrary(ArraySource):
    """The held-out cells are the opposite of those that are trained on: what is learned makes them worse."""

    def held_out(self) -> list[Chunk]:
        return [dataclasses.replace(chunk, embeddings=-chunk.embeddings) for chunk in super().held_out()]


def source_of(cells: Sample, config: AutoencoderConfig, kind: type[ArraySource] = ArraySource) -> ArraySource:
    return kind(cells.embeddings, cells.platform, cells.platform, ["a", "b"], config=config, hold_out=True)


def evaluated(model: ConditionalAutoencoder, source: ArraySource, config: AutoencoderConfig) -> float:
    """Total loss of the held-out cells."""
    with TrainingStep(model, config) as step:
        losses = [
            step.losses(chunk, keyed(config.random_state, "validation", number))["total"]
            for number, chunk in enumerate(source.held_out())
        ]
    return sum(losses) / len(losses)


def test_training_ends_when_the_held_out_cells_no_longer_improve():
    _, history = sample(1200).train(patient(learning_rate=1e-30))
    assert len(history) == 3
    assert history[-1]["best_epoch"] == 1


def test_training_that_improves_goes_on_to_the_last_epoch():
    _, history = sample(1200).train(patient(patience=1, n_epochs=4))
    assert len(history) == 4
    assert history[-1]["best_epoch"] == 4


def test_the_weights_of_the_best_epoch_are_returned():
    config = patient(n_epochs=6, patience=6, learning_rate=5e-3, triplet_weight=0.0, conservation_weight=0.0)
    source = source_of(sample(1200), config, Contrary)
    model, history = train(source, config)
    totals = [losses["held_out_total"] for losses in history]
    best = int(np.argmin(totals)) + 1
    assert best < len(history) == 6
    assert [losses["best_epoch"] for losses in history] == [
        int(np.argmin(totals[: number + 1])) + 1 for number in range(len(history))
    ]
    assert evaluated(model, source, config) == totals[best - 1]
    shorter, _ = train(source, dataclasses.replace(config, n_epochs=best))
    assert bits(shorter) == bits(model)


def test_the_first_of_equal_epochs_is_the_best():
    assert best_epoch([{"held_out_total": value} for value in (3.0, 1.0, 2.0, 1.0)]) == 2


@pytest.mark.parametrize(
    ("totals", "stops"),
    [
        ([1.0, 1.0, 1.0], True),
        ([1.0, 0.9, 0.8], False),
        ([1.0, 2.0, 0.5, 0.6], False),
        ([1.0, 2.0, 0.5, 0.6, 0.7], True),
        ([1.0, 1.0 - 0.4 * MIN_IMPROVEMENT, 1.0 - 0.8 * MIN_IMPROVEMENT], True),
        ([1.0, 1.0 - 0.6 * MIN_IMPROVEMENT, 1.0 - 1.2 * MIN_IMPROVEMENT], False),
        ([], False),
    ],
)
def test_patience_counts_epochs_without_an_improvement(totals: list[float], stops: bool):
    assert stalled([{"held_out_total": value} for value in totals], 2) == stops


@pytest.mark.parametrize("changed", [{}, {"n_distant": 3}, {"preset": "default", "n_distant": 5, "negatives": "none"}])
def test_a_training_that_goes_on_from_its_state_ends_in_the_same_bytes(tmp_path: Path, changed: dict[str, Any]):
    class StopError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StopError

    config = patient(n_epochs=3, patience=9, **changed)
    source, state = source_of(sample(900), config), tmp_path / "key.training"
    with pytest.raises(StopError):
        train(source, config, state=state, write=Path.write_bytes, progress=stop)
    model, history = train(source, config, state=state, write=Path.write_bytes)
    whole, expected = train(source, config)
    assert history == expected
    assert bits(model) == bits(whole)


def test_held_out_cells_are_told_without_patience_and_the_last_weights_returned():
    config = patient(patience=0, n_epochs=2)
    source = source_of(sample(1200), config)
    model, history = train(source, config)
    assert all(np.isfinite(losses["held_out_conservation"]) for losses in history)
    assert "best_epoch" not in history[-1]
    assert evaluated(model, source, config) == history[-1]["held_out_total"]


def test_nothing_is_held_out_without_patience():
    _, history = sample(1200).train(patient(patience=0, n_epochs=1))
    assert not [name for name in history[0] if name.startswith("held_out")]


def test_cells_that_are_held_out_do_not_move_the_weights():
    cells, config = sample(1200), patient(n_epochs=2)
    source = source_of(cells, config)
    left_out = np.concatenate([chunk.embeddings for chunk in source.held_out()])
    one = bits(train(source, config)[0])
    changed = cells.embeddings.copy()
    rows = {row.tobytes() for row in left_out}
    changed[[row.tobytes() in rows for row in changed]] *= 0.5
    other = source_of(dataclasses.replace(cells, embeddings=changed), config)
    assert bits(train(other, config)[0]) == one


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_byte(n_threads: int):
    cells = sample(400)
    assert bits(cells.train(n_threads=n_threads)[0]) == bits(cells.train(n_threads=4)[0])


def test_labels_of_one_class_are_told_and_change_nothing():
    cells = sample(160)
    with pytest.warns(UserWarning, match="all labels are the same"):
        labelled = cells.train(labels=np.full(160, 3))[0]
    assert bits(labelled) == bits(cells.train()[0])


def test_single_thread_restores_the_setting_after_an_error():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError), single_thread():
            _ = 1 // (torch.get_num_threads() - 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
