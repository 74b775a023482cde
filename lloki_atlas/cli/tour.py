"""What a first look at an atlas shows: do neighbours across platforms agree, and who is near one cell."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lloki_atlas.cli.output import table
from lloki_atlas.query import nearest_cells, select_cells
from lloki_atlas.store.catalog import Catalog

LABEL = "cell_type_coarse"
N_NEIGHBORS = 15


def tour(catalog: Catalog, *, cells_per_type: int = 40) -> str:
    """Ask an atlas with labels two questions and tell the answers.

    Parameters
    ----------
    catalog
        Every slice has the label column `cell_type_coarse`.
    cells_per_type
        How many cells of each type are asked for, at most.

    Returns
    -------
    Text of a table of agreement per cell type, one cell's neighbours, and where to go on.
    """
    name = sorted(catalog.state.slices)[0]
    asked = _some_cells(catalog, name, cells_per_type)
    found = nearest_cells(catalog, asked, n_neighbors=N_NEIGHBORS, exclude_slice="own")
    pairs = found.to_dataframe()
    truth = asked.obs[LABEL].astype(str).to_numpy()
    pairs["right"] = pairs[LABEL].to_numpy() == truth[pairs["query"]]
    share = pairs.groupby("query")["right"].mean()
    by_type = pd.DataFrame({"type": truth, "share": share.to_numpy()}).groupby("type")["share"].agg(["size", "mean"])
    lines = [
        f"Cells of {name} and their {N_NEIGHBORS} nearest cells on other platforms:",
        "",
        table(
            ["cell type", "cells asked", "neighbours of the same type"],
            [(kind, int(row["size"]), f"{row['mean']:.0%}") for kind, row in by_type.iterrows()],
        ),
    ]
    position = int(np.argmax(share.to_numpy()))
    cell = str(asked.obs["cell"].iloc[position])
    nearest = pairs[pairs["query"] == position].head(8)
    lines += [
        "",
        f"Nearest to cell {cell} ({truth[position]}):",
        "",
        table(
            ["technology", "slice", "cell", "type", "distance"],
            [
                (row["technology"], row["slice_id"], row["cell"], row[LABEL], f"{row['distance']:.4f}")
                for _, row in nearest.iterrows()
            ],
        ),
        "",
        f"{sum(r.n_cells for r in catalog.state.slices.values()):,} cells in {len(catalog.state.slices)} slices",
        f"catalog: {catalog.root} (version {catalog.version})",
        f"ask it more: lloki-atlas query {catalog.root} --slice {name} --cell {cell} --exclude-own-slice",
    ]
    return "\n".join(lines)


def _some_cells(catalog: Catalog, slice_id: str, per_type: int):  # type: ignore[no-untyped-def]
    """The first few cells of every type that have an embedding, in spatial order."""
    adata = select_cells(catalog, slices=[slice_id]).to_anndata()
    adata = adata[np.isfinite(adata.obsm["X_lloki"][:, 0])]
    rank = adata.obs.groupby(LABEL, observed=True).cumcount()
    return adata[(rank < per_type).to_numpy()]
