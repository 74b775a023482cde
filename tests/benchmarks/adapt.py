"""A technology joins a finished atlas: adapting its token alone beside training the autoencoder on all slices.

    python -m tests.benchmarks.adapt [MANIFEST] [--hold-out TECHNOLOGY ...] [--json]

Builds the manifest (catalogs/mouse-cortex.toml) up to the 512-d embedding in a temporary folder. For each technology
with labels, or those that are named: the autoencoder is trained without its slices, the slices join, and the atlas is
adapted to them. Printed is how the nearest cells of the other technologies vote for the type of the held-out cells
(balanced accuracy, as in tests/benchmarks/votes.py): in the 512-d space, with the autoencoder trained on all, with the
adapted token; the seconds of either; what was measured of the token; and the files of embeddings and models whose bytes
adapting changed, which has to be none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

from lloki_atlas import adapt_autoencoder, adaptation_report, build, run, select_cells
from lloki_atlas.store.catalog import Catalog, commit, open_catalog
from lloki_atlas.store.records import Change
from tests.benchmarks.votes import NO_LABEL, votes_in


def labelled_technologies(catalog: Catalog, label_key: str) -> list[str]:
    """Technologies with at least one labelled cell."""
    cells = select_cells(catalog).to_dataframe()
    return sorted(cells.loc[~cells[label_key].astype(str).isin(NO_LABEL), "technology"].unique())


def digests(catalog: Catalog) -> dict[str, str]:
    """SHA-256 of every file of an embedding or a model."""
    files = [path for kind in ("embeddings", "models") for path in (catalog.root / kind).rglob("*") if path.is_file()]
    return {str(path.relative_to(catalog.root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def copied(catalog: Catalog, folder: Path) -> Catalog:
    """A copy to change."""
    shutil.copytree(catalog.root, folder)
    return open_catalog(folder, mode="r+")


def timed_run(catalog: Catalog) -> tuple[Catalog, float]:
    """Train on all slices there are and encode them."""
    started = time.perf_counter()
    return run(catalog, progress=False), time.perf_counter() - started


def hold_out(embedded: Catalog, technology: str, folder: Path, label_key: str) -> dict[str, Any]:
    """Train without a technology, adapt to it, and compare."""
    catalog = copied(embedded, folder)
    slices = {name: record for name, record in catalog.state.slices.items() if record.technology == technology}
    without = commit(catalog, Change(slices=dict.fromkeys(slices)), message=f"without {technology}")
    base, training = timed_run(without)
    before = digests(base)
    joined = commit(base, Change(slices=slices), message=f"{technology} joins")
    started = time.perf_counter()
    done = adapt_autoencoder(joined, technology=technology, progress=False)
    adapting = time.perf_counter() - started
    after = digests(done)
    (evidence,) = adaptation_report(done, technology)[:1]
    return {
        "votes_adapted": votes_in(done, "X_lloki", label_key)[technology],
        "seconds_training": round(training, 1),
        "seconds_adapting": round(adapting, 1),
        "changed_files": sorted(name for name, digest in before.items() if after.get(name) != digest),
        "old_files": len(before),
        **{name: value for name, value in evidence.items() if isinstance(value, float)},
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", nargs="?", default="catalogs/mouse-cortex.toml")
    parser.add_argument("--hold-out", action="append", metavar="TECHNOLOGY")
    parser.add_argument("--label-key", default="cell_type_coarse")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        embedded = build(arguments.manifest, root=folder / "embedded", until="embed", progress=False)
        joint, seconds = timed_run(copied(embedded, folder / "joint"))
        scores = {name: votes_in(joint, name, arguments.label_key) for name in ("X_fp", "X_lloki")}
        rows = {}
        for number, technology in enumerate(arguments.hold_out or labelled_technologies(embedded, arguments.label_key)):
            rows[technology] = {
                "votes_512": scores["X_fp"][technology],
                "votes_joint": scores["X_lloki"][technology],
                "seconds_joint": round(seconds, 1),
                **hold_out(embedded, technology, folder / f"held-out-{number}", arguments.label_key),
            }
    if arguments.json:
        print(json.dumps(rows))
        return
    table = pd.DataFrame(rows)
    table.loc["changed_files"] = [len(files) for files in table.loc["changed_files"]]
    print(table.map(lambda value: round(value, 3)).to_string())


if __name__ == "__main__":
    main()
