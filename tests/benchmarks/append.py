"""What a slice more costs an atlas of ten and one of a thousand, and how long the large one takes to open.

    python -m tests.benchmarks.append [--slices 10 1000] [--cells 500] [--rounds 16] [--json]

Ten simulated slices are ingested and run once. An atlas of more holds them again under other ids: their objects are
hard links to the same bytes, in folders of the keys that they would have, committed 64 slices at a time. So every
object is there, every key is the one that is expected, and nothing is left to run.

Appending is ingesting a source and a run of the whole atlas to the 128-d embedding, on a local cluster of one worker
that is there already and has done it before; the atlases take turns. What opening the catalog costs before is given by
itself (`opening_`) and added (`all_`), since it is what reads the list of all slices. Bytes are those that the driver
and the worker passed to and from the system (`rchar`, `wchar` of /proc), cached or not. Every sixteenth version of a
catalog holds that list, too, so sixteen rounds of two versions have their share of them: bytes are compared by their
mean, seconds by their median, and the worst is given beside them. Opening is also measured in processes of its own,
with the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from lloki_atlas.config import AtlasConfig, AutoencoderConfig, canonical_json, digest
from lloki_atlas.engine.cluster import local_client
from lloki_atlas.simulation import simulate
from lloki_atlas.stages.create import create_catalog
from lloki_atlas.stages.ingest import ingest
from lloki_atlas.stages.lineage import expectation
from lloki_atlas.stages.pipeline import run
from lloki_atlas.store.catalog import Catalog, commit, open_catalog
from lloki_atlas.store.objects import Receipt, is_complete, read_receipt, receipt_path
from lloki_atlas.store.records import STAGE_KINDS, Change, SliceRecord

FIRST_SLICES = 10
BATCH = 64
OPENINGS = 5
CONFIG = AtlasConfig(autoencoder=AutoencoderConfig(n_epochs=1))
_OPEN = """
import sys, time
start = time.perf_counter()
import lloki_atlas
catalog = lloki_atlas.open_catalog(sys.argv[1])
seconds = time.perf_counter() - start
(peak,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, peak.split()[1], len(catalog.state.slices))
"""


def main() -> None:
    """Make the atlases, append, open, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, nargs=2, default=[10, 1000], help="of the small and the large atlas")
    parser.add_argument("--cells", type=int, default=500, help="of a slice")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        report = measure(Path(folder), *arguments.slices, cells=arguments.cells, rounds=arguments.rounds)
    for name, part in report.items():
        print(f"{name}: {json.dumps(part)}")
    if arguments.json:
        print(json.dumps(report))


