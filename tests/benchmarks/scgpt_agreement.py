"""Agreement of scGPT's embedding with the `scgpt` package on real cells, for one checkpoint.

    python -m tests.benchmarks.scgpt_agreement --checkpoint DIR [--cells 400] [--json]

Cells of STARmap and MERFISH VISp after LLOKI-FP, as an atlas embeds them, of which those are taken whose values are all
different: the package draws the bins of equal ones at random. Each precision twice: with products of its type, emulated
where the processor has none, and with float32 products of the rounded weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from lloki_atlas import fit_reference, propagate_slice
from lloki_atlas.models import scgpt
from tests.benchmarks.departures import DATA, MOP, load_slice
from tests.benchmarks.pretraining import values
from tests.support.scgpt_oracle import embed_with_package

NAMES = ("STARmap BZ5", "VISp")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=400, help="most cells of a slice")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    profile = fit_reference(DATA / f"{MOP}.h5ad", organism="mouse")
    found: list[dict[str, Any]] = []
    for name in NAMES:
        slice_ = propagate_slice(load_slice(name), profile, slice_id=name)
        rows, genes = values(slice_, "diffused"), list(slice_.var_names)
        present = np.count_nonzero(rows, axis=1)
        distinct = np.array([len(np.unique(row[row != 0])) for row in rows])
        rows = rows[(present > 1) & (distinct == present)][: given.cells]
        theirs = embed_with_package(given.checkpoint, rows, genes)
        for precision in ("float32", "bfloat16", "float16"):
            for products in (True, False):
                with mock.patch.object(scgpt, "_multiplies", lambda *_, products=products: products):
                    model = scgpt.load_scgpt(given.checkpoint, device="cpu", precision=precision)
                ours = model.embed(rows, genes)
                found.append(
                    {
                        "slice": name,
                        "cells": len(rows),
                        "precision": precision,
                        "products": str(model.dtype).removeprefix("torch."),
                        "max_difference": float(np.abs(ours - theirs).max()),
                        "min_cosine": float((ours * theirs).sum(axis=1).min()),
                    }
                )
                print(found[-1], flush=True)
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
