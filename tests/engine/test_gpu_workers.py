"""Device tasks: where they run, what the loss of a GPU worker costs, and how a run without one goes on."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from support.devices import FAKE_GPU, STARTS, local_client_with_gpu, rows_of, stream_task
from support.folders import folder_digest
from support.tasks import notes, plan_of, whole_task

from lloki_atlas.engine import cluster
from lloki_atlas.engine.cluster import GPU, has_gpu_workers, local_client, memory_per_task
from lloki_atlas.engine.devices import HOST_THREADS, VISIBLE
from lloki_atlas.engine.plan import link, run_task, split_tiles
from lloki_atlas.errors import ClusterError, MemoryBudgetError
from lloki_atlas.store.arrays import read_arrays


@pytest.fixture(scope="module")
def gpu_client():
    """Two worker processes, one of them a GPU worker."""
    with local_client_with_gpu(2) as client:
        yield client


def specs(n_workers, *gpus):
    return cluster._local_workers(n_workers, gpus, {})


@pytest.mark.parametrize(
    ("n_workers", "gpus", "names"),
    [
        (2, [], ["cpu-0", "cpu-1"]),
        (2, ["0"], ["cpu-0", "gpu-0"]),
        (1, ["0"], ["gpu-0"]),
        (1, ["0", "1"], ["gpu-0", "gpu-1"]),
        (4, ["0", "1"], ["cpu-0", "cpu-1", "gpu-0", "gpu-1"]),
    ],
)
def test_every_gpu_has_a_worker_and_other_workers_fill_up_to_the_number_asked_for(n_workers, gpus, names):
    assert sorted(specs(n_workers, *gpus)) == names


def test_a_worker_sees_its_own_gpu_and_no_other():
    found = {name: worker["options"]["env"][VISIBLE] for name, worker in specs(3, "0", "GPU-7").items()}
    assert found == {"cpu-0": "", "gpu-0": "0", "gpu-1": "GPU-7"}


def test_only_gpu_workers_offer_the_resource():
    found = {name: worker["options"].get("resources") for name, worker in specs(2, "0").items()}
    assert found == {"cpu-0": None, "gpu-0": {GPU: 1}}


@pytest.mark.parametrize(("n_cores", "n_gpus", "threads"), [(16, 1, 16), (16, 4, 4), (2, 4, 1)])
def test_gpu_workers_share_the_cores_for_preparing(monkeypatch, n_cores, n_gpus, threads):
    monkeypatch.setattr(os, "cpu_count", lambda: n_cores)
    workers = specs(n_gpus + 1, *map(str, range(n_gpus)))
    assert {w["options"]["env"].get(HOST_THREADS) for w in workers.values()} == {None, threads}


def test_a_gpu_worker_has_twice_the_memory_of_another_and_all_have_the_machine():
    memory = {name: worker["options"]["memory_limit"] for name, worker in specs(3, "0").items()}
    assert memory["gpu-0"] == pytest.approx(2 * memory["cpu-0"], rel=1e-6)
    assert sum(memory.values()) == pytest.approx(4 * memory["cpu-0"], rel=1e-6)


def test_more_gpu_workers_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv(VISIBLE, "0")
    with pytest.raises(ClusterError, match="2 GPU workers are asked for and this machine shows 1 GPUs"):
        local_client(1, 2).__enter__()


class FakeClient:
    """What is asked of a client about its workers, each (memory limit, threads, GPUs)."""

    def __init__(self, *workers):
        self.workers = workers

    def wait_for_workers(self, n, timeout):
        assert n == 1

    def scheduler_info(self, n_workers):
        assert n_workers == -1
        workers = [
            {"memory_limit": memory, "nthreads": threads, "resources": {GPU: gpus} if gpus else {}}
            for memory, threads, gpus in self.workers
        ]
        return {"workers": dict(enumerate(workers))}


@pytest.mark.parametrize(
    ("workers", "any_worker", "gpu_worker"),
    [([(4, 1, 0), (9, 1, 1)], 4, 9), ([(9, 1, 0), (4, 1, 1), (6, 2, 1)], 3, 3), ([(4, 1, 0), (0, 1, 1)], 4, None)],
    ids=["larger", "smallest counts", "no limit"],
)
def test_a_device_task_may_use_its_share_of_the_smallest_gpu_worker(workers, any_worker, gpu_worker):
    client = FakeClient(*workers)
    assert (memory_per_task(client), memory_per_task(client, on_gpus=True)) == (any_worker, gpu_worker)


@pytest.mark.parametrize(
    ("gpus", "asked", "found"),
    [([0, 0], None, False), ([0, 1], None, True), ([1, 1], 2, True), ([1], 0, False), ([0], 0, False)],
)
def test_gpu_workers_are_used_where_there_are_any_unless_none_is_asked_for(gpus, asked, found):
    assert has_gpu_workers(FakeClient(*((8, 1, n) for n in gpus)), asked) is found


def test_gpu_workers_that_never_come_are_an_error_with_advice(monkeypatch):
    monkeypatch.setattr(cluster, "SECONDS_FOR_WORKERS", 0)
    with pytest.raises(
        ClusterError, match='1 of 2 GPU workers arrived within 0 s: start workers with --resources "GPU'
    ):
        has_gpu_workers(FakeClient((8, 1, 1), (8, 1, 0)), 2)


def test_a_device_task_has_to_fit_in_gpu_workers_alone(tmp_path):
    plan, _ = plan_of(
        whole_task(tmp_path, "small", projected_memory=3),
        whole_task(tmp_path, "large", device=True, projected_memory=9),
    )
    plan.validate(4, memory_per_device_task=9)
    for limits in ((4, 8), (2, 9), (4, None)):
        with pytest.raises(MemoryBudgetError):
            plan.validate(limits[0], memory_per_device_task=limits[1])


def test_device_tasks_run_on_the_gpu_worker_and_no_other_worker_sees_a_gpu(gpu_client, tmp_path):
    tasks = [whole_task(tmp_path, f"device-{n}", device=True) for n in range(4)]
    tasks += [whole_task(tmp_path, f"plain-{n}") for n in range(4)]
    plan, outcomes = plan_of(*(replace(task, function="support.devices:place") for task in tasks))
    plan.run(gpu_client, progress=False)
    places = dict(line.split(" on ") for line in notes(tmp_path / "log"))
    assert len(outcomes[0].done) == 8
    assert {place for name, place in places.items() if name.startswith("device")} == {FAKE_GPU}
    assert {place for name, place in places.items() if name.startswith("plain")} <= {"", FAKE_GPU}


def test_workers_of_the_local_cluster_have_their_environment(gpu_client):
    def environment():
        return os.environ.get(VISIBLE), os.environ.get(HOST_THREADS)

    found = set(gpu_client.run(environment).values())
    assert found == {("", None), (FAKE_GPU, str(os.cpu_count()))}


@pytest.mark.parametrize("n_gpus", [None, 1])
def test_a_stream_is_one_task_on_a_gpu_worker(gpu_client, tmp_path, n_gpus):
    plan, outcomes = plan_of(*stream_task(tmp_path, "one"))
    plan.run(gpu_client, progress=False, n_gpus=n_gpus)
    assert outcomes[0].done == {"one", "one/publish", "one/publish also"}


def test_a_stream_is_shared_tile_by_tile_when_no_gpu_is_wanted(gpu_client, tmp_path):
    plan, outcomes = plan_of(*stream_task(tmp_path, "one"))
    plan.run(gpu_client, progress=False, n_gpus=0)
    assert outcomes[0].done == {"one/0", "one/4", "one/8", "one/publish", "one/publish also"}


def test_a_stream_is_shared_tile_by_tile_where_there_is_no_gpu_worker(client, tmp_path):
    plan, outcomes = plan_of(*stream_task(tmp_path, "one"))
    plan.run(client, progress=False)
    assert outcomes[0].done == {task.name for task in split_tiles(plan.tasks)}


@pytest.fixture(scope="module")
def killed(gpu_client, tmp_path_factory):
    """A run whose GPU worker is killed when two of three tiles are written."""
    root = tmp_path_factory.mktemp("killed")
    arguments = {"function": "support.devices:tiles", "after": 2}
    tasks = stream_task(root, "one", "killed_once", arguments=arguments)
    plan, outcomes = plan_of(*link(tasks))
    plan.run(gpu_client, progress=False)
    return SimpleNamespace(root=root, tasks=tasks, outcome=outcomes[0])


def test_a_run_outlives_its_gpu_worker(killed):
    assert killed.outcome.done == {task.name for task in killed.tasks}
    assert not killed.outcome.failed


def test_only_the_tile_in_flight_is_done_again_and_on_a_gpu_worker(killed):
    calls = [line for line in notes(killed.root / "log") if " on " in line]
    assert calls == [f"one {list(STARTS)} on {FAKE_GPU}", f"one {[STARTS[2]]} on {FAKE_GPU}"]


def test_a_killed_gpu_worker_changes_no_byte(killed, tmp_path):
    for task in stream_task(tmp_path, "one"):
        run_task(task)
    assert folder_digest(killed.root / "objects") == folder_digest(tmp_path / "objects")


def test_several_gpu_workers_share_the_work_and_outlive_the_loss_of_one(tmp_path):
    gpus = ("GPU-A", "GPU-B")
    tasks = []
    for name, after in (("a", 1), ("b", 99), ("c", 99), ("d", 99), ("e", 99), ("f", 99)):  # the first one kills
        arguments = {"function": "support.devices:tiles", "after": after}
        tasks += stream_task(tmp_path, name, "killed_once", arguments=arguments)
    plan, outcomes = plan_of(*link(tasks))
    with local_client_with_gpu(2, gpus) as client:
        plan.run(client, progress=False, n_gpus=2)
    assert outcomes[0].done == {task.name for task in tasks}
    calls = [line for line in notes(tmp_path / "log") if " on " in line]
    assert {line.rpartition(" on ")[2] for line in calls} == set(gpus)
    assert len(calls) >= 7  # the task of the killed worker ran again, and what else it had been given
    for name in "af":
        assert (read_arrays(tmp_path / "objects" / f"{name}.zarr")["values"] == expected_values()).all()


def expected_values():
    return np.concatenate([rows_of(start)["values"] for start in STARTS])


@pytest.fixture(scope="module")
def stranded(tmp_path_factory):
    """A run whose only GPU worker dies and is not started again, with other tasks beside it and after it."""
    root = tmp_path_factory.mktemp("stranded")
    device = stream_task(root, "one", "killed_once", arguments={"function": "support.devices:tiles", "after": 2})
    after = whole_task(root, "after", reads="one")
    second = stream_task(root, "two")
    plan, outcomes = plan_of(*link([*device, after, *second, whole_task(root, "plain")]))
    started = time.monotonic()
    with local_client_with_gpu(2) as client, pytest.MonkeyPatch.context() as patched:
        client.cluster.workers["gpu-0"].close_gracefully()
        patched.setattr(cluster, "WINDOW", 1)  # some of the tasks are not submitted yet
        patched.setattr(cluster, "SECONDS_FOR_WORKERS", 2)
        patched.setattr(cluster, "SECONDS_BETWEEN_LOOKS", 0.2)
        with pytest.raises(ClusterError) as raised:
            plan.run(client, progress=False)
    return SimpleNamespace(
        root=root, outcome=outcomes[0], error=raised.value, seconds=time.monotonic() - started, tasks=device
    )


def test_a_run_ends_when_no_gpu_worker_comes_back(stranded):
    assert str(stranded.error).startswith("every GPU worker was gone for 2 s while one waited for one: start GPU")
    assert stranded.seconds < 60


def test_tasks_that_need_no_gpu_are_done_and_committed_all_the_same(stranded):
    assert "plain" in stranded.outcome.done


def test_all_that_needs_the_lost_gpu_fails(stranded):
    assert {"one", "one/publish", "one/publish also", "after", "two"} <= set(stranded.outcome.failed)


def test_tiles_that_were_written_before_the_loss_are_kept(stranded):
    task = stranded.tasks[0]
    assert [output.missing() for output in task.outputs] == [(STARTS[2],)] * 2
    written = read_arrays(task.output.staging)["values"][: STARTS[2]]
    np.testing.assert_array_equal(written, np.concatenate([rows_of(start)["values"] for start in STARTS[:2]]))


def test_a_run_continues_with_gpu_workers_that_come_back(gpu_client, tmp_path):
    plan, outcomes = plan_of(whole_task(tmp_path, "one", device=True))
    (pid,) = gpu_client.run(os.getpid, workers=[gpu_address(gpu_client)]).values()
    os.kill(pid, signal.SIGKILL)
    plan.run(gpu_client, progress=False, n_gpus=1)
    assert outcomes[0].done == {"one"}


def gpu_address(client):
    workers = client.scheduler_info(n_workers=-1)["workers"]
    (address,) = (address for address, worker in workers.items() if worker["resources"].get(GPU))
    return address