def measure(folder: Path, small: int, large: int, *, cells: int, rounds: int) -> dict[str, Any]:
    """Make both atlases, append to both in turn, open both."""
    sources = simulate(folder / "sources", n_cells=(FIRST_SLICES + 1) * cells, n_slices=FIRST_SLICES + 1).parent
    paths = sorted(path for path in sources.glob("*.h5ad") if path.name != "reference.h5ad")
    # the one that is appended has the panel of the first
    first, added = paths[: FIRST_SLICES + 1], paths[0]
    with local_client(1, 0) as client:
        catalog = create_catalog(
            folder / "first", reference=sources / "reference.h5ad", organism="mouse", config=CONFIG
        )
        for path in first[:FIRST_SLICES]:
            catalog = _ingest(catalog, path, path.stem)
        run(catalog, client=client, progress=False)
        roots = {}
        for name, n_slices in (("warm", FIRST_SLICES), ("small", small), ("large", large)):
            started = time.perf_counter()
            roots[name] = grown(folder / "first", folder / name, n_slices)
            print(f"{name}: {n_slices} slices, made in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        append(roots["warm"], added, "warm", client)
        costs: dict[str, list[dict[str, float]]] = {"small": [], "large": []}
        for number in range(rounds):
            order = ("small", "large") if number % 2 else ("large", "small")
            for name in order:
                costs[name].append(append(roots[name], added, f"added_{number}", client))
    report: dict[str, Any] = {name: summary(part) for name, part in costs.items()}
    report["ratio"] = {
        f"{prefix}{name} ({kind})": _ratio(report, f"{prefix}{name}", kind)
        for prefix in ("", "all_")
        for name, kinds in (
            ("seconds", ("median", "least")),
            ("bytes_read", ("mean", "most")),
            ("bytes_written", ("mean", "most")),
        )
        for kind in kinds
    }
    report["opening"] = {name: opening(roots[name]) for name in ("small", "large")}
    return report


def append(root: Path, source: Path, slice_id: str, client: Any) -> dict[str, float]:
    """Append a slice to an atlas: seconds and bytes of opening it, and of what follows."""
    marks = [(time.perf_counter(), *_bytes(client))]
    catalog = open_catalog(root, mode="r+")
    marks.append((time.perf_counter(), *_bytes(client)))
    catalog = _ingest(catalog, source, slice_id)
    catalog = run(catalog, client=client, progress=False)
    marks.append((time.perf_counter(), *_bytes(client)))
    if "integrate" not in catalog.slice(slice_id).objects:
        raise RuntimeError(f"{slice_id} was not encoded")
    names = ("seconds", "bytes_read", "bytes_written")
    opened, ended = ([after - before for before, after in zip(*pair, strict=True)] for pair in pairwise(marks))
    return {
        **dict(zip(names, ended, strict=True)),
        **{f"opening_{name}": value for name, value in zip(names, opened, strict=True)},
        **{f"all_{name}": first + second for name, first, second in zip(names, opened, ended, strict=True)},
    }


def summary(costs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, median, least and most of every cost."""
    report = {}
    for name in costs[0]:
        values = [cost[name] for cost in costs]
        kinds: dict[str, Callable[[list[float]], float]] = {"mean": fmean, "median": median, "least": min, "most": max}
        report[name] = {kind: round(function(values), 4) for kind, function in kinds.items()}
    return report


def opening(root: Path) -> dict[str, float]:
    """Import and open in a process of its own: the least of several."""
    found = []
    for _ in range(OPENINGS):
        done = subprocess.run([sys.executable, "-c", _OPEN, str(root)], capture_output=True, text=True, check=True)
        seconds, kilobytes, _ = done.stdout.split()
        found.append((float(seconds), int(kilobytes) / 1024))
    return {"seconds": round(min(found)[0], 3), "resident_mb": round(max(part[1] for part in found), 1)}


def grown(first: Path, root: Path, n_slices: int) -> Path:
    """Copy an atlas that is finished, and let it hold its slices again until there are so many."""
    shutil.copytree(first, root, copy_function=os.link)
    catalog = open_catalog(root, mode="r+")
    originals = [catalog.state.slices[name] for name in sorted(catalog.state.slices)]
    expected = expectation(catalog)
    records: dict[str, SliceRecord] = {}
    for number in range(len(originals), n_slices):
        original = originals[number % len(originals)]
        slice_id = f"slice_{number:05d}"
        key = digest({"again": number, "of": original.objects["ingest"]})
        record = replace(original, slice_id=slice_id, objects={"ingest": key})
        keys, _ = expected(record)
        for stage, made in keys.items():
            kind = STAGE_KINDS[stage]
            _link(catalog.path(kind, original.objects[stage]), catalog.path(kind, made))
        records[slice_id] = replace(record, objects=keys)
        if len(records) == BATCH or number == n_slices - 1:
            catalog = commit(catalog, Change(slices=records), message=f"{len(records)} slices again")
            records = {}
    return root


def _link(original: Any, path: Any) -> None:
    if is_complete(path):
        return
    shutil.copytree(original, path, copy_function=os.link)
    receipt = read_receipt(original)
    receipt_path(path).write_bytes(canonical_json(Receipt(path.name, receipt.lineage, receipt.files).to_json()))


def _ingest(catalog: Catalog, path: Path, slice_id: str) -> Catalog:
    technology = path.stem.rpartition("_")[0]
    return ingest(
        catalog, path, slice_id=slice_id, technology=technology, organism="mouse", coordinate_unit="micrometer"
    )


def _bytes(client: Any) -> tuple[int, int]:
    parts = [_own_bytes(), *client.run(_own_bytes).values()]
    return sum(part[0] for part in parts), sum(part[1] for part in parts)


def _own_bytes() -> tuple[int, int]:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"]), int(lines["wchar"])


def _ratio(report: dict[str, Any], name: str, kind: str) -> float:
    return round(report["large"][name][kind] / report["small"][name][kind], 3)


if __name__ == "__main__":
    main()
