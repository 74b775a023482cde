"""Run a plan on Dask: any `distributed.Client`, or a local cluster made for the run. The only module that knows Dask.

Tasks are opaque and small in number (one per slice or tile and stage), their results are their names, and Dask keeps
the order among them. At most `WINDOW` unfinished tasks per worker thread are submitted at a time, so that a scheduler
never holds an atlas of keys.

A worker that offers the resource `GPU` is a GPU worker. Where a run finds one, its device tasks go to GPU workers
alone, one at a time each, before anything else; a GPU worker without a device task takes the others. Where it finds
none, device tasks run like all others. Dask waits for ever for a resource that nobody offers any more: a run does not.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from queue import Empty, SimpleQueue
from typing import Any
from uuid import uuid4

from lloki_atlas.engine.devices import HOST_THREADS, VISIBLE, visible_gpus
from lloki_atlas.engine.plan import Outcome, Plan, Task, run_task, split_tiles
from lloki_atlas.engine.progress import Progress
from lloki_atlas.errors import ClusterError, LlokiAtlasError

GPU = "GPU"
WINDOW = 16
SECONDS_FOR_WORKERS = 60
SECONDS_BETWEEN_LOOKS = 1.0
# of the machine's memory, a GPU worker gets as many shares, another worker one: tiles wait for the device in it
GPU_SHARES = 2
# Dask's own default also sets MALLOC_TRIM_THRESHOLD_, which makes glibc give every large array back to the kernel at
# once; training then spends half of its time in page faults
WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": 1, "MKL_NUM_THREADS": 1, "OPENBLAS_NUM_THREADS": 1}


@contextmanager
def local_client(n_workers: int | None = None, n_gpus: int | None = None) -> Iterator[Any]:
    """Make a local cluster of single-threaded worker processes, and take it down at the end.

    Parameters
    ----------
    n_workers
        Worker processes, those with a GPU among them; one per core when None.
    n_gpus
        Workers with a GPU each, if need be more than `n_workers`; one for each GPU of the machine when None. No other
        worker sees a GPU.

    Raises
    ------
    ClusterError
        If the machine has fewer GPUs.
    """
    import dask
    from distributed import Client, Scheduler, SpecCluster

    gpus = visible_gpus()
    if n_gpus is not None and n_gpus > len(gpus):
        raise ClusterError(
            f"{n_gpus} GPU workers are asked for and this machine shows {len(gpus)} GPUs: ask for fewer, or check "
            f"the driver and {VISIBLE}"
        )
    options = {"host": "127.0.0.1", "protocol": "tcp://"}
    with (
        dask.config.set(
            {
                "distributed.comm.timeouts.connect": "60s",
                "distributed.nanny.pre-spawn-environ": WORKER_ENVIRONMENT,
            }
        ),
        SpecCluster(
            # any free ports: several runs may share a machine
            scheduler={"cls": Scheduler, "options": {**options, "port": 0, "dashboard_address": "127.0.0.1:0"}},
            workers=_local_workers(n_workers or os.cpu_count() or 1, gpus[:n_gpus], options),
            silence_logs=50,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def _local_workers(n_workers: int, gpus: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    from distributed import Nanny
    from distributed.worker_memory import parse_memory_limit

    n_others = max(n_workers - len(gpus), 0)
    n_shares = n_others + GPU_SHARES * len(gpus)

    def worker(shares: int, environment: dict[str, Any], **more: Any) -> dict[str, Any]:
        memory = parse_memory_limit("auto", shares, n_shares, logger=logging.getLogger("distributed"))
        quiet = {"dashboard": False, "dashboard_address": None, "silence_logs": 50}
        common = {**options, **quiet, "nthreads": 1, "memory_limit": memory, "env": environment}
        return {"cls": Nanny, "options": {**common, **more}}

    workers = {f"cpu-{number}": worker(1, {VISIBLE: ""}) for number in range(n_others)}
    for number, gpu in enumerate(gpus):
        environment = {VISIBLE: gpu, HOST_THREADS: max(1, (os.cpu_count() or 1) // len(gpus))}
        workers[f"gpu-{number}"] = worker(GPU_SHARES, environment, resources={GPU: 1})
    return workers


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


def run_plan(plan: Plan, client: Any, *, progress: bool, n_workers: int | None, n_gpus: int | None = None) -> Any:
    """Run the tasks of a plan and commit what they made.

    Raises
    ------
    MemoryBudgetError
        Before anything starts, when a task is projected not to fit in a worker.
    ClusterError
        When there are no workers, a task killed its workers, or all GPU workers were lost for good.
    LlokiAtlasError
        The first error of a task, after everything that could be done was done and committed.
    """
    if not plan.tasks:
        return plan.commit(Outcome(frozenset(), {}))
    with nullcontext(client) if client is not None else local_client(n_workers, n_gpus) as used:
        memory = memory_per_task(used)
        on_gpus = has_gpu_workers(used, n_gpus)
        plan.validate(memory, memory_per_device_task=memory_per_task(used, on_gpus=True) if on_gpus else None)
        # without a GPU, tiles are shared among all workers
        outcome = _execute(plan.tasks if on_gpus else split_tiles(plan.tasks), used, progress=progress, on_gpus=on_gpus)
    result = plan.commit(outcome)
    if outcome.failed:
        raise _first_error(outcome)
    return result


def memory_per_task(client: Any, *, on_gpus: bool = False) -> int | None:
    """Bytes that one task may use: the smallest worker's memory limit, shared by its threads; None without a limit.

    Parameters
    ----------
    client
        A `distributed.Client`.
    on_gpus
        Whether the task runs on GPU workers alone.

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
    workers = [worker for worker in _workers(client) if _offers_gpu(worker) or not on_gpus]
    limits = [worker["memory_limit"] // worker["nthreads"] for worker in workers if worker["memory_limit"]]
    return min(limits, default=None)


def has_gpu_workers(client: Any, n_gpus: int | None) -> bool:
    """Tell whether device tasks go to GPU workers: where there are any, or at once those that are asked for.

    Raises
    ------
    ClusterError
        If fewer than `n_gpus` GPU workers arrive within a minute.
    """
    if n_gpus == 0:
        return False
    end = time.monotonic() + SECONDS_FOR_WORKERS
    while (found := sum(map(_offers_gpu, _workers(client)))) < (n_gpus or 0):
        if time.monotonic() >= end:
            raise ClusterError(
                f"{found} of {n_gpus} GPU workers arrived within {SECONDS_FOR_WORKERS} s: start workers with "
                f'--resources "{GPU}=1", or ask for fewer'
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return found > 0


def _workers(client: Any) -> list[dict[str, Any]]:
    return list(client.scheduler_info(n_workers=-1)["workers"].values())


def _offers_gpu(worker: dict[str, Any]) -> bool:
    return bool((worker.get("resources") or {}).get(GPU, 0) >= 1)


def _execute(tasks: tuple[Task, ...], client: Any, *, progress: bool, on_gpus: bool) -> Outcome:
    run = _Run(tasks, client, on_gpus=on_gpus)
    with Progress(tasks, enabled=progress) as bars:
        run.submit()
        while run.unfinished:
            try:
                future = run.finished.get(timeout=SECONDS_BETWEEN_LOOKS)
            except Empty:
                run.look_for_gpus()
                continue
            task = run.settle(future)
            if task.name in run.done:
                bars.advance(task)
            run.submit()
    return Outcome(frozenset(run.done), run.failed)


class _Run:
    """Tasks of one run between the plan and the scheduler: a window of them is unfinished at a time."""

    def __init__(self, tasks: tuple[Task, ...], client: Any, *, on_gpus: bool) -> None:
        self._client, self._on_gpus, self._id = client, on_gpus, uuid4().hex[:8]
        self._window = WINDOW * max(1, sum(client.nthreads().values()))
        self._waiting = iter(tasks)
        # tasks yet to be submitted that need a task: at none its future is let go, and the scheduler forgets its key
        self._wanted = Counter(name for task in tasks for name in task.requires)
        self._futures: dict[str, Any] = {}
        self._no_gpu_since: float | None = None
        self._no_gpu: ClusterError | None = None
        self.unfinished: dict[str, Task] = {}  # by key
        self.finished: SimpleQueue[Any] = SimpleQueue()
        self.done: set[str] = set()
        self.failed: dict[str, BaseException] = {}

    def submit(self) -> None:
        """Submit tasks until the window is full."""
        while len(self.unfinished) < self._window and (task := next(self._waiting, None)) is not None:
            self._wanted.subtract(task.requires)
            error = next((self.failed[name] for name in task.requires if name in self.failed), None)
            if error is None and task.device:
                error = self._no_gpu
            if error is None:
                self._submit(task)
            else:
                self.failed[task.name] = error
            self._let_go(task.requires)

    def _submit(self, task: Task) -> None:
        wishes = {"resources": {GPU: 1}, "priority": 1} if task.device and self._on_gpus else {}
        needs = [self._futures[name] for name in task.requires]
        future = self._client.submit(run_task, task, *needs, key=f"{task.name}-{self._id}", pure=False, **wishes)
        self._futures[task.name] = future
        self.unfinished[future.key] = task
        future.add_done_callback(self.finished.put)

    def _let_go(self, names: tuple[str, ...]) -> None:
        for name in names:
            if not self._wanted[name] and name in self._futures and self._futures[name].done():
                del self._futures[name]

    def settle(self, future: Any) -> Task:
        """Note how a task ended."""
        task = self.unfinished.pop(future.key)
        self._no_gpu_since = None
        if future.status == "finished":
            self.done.add(task.name)
        elif self._no_gpu is not None and future.cancelled():
            self.failed[task.name] = self._no_gpu
        else:
            self.failed[task.name] = future.exception()
        self._let_go((task.name,))
        return task

    def look_for_gpus(self) -> None:
        """Cancel the device tasks when nothing happened, and no GPU worker was there, for a minute.

        Called while nothing happens; tasks that need no device go on.
        """
        tasks = [task for task in self.unfinished.values() if task.device] if self._on_gpus else []
        ready = any(self.done.issuperset(task.requires) for task in tasks)
        if not ready or any(map(_offers_gpu, _workers(self._client))):
            self._no_gpu_since = None
            return
        now = time.monotonic()
        self._no_gpu_since = self._no_gpu_since or now
        if now - self._no_gpu_since >= SECONDS_FOR_WORKERS:
            self._no_gpu = ClusterError(
                f"every GPU worker was gone for {SECONDS_FOR_WORKERS} s while {tasks[0].name} waited for one: start "
                "GPU workers and run again, or run with --gpus 0; what was done is kept"
            )
            self._client.cancel([self._futures[task.name] for task in tasks])


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
