"""What LLOKI-FP did to each slice of a catalog: its sparsity, how propagation ended, what the searches found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lloki_atlas.errors import NotFoundError
from lloki_atlas.stages.sparsity import sparsity_report
from lloki_atlas.store.arrays import read_arrays
from lloki_atlas.store.catalog import Catalog

_GRAPH = ["target_nonzeros", "achieved_nonzeros", "n_iterations", "relative_change", "recall", "bandwidth_um"]


def propagation_report(catalog: Catalog, *, slices: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Report how every slice came through LLOKI-FP.

    Parameters
    ----------
    catalog
        An opened catalog.
    slices
        Slice ids; all slices that have a graph when None.

    Returns
    -------
    One table per slice: `slice_id`; `sparsity`, see `sparsity_report`; `n_iterations` and `relative_change` of
    propagation; `recall` of the two neighbour searches (1 when exact); `bandwidth_um`, σ of the two graphs.

    Raises
    ------
    NotFoundError
        If a named slice does not exist or has no graph yet.
    """
    chosen = sorted(catalog.state.slices) if slices is None else list(slices)
    reports = []
    for name in chosen:
        objects = catalog.slice(name).objects
        if "propagate" not in objects or "reference" not in objects:
            if slices is None:
                continue
            raise NotFoundError(f"slice '{name}' has not been propagated yet: run the catalog first")
        graph = read_arrays(catalog.path("graphs", objects["propagate"]), _GRAPH)
        histogram = read_arrays(catalog.path("panels", objects["reference"]), ["histogram"])["histogram"]
        nonzeros = read_arrays(catalog.path("statistics", objects["tile"]), ["nonzeros"])["nonzeros"]
        sparsity = sparsity_report(
            nonzeros,
            graph["target_nonzeros"],
            graph["achieved_nonzeros"],
            n_genes=len(histogram) - 1,
            reference_histogram=histogram,
        )
        reports.append(
            {
                "slice_id": name,
                "sparsity": sparsity,
                "n_iterations": int(graph["n_iterations"][0]),
                "relative_change": float(graph["relative_change"][0]),
                "recall": [float(value) for value in graph["recall"]],
                "bandwidth_um": [float(value) for value in graph["bandwidth_um"]],
            }
        )
    return reports
