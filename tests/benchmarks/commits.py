"""Many processes commit to one catalog at once, while others read it.

    python -m tests.benchmarks.commits [--processes 8] [--commits 25] [--where folder bucket] [--json]

Every process opens the catalog once and commits its slices as fast as it can. Two readers open the head again and
again meanwhile: every version that they see has to be whole (all objects complete, the slices of all versions before).
`bucket` is a real S3 server on loopback (moto, which the extra `dev` brings) behind a lock for conditional requests;
half of the answers to the first creations are lost on purpose. Counted: versions, lost commits, readings, and readings
that saw a part of a version. Seconds are those of all commits together.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from typing import Any

from lloki_atlas.store.catalog import history, open_catalog, verify
from lloki_atlas.store.objects import is_complete
from lloki_atlas.store.records import split_name
from tests.support.s3 import Bucket, s3_server
from tests.support.stores import commit_in_process, tiny_catalog


def read_in_process(root: str, stop: Any, results: Any) -> None:
    """Open the head until told to stop; puts how often, and how often something was missing."""
    readings = partial = 0
    while not stop.is_set():
        catalog = open_catalog(root)
        whole = len(catalog.state.slices) == catalog.version - 1
        whole = whole and all(is_complete(catalog.path(*split_name(name))) for name in catalog.state.references())
        readings, partial = readings + 1, partial + (not whole)
    results.put((readings, partial))


def measure(root: str, processes: int, commits: int) -> dict[str, Any]:
    """Commit from so many processes at once; what came of it."""
    tiny_catalog(root)
    context = multiprocessing.get_context("spawn")
    start, stop = context.Barrier(processes + 1), context.Event()
    written, read = context.Queue(), context.Queue()
    writers = [
        context.Process(target=commit_in_process, args=(root, number, start, written, commits))
        for number in range(processes)
    ]
    readers = [context.Process(target=read_in_process, args=(root, stop, read)) for _ in range(2)]
    for process in [*writers, *readers]:
        process.start()
    start.wait()
    started = time.perf_counter()
    acknowledged = [version for _ in writers for version in written.get(timeout=3600)]
    seconds = time.perf_counter() - started
    stop.set()
    readings = [read.get(timeout=600) for _ in readers]
    for process in [*writers, *readers]:
        process.join()
    head = open_catalog(root)
    expected = {f"w{number}-{step}" for number in range(processes) for step in range(commits)}
    return {
        "versions": head.version - 1,
        "acknowledged": len(set(acknowledged)),
        "lost": len(expected - set(head.state.slices)) + len(set(acknowledged) - {r.version for r in history(head)}),
        "readings": sum(count for count, _ in readings),
        "partial_readings": sum(count for _, count in readings),
        "problems": len(verify(head)),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--commits", type=int, default=25)
    parser.add_argument("--where", nargs="+", choices=["folder", "bucket"], default=["folder", "bucket"])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    report = {}
    if "folder" in given.where:
        with tempfile.TemporaryDirectory() as folder:
            report["folder"] = measure(f"{folder}/atlas", given.processes, given.commits)
    if "bucket" in given.where:
        with s3_server() as endpoint:
            bucket = Bucket(endpoint)
            os.environ.update(bucket.environment)
            half = [{"kind": kind, "method": "PUT", "match": "versions/", "conditional": True} for kind in ("lose", "")]
            bucket.faults(*half * (given.processes * given.commits // 4))
            report["bucket"] = measure(f"{bucket}/atlas", given.processes, given.commits)
    for where, row in report.items():
        print(where, *(f"{key}: {value}" for key, value in row.items()), sep="\n  ")
    if given.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
