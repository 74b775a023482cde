"""Which cells have an embedding?

    python -m tests.benchmarks.coverage ROOT [--json]

Counts, per slice, cells with a count in a shared gene, cells with a finite and non-zero 128-d embedding, and names
the cells without one.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from lloki_atlas import open_catalog, select_cells
from lloki_atlas.store.arrays import read_arrays


def main() -> None:
    """Print one line a slice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    catalog = open_catalog(arguments.root)
    report = {}
    for name, record in sorted(catalog.state.slices.items()):
        shared = read_arrays(catalog.path("statistics", record.objects["tile"]), ["nonzeros"])["nonzeros"] > 0
        cells = select_cells(catalog, slices=[name])
        latent = cells.embedding("X_lloki")
        embedded = np.isfinite(latent).all(axis=1) & (np.nan_to_num(latent) != 0).any(axis=1)
        report[name] = {
            "cells": record.n_cells,
            "with shared genes": int(shared.sum()),
            "embedded": int(embedded.sum()),
            "embedded of those": int((embedded & shared).sum()),
            "without": cells.to_dataframe()["cell"][~embedded].tolist(),
        }
    if arguments.json:
        print(json.dumps(report))
        return
    for name, row in report.items():
        missing = ", ".join(row["without"][:5]) or "none"
        print(
            f"{name}: {row['embedded of those']} of {row['with shared genes']} (of {row['cells']}); without: {missing}"
        )


if __name__ == "__main__":
    main()
