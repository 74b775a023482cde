"""What the space of the neighbour search does to votes across technologies, in the 512-d space.

    python -m tests.benchmarks.graph_space [MANIFEST] [--json]

Builds the manifest (catalogs/mouse-cortex.toml) up to the 512-d embedding in temporary folders: without diffusion
(alpha 0), with neighbours searched on counts (as published), and in the scaled space (the default).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lloki_atlas import build
from lloki_atlas.stages.manifest import read_manifest
from lloki_atlas.store.arrays import read_arrays
from lloki_atlas.store.catalog import Catalog
from tests.benchmarks.votes import votes_in

VARIANTS: dict[str, dict[str, Any]] = {
    "no diffusion": {"alpha": 0.0},
    "counts": {"graph_space": "counts"},
    "scaled": {"graph_space": "scaled"},
}


def cells_with_budget(catalog: Catalog) -> dict[str, float]:
    """Share of cells per slice that may fill in at least one gene."""
    shares = {}
    for name, record in sorted(catalog.state.slices.items()):
        budget = read_arrays(catalog.path("graphs", record.objects["propagate"]), ["budget"])["budget"]
        shares[name] = float(np.mean(budget > 0))
    return shares


def main() -> None:
    """Build the variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", nargs="?", default="catalogs/mouse-cortex.toml")
    parser.add_argument("--label-key", default="cell_type_coarse")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    described = read_manifest(arguments.manifest)
    votes, budgets = {}, {}
    for name, settings in VARIANTS.items():
        config = replace(described.config, propagation=replace(described.config.propagation, **settings))
        with tempfile.TemporaryDirectory() as folder:
            catalog = build(
                replace(described, config=config), root=Path(folder) / "atlas", until="embed", progress=False
            )
            votes[name] = votes_in(catalog, "X_fp", arguments.label_key)
            budgets = cells_with_budget(catalog)
    if arguments.json:
        print(json.dumps({"votes": votes, "cells_with_budget": budgets}))
    else:
        print(pd.DataFrame(votes).T.round(3).to_string())
        print("\nshare of cells that may fill in a gene:")
        print(pd.Series(budgets).round(4).to_string())


if __name__ == "__main__":
    main()
