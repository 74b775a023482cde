"""Kill the writer of a small atlas at its write points, and count what is lost.

    python -m tests.benchmarks.kills [--kills 500] [--seed 0] [--steps run,train] [--power] [--json]

A kill is a SIGKILL just before a call to the system that changes the catalog (opening a file to write it, fsync,
rename, link, unlink, mkdir, rmdir), or when half of a file is written. Kills are spread evenly over the names of these
calls and over the repetitions of each. After each, the catalog has to open, hold every version whose commit had
returned, and be whole; the reader of the version before has to read the same bytes; the same step taken again has to
lead to the bytes that it leads to undisturbed. With `--power` the machine's power fails as well: what was not synced
to the disk is empty, or never happened. With `--json` the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

# as in a worker; it has to be there before the libraries load
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support.kill_steps import STEPS
from tests.support.kills import Kill, Result, Rig, of_endings, spread
from tests.support.write_points import KILLS, POWER

COUNTS = ("kills", "survived", "lost", "unreadable", "differing", "strange", "failed")


def main() -> None:
    """Kill and print a table by point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--power", action="store_true")
    parser.add_argument("--only", help="a single kill, as it is printed where something is wrong")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run(
            Path(folder),
            n_kills=arguments.kills,
            seed=arguments.seed,
            steps=arguments.steps.split(","),
            endings=POWER if arguments.power else KILLS,
            only=arguments.only,
        )
    print(table(report["points"]))
    if arguments.json:
        print(json.dumps(report))
    sys.exit(bool(report["problems"]))


def run(
    folder: Path, *, n_kills: int, seed: int, steps: list[str], endings: tuple[str, ...], only: str | None = None
) -> dict[str, Any]:
    """Make the atlas, list its points, kill; counts by point and in all."""
    started = time.perf_counter()
    rig = Rig(folder, steps)
    points = {step: of_endings(rig.points(step), endings) for step in steps}
    kills = spread(points, n_kills, seed=seed)
    if only is not None:
        kills = [kill for step in steps for point in points[step] if str(kill := Kill(step, point)) == only]
    prepared = time.perf_counter() - started
    by_point: dict[str, Counter[str]] = {}
    problems = []
    for number, kill in enumerate(kills):
        result = rig.kill(kill)
        counts = counted(result)
        by_point.setdefault(f"{kill.point.name}, {kill.point.ending}", Counter()).update(counts)
        if not result.is_well:
            problems.append(described(result))
            print(problems[-1], file=sys.stderr, flush=True)
        if number % 25 == 24:
            print(f"{number + 1} of {len(kills)} kills, {len(problems)} problems", file=sys.stderr, flush=True)
    total: Counter[str] = Counter()
    for counts in by_point.values():
        total.update(counts)
    return {
        "seed": seed,
        "steps": {step: len(points[step]) for step in steps},
        "kills_by_step": dict(Counter(kill.step for kill in kills)),
        "n_points": sum(map(len, points.values())),
        "n_names": len({(p.name, p.ending) for listed in points.values() for p in listed}),
        "total": {name: total[name] for name in COUNTS},
        "points": {name: {key: by_point[name][key] for key in COUNTS} for name in sorted(by_point)},
        "problems": problems,
        "seconds_to_prepare": round(prepared, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def counted(result: Result) -> dict[str, int]:
    """How many kills, and how many of them ended in which way."""
    found = result.findings
    return {
        "kills": 1,
        "survived": int(not result.killed),
        "lost": int(bool(found.lost)),
        "unreadable": int(bool(found.unreadable)),
        "differing": int(bool(found.differing)),
        "strange": int(bool(found.strange)),
        "failed": int(bool(result.error)),
    }


def described(result: Result) -> str:
    """Say what came of a kill, in a line."""
    found = result.findings
    parts = [*found.lost, *found.unreadable, *found.differing, *found.strange, *([result.error] * bool(result.error))]
    return f"{result.kill} => {'; '.join(parts) or 'was not killed'}"


def table(points: dict[str, dict[str, int]]) -> str:
    """Counts by point, as text."""
    width = max(map(len, points), default=0)
    lines = [f"{'':{width}} " + " ".join(f"{name:>10}" for name in COUNTS)]
    total = {name: sum(counts[name] for counts in points.values()) for name in COUNTS}
    for name, counts in {**points, "all": total}.items():
        lines.append(f"{name:{width}} " + " ".join(f"{counts[key]:>10}" for key in COUNTS))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
