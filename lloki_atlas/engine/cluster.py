"""Run a plan on Dask: any `distributed.Client`, or a local cluster made for the run. The only module that knows Dask.

Tasks are opaque and small in number (one per slice or tile and stage), their results are their names, and Dask keeps
the order among them. At most `WINDOW` unfinished tasks per worker thread are submitted at a time, so that a scheduler
never holds an atlas of keys.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from uuid import uuid4

from lloki_atlas.engine.plan import Outcome, Plan, Task, run_task
from lloki_atlas.engine.progress import Progress
from lloki_atlas.errors import ClusterError, LlokiAtlasError

WINDOW = 16
SECONDS_FOR_WORKERS = 60
# Dask's own default also sets MALLOC_TRIM_THRESHOLD_, which makes glibc give every large array back to the kernel at
# once; training then spends half of its time in page faults
WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": 1, "MKL_NUM_THREADS": 1, "OPENBLAS_NUM_THREADS": 1}


@contextmanager
def local_client(n_workers: int | None = None) -> Iterator[Any]:
    """Make a local cluster of single-threaded worker processes, and take it down at the end.

    Parameters
    ----------
    n_workers
        Worker processes; one per core when None.
    """
    import dask
    from distributed import Client, LocalCluster

    with (
        dask.config.set(
            {
                "distributed.comm.timeouts.connect": "60s",
                "distributed.nanny.pre-spawn-environ": WORKER_ENVIRONMENT,
            }
        ),
        LocalCluster(
            n_workers=n_workers or os.cpu_count() or 1,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",  # any free port: several runs may share a machine
            silence_logs=50,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@contextmanager
def connect(address: str) -> Iterator[Any]:
    """Connect to a running scheduler.

    Raises
    ------
    ClusterError
        If none answers at the address.
    """
    from distributed import Client

    try:
        client = Client(address, timeout="20s")
    except (OSError, ValueError) as error:
        raise ClusterError(f"no scheduler answers at {address}: start one, or use --cluster local") from error
    with client:
        yield client


def run_plan(plan: Plan, client: Any, *, progress: bool, n_workers: int | None) -> Any:
    """Run the tasks of a plan and commit what they made.

    Raises
    ------
    MemoryBudgetError
        Before anything starts, when a task is projected not to fit in a worker.
    ClusterError
        When there are no workers, or a task killed its workers.
    LlokiAtlasError
        The first error of a task, after everything that could be done was done and committed.
    """
    if not plan.tasks:
        return plan.commit(Outcome(frozenset(), {}))
    with nullcontext(client) if client is not None else local_client(n_workers) as used:
        plan.validate(memory_per_task(used))
        outcome = _execute(plan.tasks, used, progress=progress)
    result = plan.commit(outcome)
    if outcome.failed:
        raise _first_error(outcome)
    return result


def memory_per_task(client: Any) -> int | None:
    """Bytes that one task may use: the smallest worker's memory limit, shared by its threads; None without a limit.

    Raises
    ------
    ClusterError
        If no worker arrives within a minute.
    """
    try:
        client.wait_for_workers(1, timeout=SECONDS_FOR_WORKERS)
    except TimeoutError as error:
        raise ClusterError(
            f"no worker arrived within {SECONDS_FOR_WORKERS} s: start workers for this scheduler, or check the queue"
        ) from error
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    limits = [worker["memory_limit"] // worker["nthreads"] for worker in workers if worker["memory_limit"]]
    return min(limits, default=None)


def _execute(tasks: tuple[Task, ...], client: Any, *, progress: bool) -> Outcome:
    from distributed import as_completed

    run_id = uuid4().hex[:8]
    window = WINDOW * max(1, sum(client.nthreads().values()))
    by_key: dict[str, Task] = {}
    futures: dict[str, Any] = {}
    # tasks yet to be submitted that need a task: at none its future is let go, and the scheduler forgets its key
    wanted = Counter(name for task in tasks for name in task.requires)
    done: set[str] = set()
    failed: dict[str, BaseException] = {}
    waiting = iter(tasks)
    completed = as_completed(loop=client.loop)  # else it would ask for the default client, which may be another
    in_flight = 0

    def submit() -> bool:
        task = next(waiting, None)
        if task is None:
            return False
        needs = [futures[name] for name in task.requires]
        future = client.submit(run_task, task, *needs, key=f"{task.name}-{run_id}", pure=False)
        for name in task.requires:
            wanted[name] -= 1
            if not wanted[name] and futures[name].done():
                del futures[name]
        futures[task.name] = future
        by_key[future.key] = task
        completed.add(future)
        return True

    with Progress(tasks, enabled=progress) as bars:
        while in_flight < window and submit():
            in_flight += 1
        for future in completed:
            task = by_key.pop(future.key)
            in_flight -= 1
            if not wanted[task.name]:
                del futures[task.name]
            if future.status == "finished":
                done.add(task.name)
                bars.advance(task)
            else:
                failed[task.name] = future.exception()
            while in_flight < window and submit():
                in_flight += 1
    return Outcome(frozenset(done), failed)


def _first_error(outcome: Outcome) -> BaseException:
    name, error = next(iter(outcome.failed.items()))
    if isinstance(error, LlokiAtlasError):
        return error
    if type(error).__name__ in ("KilledWorker", "CancelledError", "FutureCancelledError"):
        return ClusterError(
            f"{name} lost its workers again and again ({len(outcome.failed)} tasks failed): give workers more memory, "
            "then run again; what was done is kept"
        )
    return error
