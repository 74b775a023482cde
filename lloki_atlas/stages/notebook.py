"""LLOKI-FP alone, in memory, for notebooks: AnnData in, AnnData out, no catalog."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from lloki_atlas.config import PropagationConfig, settings_from_dict
from lloki_atlas.kernels.cap import cap_rows
from lloki_atlas.kernels.diffusion import diffuse
from lloki_atlas.kernels.transport import sparsity_histogram
from lloki_atlas.stages import propagate, tile
from lloki_atlas.stages.panels import select_panel, slice_random_key
from lloki_atlas.stages.prepare import SOURCE_ROW, prepare_slice
from lloki_atlas.stages.reference import fit_reference
from lloki_atlas.stages.sources import open_source
from lloki_atlas.stages.sparsity import sparsity_report
from lloki_atlas.store.references import ReferenceProfile

if TYPE_CHECKING:
    from anndata import AnnData


def propagate_slice(
    adata: AnnData,
    reference: AnnData | ReferenceProfile | str | Path,
    *,
    organism: str = "mouse",
    slice_id: str = "slice",
    spatial_key: str = "spatial",
    layer: str | None = None,
    n_threads: int = 1,
    **settings: Any,
) -> AnnData:
    """Run LLOKI-FP on one slice.

    Parameters
    ----------
    adata
        Integer counts (n_cells, n_genes) and `obsm["spatial"]` in any unit.
    reference
        scRNA-seq counts as AnnData or h5ad, or a fitted profile.
    organism
        Of both.
    slice_id
        Names the slice's random stream.
    spatial_key, layer
        Where coordinates and counts are.
    n_threads
        Threads; they change no bit.
    settings
        Fields of `PropagationConfig`, such as `n_neighbors=40` or `alpha=1.0`.

    Returns
    -------
    AnnData over the shared genes (canonical symbols), cells in the order of `adata`: `X` the denoised counts
    α A_imp X⁰ + (1 − α) X⁰, `layers["counts"]` X⁰, `layers["propagated"]`, `obsp["propagation_graph"]` A_imp,
    `obs["budget"]`, `obs["target_nonzeros"]`, `obs["achieved_nonzeros"]`, `uns["lloki_atlas"]` how it ended
    and the slice's own, target and achieved sparsity.

    Raises
    ------
    InputError
        If counts or coordinates cannot be used, or no gene is shared.
    """
    from anndata import AnnData as Annotated

    config = settings_from_dict(PropagationConfig, settings, where="propagation")
    profile = reference if isinstance(reference, ReferenceProfile) else fit_reference(reference, organism=organism)
    prepared = prepare_slice(
        open_source(adata, layer=layer, spatial_key=spatial_key),
        slice_id=slice_id,
        technology="in memory",
        organism=organism,
        coordinate_unit="micrometer",  # any unit does: distances only enter as multiples of σ
        reference_symbols=profile.symbols,
        empty_cells="keep",
    )
    panel = select_panel(prepared.counts, prepared.genes.canonical, prepared.genes.how, profile.symbols)
    coordinates = prepared.coordinates
    order = prepared.obs[SOURCE_ROW].to_numpy()
    key = slice_random_key(slice_id, config)
    statistics = tile.run_slice(panel, coordinates, settings=config, key=key)
    own = np.diff(profile.columns(panel.symbols).indptr).astype(np.int32)
    histogram = sparsity_histogram(own, len(panel.symbols))
    result = propagate.run_slice(
        panel,
        coordinates,
        own_histogram=statistics["histogram"],
        reference_histogram=histogram,
        reference_histogram_all=sparsity_histogram(np.diff(profile.counts.indptr), profile.counts.shape[1]),
        bandwidth_um=float(statistics["bandwidth_um"][0]),
        settings=config,
        key=key,
        n_threads=n_threads,
    )
    counts = csr_matrix(panel.shared_counts[0 : panel.n_cells])
    denoised = diffuse(
        result.graph,
        counts,
        start=0,
        stop=len(order),
        alpha=config.alpha,
        keep_observed=config.keep_observed,
        n_threads=n_threads,
    )
    filled = result.filled
    if config.cap_final:
        denoised = cap_rows(denoised, np.zeros(counts.shape[1]), filled.target_nonzeros)
    report = sparsity_report(
        np.diff(counts.indptr),
        filled.target_nonzeros,
        filled.achieved_nonzeros,
        n_genes=counts.shape[1],
        reference_histogram=histogram,
    )
    back = np.argsort(order, kind="stable")
    graph = csr_matrix(
        (result.graph.weights, result.graph.indices, result.graph.indptr), shape=(len(order), len(order))
    )
    out = Annotated(
        X=denoised[back],
        obs=adata.obs.copy(),
        var=pd.DataFrame(index=pd.Index(panel.symbols)),
        obsm={"spatial": np.asarray(adata.obsm[spatial_key])},
        layers={"counts": csr_matrix(counts[back]), "propagated": csr_matrix(result.values[back])},
        obsp={"propagation_graph": csr_matrix(graph[back][:, back])},
        uns={
            "lloki_atlas": {
                "bandwidth_um": result.bandwidth_um[1],
                "n_iterations": filled.n_iterations,
                "relative_change": filled.relative_change,
                "recall": result.recall[1],
                "sparsity": report,
            }
        },
    )
    out.obs["budget"] = filled.budget[back]
    out.obs["target_nonzeros"] = filled.target_nonzeros[back]
    out.obs["achieved_nonzeros"] = filled.achieved_nonzeros[back]
    return out
