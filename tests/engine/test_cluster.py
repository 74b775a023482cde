"""Running plans on Dask: order, failures, memory, lost workers."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from support.tasks import notes, plan_of, tile_tasks, whole_task

from lloki_atlas.engine import cluster
from lloki_atlas.engine.cluster import connect, local_client, memory_per_task
from lloki_atlas.engine.plan import link
from lloki_atlas.errors import ClusterError, InputError, MemoryBudgetError
from lloki_atlas.store.objects import is_complete


class FakeClient:
    """What `memory_per_task` asks of a client; workers are (memory limit, threads)."""

    def __init__(self, *workers):
        self.workers = workers

    def wait_for_workers(self, n, timeout):
        if len(self.workers) < n:
            raise TimeoutError

    def scheduler_info(self, n_workers):
        assert n_workers == -1, "all workers count, not the first few"
        return {"workers": {str(i): {"memory_limit": m, "nthreads": t} for i, (m, t) in enumerate(self.workers)}}


class CountingClient:
    """A client that notes how many submitted tasks were unfinished at most."""

    def __init__(self, client):
        self._client, self.futures, self.most = client, [], 0

    def __getattr__(self, name):
        return getattr(self._client, name)

    def submit(self, *args, **options):
        self.futures.append(self._client.submit(*args, **options))
        self.most = max(self.most, sum(future.status == "pending" for future in self.futures))
        return self.futures[-1]


def test_a_run_does_all_tasks_and_commits_once(tmp_path, client):
    plan, outcomes = plan_of(whole_task(tmp_path, "one"), whole_task(tmp_path, "two"))
    assert plan.run(client, progress=False) == "committed"
    assert [(sorted(outcome.done), dict(outcome.failed)) for outcome in outcomes] == [(["one", "two"], {})]


def test_a_run_publishes_tiles_after_the_last_of_them(tmp_path, client):
    plan, outcomes = plan_of(*link(tile_tasks(tmp_path, "tiled")))
    plan.run(client, progress=False)
    assert len(outcomes[0].done) == 4
    assert is_complete(tmp_path / "objects" / "tiled.zarr")


def test_a_task_starts_after_those_that_make_what_it_reads(tmp_path, client):
    chain = [whole_task(tmp_path, "0")] + [whole_task(tmp_path, str(n), reads=str(n - 1)) for n in range(1, 6)]
    plan, _ = plan_of(*link(chain))
    plan.run(client, progress=False)
    assert notes(tmp_path / "log") == ["0", "1", "2", "3", "4", "5"]


def test_a_second_run_computes_nothing(tmp_path, client):
    plan, outcomes = plan_of(whole_task(tmp_path, "one"), *tile_tasks(tmp_path, "tiled"))
    plan.run(client, progress=False)
    before = notes(tmp_path / "log")
    plan.run(client, progress=False)
    assert notes(tmp_path / "log") == before
    assert outcomes[0].done == outcomes[1].done


@pytest.fixture
def half_failed(tmp_path, client):
    """A run in which one task refuses, another depends on it, and two others are fine."""
    plan, outcomes = plan_of(
        *link(
            [
                whole_task(tmp_path, "bad", "refuse"),
                whole_task(tmp_path, "after bad", reads="bad"),
                whole_task(tmp_path, "good"),
                whole_task(tmp_path, "after good", reads="good"),
            ]
        )
    )
    with pytest.raises(InputError, match="this task refuses its input"):
        plan.run(client, progress=False)
    return outcomes


def test_a_failing_task_fails_those_that_need_it_and_no_others(half_failed):
    assert set(half_failed[0].failed) == {"bad", "after bad"}


def test_what_does_not_need_a_failing_task_is_done_and_committed(half_failed):
    assert [sorted(outcome.done) for outcome in half_failed] == [["after good", "good"]]


def test_a_task_that_needs_a_failed_one_is_never_called(half_failed, tmp_path):
    assert "after bad" not in notes(tmp_path / "log")


def test_a_failing_tile_keeps_its_object_from_being_published(tmp_path, client):
    plan, outcomes = plan_of(*link(tile_tasks(tmp_path, "tiled", broken=(4,))))
    with pytest.raises(InputError):
        plan.run(client, progress=False)
    assert outcomes[0].done == {"tiled/0", "tiled/8"}
    assert not is_complete(tmp_path / "objects" / "tiled.zarr")


def test_a_run_after_a_failure_does_only_what_is_left(tmp_path, client):
    broken, _ = plan_of(*link(tile_tasks(tmp_path, "tiled", broken=(4,))))
    with pytest.raises(InputError):
        broken.run(client, progress=False)
    mended, _ = plan_of(*link(tile_tasks(tmp_path, "tiled")))
    mended.run(client, progress=False)
    assert notes(tmp_path / "log").count("tiled/0") == 1
    assert is_complete(tmp_path / "objects" / "tiled.zarr")


def test_the_first_error_is_the_one_that_is_raised(tmp_path, client):
    first, second = (whole_task(tmp_path, name, "refuse") for name in ("first", "second"))
    first.arguments["message"], second.arguments["message"] = "the first", "the second"
    plan, _ = plan_of(first, second)
    with pytest.raises(InputError, match=r"^the first$"):
        plan.run(client, progress=False)


def test_a_defect_is_raised_as_it_is(tmp_path, client):
    plan, _ = plan_of(whole_task(tmp_path, "one", "break_down"))
    with pytest.raises(ZeroDivisionError):
        plan.run(client, progress=False)


def test_a_task_that_killed_all_its_workers_is_a_cluster_error_with_advice(tmp_path, client):
    plan, _ = plan_of(whole_task(tmp_path, "heavy", "lose_workers"))
    with pytest.raises(ClusterError, match=r"^heavy lost its workers .*\(1 tasks failed\): give workers more memory"):
        plan.run(client, progress=False)


def test_a_task_that_does_not_fit_is_refused_before_anything_runs(tmp_path, client):
    plan, outcomes = plan_of(whole_task(tmp_path, "one"), whole_task(tmp_path, "huge", projected_memory=2**60))
    with pytest.raises(MemoryBudgetError, match=r"^huge is projected to need"):
        plan.run(client, progress=False)
    assert (notes(tmp_path / "log"), outcomes) == ([], [])


@pytest.mark.parametrize(
    ("workers", "memory"),
    [([(8, 1)], 8), ([(8, 4)], 2), ([(8, 1), (6, 2), (90, 3)], 3), ([(0, 2)], None), ([(None, 1), (8, 2)], 4)],
    ids=["one thread", "threads share", "smallest counts", "no limit", "some without a limit"],
)
def test_a_task_may_use_its_share_of_the_smallest_worker(workers, memory):
    assert memory_per_task(FakeClient(*workers)) == memory


def test_a_cluster_without_workers_is_an_error_with_advice():
    with pytest.raises(ClusterError, match="no worker arrived within 60 s: start workers"):
        memory_per_task(FakeClient())


def test_no_more_than_the_window_is_unfinished_at_a_time(tmp_path, client, monkeypatch):
    monkeypatch.setattr(cluster, "WINDOW", 2)
    counting = CountingClient(client)
    plan, outcomes = plan_of(*(whole_task(tmp_path, str(n)) for n in range(9)))
    plan.run(counting, progress=False)
    assert len(outcomes[0].done) == 9
    assert counting.most <= 2


def test_a_window_of_one_still_runs_a_chain(tmp_path, client, monkeypatch):
    monkeypatch.setattr(cluster, "WINDOW", 1)
    plan, outcomes = plan_of(*link([*tile_tasks(tmp_path, "tiled"), whole_task(tmp_path, "reader", reads="tiled")]))
    plan.run(client, progress=False)
    assert len(outcomes[0].done) == 5


@pytest.mark.parametrize("error", [OSError("refused"), TimeoutError("too late"), ValueError("no address")])
def test_an_address_where_no_scheduler_answers_is_a_cluster_error(monkeypatch, error):
    import distributed

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(distributed, "Client", refuse)
    with pytest.raises(ClusterError, match="no scheduler answers at tcp://host:1"), connect("tcp://host:1"):
        pytest.fail("there is nothing to connect to")


def test_a_running_scheduler_takes_a_plan(tmp_path, client):
    plan, outcomes = plan_of(whole_task(tmp_path, "one"))
    with connect(client.scheduler.address) as second:
        plan.run(second, progress=False)
    assert outcomes[0].done == {"one"}


def test_a_client_that_was_given_stays_open(tmp_path, client):
    plan_of(whole_task(tmp_path, "one"))[0].run(client, progress=False)
    assert client.status == "running"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run on worker processes of its own, in which one task kills its worker the first time."""
    root = tmp_path_factory.mktemp("killed")
    chain = [
        whole_task(root, "calm"),
        whole_task(root, "killer", "die_once", reads="calm"),
        whole_task(root, "after", reads="killer"),
    ]
    chain[1].arguments.pop("reads")
    plan, outcomes = plan_of(*link(chain))
    plan.run(progress=False, n_workers=1)
    return SimpleNamespace(root=root, outcome=outcomes[0], log=notes(root / "log"))


def test_a_run_outlives_a_worker_that_is_killed_in_the_middle_of_a_task(killed):
    assert killed.outcome.done == {"calm", "killer", "after"}
    assert not killed.outcome.failed


def test_the_task_of_a_killed_worker_is_done_again(killed):
    assert killed.log.count("killer") == 2
    assert is_complete(killed.root / "objects" / "killer.zarr")


def test_workers_of_a_local_run_are_other_processes_of_one_thread_that_end_with_it():
    with local_client(1) as client:
        pids = list(client.run(os.getpid).values())
        threads = list(client.nthreads().values())
    assert threads == [1]
    assert os.getpid() not in pids
    assert not any(_runs(pid) for pid in pids)


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as handle:
        return handle.read().rpartition(")")[2].split()[0] != "Z"
