"""Options of `run`, `build` and `train` that say which workers they use."""

from __future__ import annotations

import pytest
from support.atlases import copied, with_settings
from support.commands import run_main

from lloki_atlas.engine.devices import VISIBLE
from lloki_atlas.errors import InputError
from lloki_atlas.stages import build, pipeline

COMMANDS = {
    "run": (pipeline, "run"),
    "build": (build, "build"),
    "train": (pipeline, "train_autoencoder"),
}


@pytest.fixture(params=COMMANDS)
def call(request, root, monkeypatch):
    """Run a command up to where it hands on what it was given: that, or how it ended."""
    module, verb = COMMANDS[request.param]
    seen = {}

    def stop(*_, **options):
        seen.update(options)
        raise InputError("seen enough")

    monkeypatch.setattr(module, verb, stop)
    return lambda *options: (run_main(request.param, root, *options), seen)


def test_gpu_workers_and_device_memory_are_handed_on(call):
    result, seen = call("--gpus", 2, "--device-memory", 900, "--workers", 3)
    assert result.err.strip().endswith("seen enough")
    assert (seen["n_gpus"], seen["device_memory_mb"], seen["n_workers"]) == (2, 900, 3)


def test_no_gpu_worker_at_all_can_be_asked_for(call):
    assert call("--gpus", 0)[1]["n_gpus"] == 0


def test_without_the_options_the_machine_and_the_settings_decide(call):
    seen = call()[1]
    assert (seen["n_gpus"], seen["device_memory_mb"]) == (None, None)


@pytest.mark.parametrize("options", [("--gpus", -1), ("--device-memory", 0), ("--gpus", "all")], ids=str)
def test_numbers_that_make_no_sense_are_wrong_usage(call, options):
    result, seen = call(*options)
    assert (result.code, seen) == (2, {})


def test_more_gpu_workers_than_the_machine_has_are_refused(root, tmp_path, monkeypatch):
    monkeypatch.setenv(VISIBLE, "")
    catalog = with_settings(copied(root, tmp_path / "atlas"), "propagation", alpha=0.25)
    result = run_main("run", catalog.root, "--gpus", 1, "--quiet")
    assert result.code == 5
    assert "1 GPU workers are asked for and this machine shows 0 GPUs: ask for fewer" in result.err
