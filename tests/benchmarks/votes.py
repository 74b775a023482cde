"""Do neighbours from other technologies agree on the cell type?

    python -m tests.benchmarks.votes ROOT [--label-key cell_type_coarse] [--json]

For every technology with labels: each labelled cell's 15 nearest labelled cells (cosine) of the *other* technologies
vote for its type. Printed is the balanced accuracy over the types that those technologies have, in the 512-d and the
128-d space, and in the principal components of the genes that all panels share (the floor).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter

import numpy as np
import pandas as pd

from lloki_atlas import nearest_cells, open_catalog, select_cells
from lloki_atlas.kernels.neighbors import nearest_rows
from lloki_atlas.store.catalog import Catalog

NO_LABEL = ("Unassigned", "unlabelled", "nan", "None", "")


def balanced_accuracy(true: np.ndarray, voted: np.ndarray, types: list[str]) -> float:
    """Mean over types of the share of a type's cells that are voted right."""
    return float(np.mean([(voted[true == name] == name).mean() for name in types]))


def vote(labels: list[str]) -> str:
    """Most frequent label; ties go to the alphabetically first."""
    return min(Counter(labels).items(), key=lambda item: (-item[1], item[0]))[0]


def votes_in(catalog: Catalog, embedding: str, label_key: str, n_neighbors: int = 15) -> dict[str, float]:
    """Balanced accuracy per technology in one of the stored spaces."""
    cells = select_cells(catalog).to_dataframe()
    labels = cells[label_key].astype(str)
    labelled = cells[~labels.isin(NO_LABEL)]
    scores = {}
    for technology in sorted(labelled["technology"].unique()):
        others = labelled[labelled["technology"] != technology]
        types = sorted(set(labelled.loc[labelled["technology"] == technology, label_key]) & set(others[label_key]))
        every = tuple(sorted(set(labelled[label_key])))
        own = select_cells(catalog, where=f"technology == {technology!r} and {label_key} in {(*types,)!r}").to_anndata()
        own = own[np.isfinite(own.obsm[embedding][:, 0])]  # cells without a count in a shared gene have no embedding
        found = nearest_cells(
            catalog,
            own,
            n_neighbors=n_neighbors,
            embedding=embedding,
            where=f"technology != {technology!r} and {label_key} in {every!r}",
        ).to_dataframe()
        voted = found.groupby("query")[label_key].agg(lambda part: vote(list(part)))
        scores[technology] = balanced_accuracy(own.obs[label_key].to_numpy(dtype=str), voted.to_numpy(), types)
    return scores


def votes_of_shared_genes(catalog: Catalog, label_key: str, n_neighbors: int = 15) -> dict[str, float]:
    """The floor: z-scored log counts of the genes that every panel has, per slice."""
    adata = select_cells(catalog).to_anndata(counts=True)
    counts = adata.X
    slices = adata.obs["slice_id"].astype(str).to_numpy()
    measured = np.stack(
        [np.asarray((counts[slices == name] > 0).sum(axis=0)).ravel() > 0 for name in np.unique(slices)]
    )
    values = counts[:, measured.all(axis=0)].toarray()
    values = np.log1p(values / np.maximum(np.asarray(counts.sum(axis=1)), 1) * 100)
    for name in np.unique(slices):
        part = values[slices == name]
        values[slices == name] = (part - part.mean(axis=0)) / (part.std(axis=0) + 1e-3)
    space = np.ascontiguousarray(values, dtype=np.float32)
    labels = adata.obs[label_key].astype(str).to_numpy()
    technologies = adata.obs["technology"].astype(str).to_numpy()
    known = ~pd.Series(labels).isin(NO_LABEL).to_numpy()
    scores = {}
    for technology in sorted(set(technologies[known])):
        own, others = known & (technologies == technology), known & (technologies != technology)
        types = sorted(set(labels[own]) & set(labels[others]))
        own &= np.isin(labels, types)
        found = nearest_rows(space[own], space[others], n_neighbors=n_neighbors).indices
        voted = np.array([vote(list(labels[others][row[row >= 0]])) for row in found])
        scores[technology] = balanced_accuracy(labels[own], voted, types)
    return scores


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--label-key", default="cell_type_coarse")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    catalog = open_catalog(arguments.root)
    table = {
        "shared genes": votes_of_shared_genes(catalog, arguments.label_key),
        "X_fp": votes_in(catalog, "X_fp", arguments.label_key),
        "X_lloki": votes_in(catalog, "X_lloki", arguments.label_key),
    }
    print(json.dumps(table) if arguments.json else pd.DataFrame(table).T.round(3).to_string())


if __name__ == "__main__":
    main()
