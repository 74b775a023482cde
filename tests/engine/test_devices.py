"""GPUs that a process may use, and threads that prepare work for one."""

from __future__ import annotations

import pytest

from lloki_atlas.engine import devices
from lloki_atlas.engine.devices import HOST_THREADS, VISIBLE, host_threads, visible_gpus
from lloki_atlas.errors import InputError


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("", ()),
        ("0", ("0",)),
        ("1,0", ("1", "0")),
        (" 2 , GPU-8932f937 ", ("2", "GPU-8932f937")),
        ("MIG-GPU-1/2/3", ("MIG-GPU-1/2/3",)),
        ("-1", ()),
        ("0,-1,1", ("0",)),
        ("0,,1", ("0",)),
        ("NoDevFiles", ()),
    ],
)
def test_visible_gpus_are_those_up_to_the_first_that_is_none(monkeypatch, given, names):
    monkeypatch.setenv(VISIBLE, given)
    assert visible_gpus() == names


@pytest.mark.parametrize("n", [0, 1, 3])
def test_without_the_variable_every_gpu_of_the_driver_is_visible(monkeypatch, tmp_path, n):
    for number in range(n):
        (tmp_path / f"0000:0{number}:00.0").mkdir()
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setattr(devices, "_DRIVER", tmp_path)
    assert visible_gpus() == tuple(map(str, range(n)))


def test_a_machine_without_the_driver_has_no_gpu(monkeypatch, tmp_path):
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setattr(devices, "_DRIVER", tmp_path / "none")
    assert visible_gpus() == ()


@pytest.mark.parametrize(("given", "threads"), [(None, 1), ("1", 1), ("12", 12)])
def test_threads_are_those_of_the_variable(monkeypatch, given, threads):
    monkeypatch.delenv(HOST_THREADS, raising=False)
    if given is not None:
        monkeypatch.setenv(HOST_THREADS, given)
    assert host_threads() == threads


@pytest.mark.parametrize("given", ["0", "-2", "four", "1.5", ""])
def test_threads_that_are_no_positive_number_are_refused(monkeypatch, given):
    monkeypatch.setenv(HOST_THREADS, given)
    with pytest.raises(InputError, match=f"{HOST_THREADS} is '{given}': set it"):
        host_threads()
