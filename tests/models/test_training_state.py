"""A training between two epochs: what is saved comes back, another training's or a damaged file does not."""

from __future__ import annotations

import pytest
import torch

from lloki_atlas.errors import CheckpointError
from lloki_atlas.models.autoencoder import ConditionalAutoencoder
from lloki_atlas.models.training_state import Training, restore, saved


def training(random_state=0, *, n_updates=0) -> Training:
    model = ConditionalAutoencoder(["a", "b"], random_state=random_state)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(n_updates):
        optimizer.zero_grad()
        sum(weight.square().sum() for weight in model.parameters()).backward()
        optimizer.step()
    return Training(model, optimizer)


def weights(made: Training) -> bytes:
    return b"".join(value.numpy().tobytes() for value in made.model.state_dict().values())


@pytest.fixture
def state(tmp_path):
    """File of a training after three updates."""
    made = training(n_updates=3)
    made.history = [{"epoch": 1, "total": 0.1 + 0.2}]
    made.best = {name: value.clone() for name, value in made.model.state_dict().items()}
    path = tmp_path / "key.training"
    path.write_bytes(saved(made, "key"))
    return path


def test_weights_optimiser_history_and_best_weights_come_back(state):
    found = training(random_state=5)
    restore(found, state, "key")
    assert weights(found) == weights(training(n_updates=3))
    assert found.history == [{"epoch": 1, "total": 0.1 + 0.2}]
    assert all(torch.equal(value, found.model.state_dict()[name]) for name, value in found.best.items())


def test_a_training_that_goes_on_ends_as_one_that_was_not_interrupted(state):
    found = training()
    restore(found, state, "key")
    for _ in range(2):
        found.optimizer.zero_grad()
        sum(weight.square().sum() for weight in found.model.parameters()).backward()
        found.optimizer.step()
    assert weights(found) == weights(training(n_updates=5))


def test_the_state_of_another_training_is_refused(state):
    found = training()
    with pytest.raises(CheckpointError, match="other settings or data"):
        restore(found, state, "another key")
    assert weights(found) == weights(training())


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "foreign"])
def test_a_damaged_file_is_refused(state, damage):
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes({"empty": b"", "cut": bytes(data[:99]), "changed": bytes(data), "foreign": b"a note"}[damage])
    with pytest.raises(CheckpointError, match=r"key\.training, it is damaged: delete it to start anew"):
        restore(training(), state, "key")
