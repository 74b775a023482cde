"""Small output folders in the layouts of Xenium, MERSCOPE and CosMx, with what was written into them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

GENES = ("Gad1", "Gad2", "Ctgf", "Car4", "Slc17a7")
CONTROLS = {
    "Xenium": {
        "NegControlProbe_00042": "Negative Control Probe",
        "antisense_PROKR2": "Negative Control Probe",
        "NegControlCodeword_0500": "Negative Control Codeword",
        "UnassignedCodeword_0001": "Unassigned Codeword",
        "DeprecatedCodeword_0318": "Deprecated Codeword",
        "Intergenic_Region_1109": "Genomic Control",
        "BLANK_0069": "Blank Codeword",
    },
    "MERSCOPE": {"Blank-0": "", "Blank-12": ""},
    "CosMx": {"NegPrb3": "", "Negative01": "", "NegativeControl07": "", "SystemControl101": "", "FalseCode2": ""},
}
UNITS = {"Xenium": ("micrometer", 1.0), "MERSCOPE": ("micrometer", 1.0), "CosMx": ("pixel", 0.12028)}


@dataclass(frozen=True)
class Written:
    """A folder, and what it holds: counts (cells by genes), genes, names of cells, positions in the vendor's unit."""

    folder: Path
    counts: np.ndarray
    genes: tuple[str, ...]
    cells: tuple[str, ...]
    positions: np.ndarray
    unit: str
    um_per_unit: float


def write_vendor(vendor: str, folder: Path, *, n_cells: int = 24, seed: int = 0) -> Written:
    """Write the folder of a vendor."""
    return {"Xenium": write_xenium, "MERSCOPE": write_merscope, "CosMx": write_cosmx}[vendor](
        folder, n_cells=n_cells, seed=seed
    )


def write_xenium(folder: Path, *, n_cells: int = 24, seed: int = 0, proteins: bool = False) -> Written:
    """Xenium Onboard Analysis 3: `experiment.xenium`, `cells.parquet`, `cell_feature_matrix.h5`, and other files."""
    random, counts, genes = _start("Xenium", folder, n_cells=n_cells, seed=seed)
    positions = random.random((n_cells, 2)) * 1000
    cells = tuple(f"aaaab{'abcdefghijklmnop'[row % 16]}{'abcdefghijklmnop'[row // 16]}c-1" for row in range(n_cells))
    controls = CONTROLS["Xenium"]
    kinds = [controls.get(gene, "Gene Expression") for gene in genes]
    stored, names = counts, list(genes)
    if proteins:
        stored = np.column_stack([counts, np.full(n_cells, 7)])
        names, kinds = [*names, "CD45"], [*kinds, "Protein Expression"]
    _write_10x(folder / "cell_feature_matrix.h5", stored, names, kinds, cells)
    table = pd.DataFrame({"cell_id": cells, "x_centroid": positions[:, 0], "y_centroid": positions[:, 1]})
    table["transcript_counts"] = counts[:, : len(GENES)].sum(axis=1).astype(np.int64)
    for name in ("control_probe", "genomic_control", "control_codeword", "unassigned_codeword", "deprecated_codeword"):
        table[f"{name}_counts"] = np.zeros(n_cells, dtype=np.int64)
    table["total_counts"] = counts.sum(axis=1).astype(np.int64)
    table["cell_area"] = 20 + random.random(n_cells) * 50
    table["nucleus_area"] = 10 + random.random(n_cells) * 10
    table["nucleus_count"] = np.ones(n_cells, dtype=np.int64)
    table["segmentation_method"] = "Segmented by boundary stain (ATP1A1+CD45+E-Cadherin)"
    table.to_parquet(folder / "cells.parquet", index=False)
    specs = {
        "major_version": 6,
        "minor_version": 0,
        "run_name": "a run",
        "region_name": "tissue",
        "panel_name": "a panel",
        "num_cells": n_cells,
        "pixel_size": 0.2125,
        "analysis_sw_version": "xenium-3.1.0.4",
        "xenium_explorer_files": {"cells_zarr_filepath": "cells.zarr.zip"},
    }
    (folder / "experiment.xenium").write_text(json.dumps(specs))
    # what is not read may be as large, or as broken, as it likes
    for name in ("transcripts.parquet", "cells.zarr.zip", "cell_boundaries.parquet", "metrics_summary.csv"):
        (folder / name).write_bytes(b"not read")
    (folder / "morphology_focus").mkdir()
    (folder / "morphology_focus" / "morphology_focus_0000.ome.tif").write_bytes(b"not read")
    return Written(folder, counts, genes, cells, positions, *UNITS["Xenium"])


def write_merscope(folder: Path, *, n_cells: int = 24, seed: int = 0) -> Written:
    """MERSCOPE, a region: `cell_by_gene.csv`, `cell_metadata.csv`, and other files."""
    random, counts, genes = _start("MERSCOPE", folder, n_cells=n_cells, seed=seed)
    positions = random.random((n_cells, 2)) * 1000
    cells = tuple(f"11088342476461192440022163991631425{row:04d}" for row in range(n_cells))
    pd.DataFrame(counts.astype(np.float64), index=pd.Index(cells, name="cell"), columns=list(genes)).to_csv(
        folder / "cell_by_gene.csv"
    )
    table = pd.DataFrame({"fov": np.arange(n_cells) // 10}, index=pd.Index(cells, name="EntityID"))
    table["volume"] = 100 + random.random(n_cells) * 1000
    table["center_x"], table["center_y"] = positions.T
    for axis, column in (("x", 0), ("y", 1)):
        table[f"min_{axis}"] = positions[:, column] - 4.5
        table[f"max_{axis}"] = positions[:, column] + 4.5
    table["anisotropy"] = 1 + random.random(n_cells)
    table["transcript_count"] = counts[:, : len(GENES)].sum(axis=1).astype(np.int64)
    table["perimeter_area_ratio"] = random.random(n_cells)
    table["solidity"] = random.random(n_cells)
    table["DAPI_raw"] = random.random(n_cells) * 1e6
    table["PolyT_high_pass"] = random.random(n_cells) * 1e5
    table.to_csv(folder / "cell_metadata.csv")
    (folder / "detected_transcripts.csv").write_bytes(b"not read")
    (folder / "cell_boundaries.parquet").write_bytes(b"not read")
    (folder / "images").mkdir()
    (folder / "images" / "mosaic_DAPI_z3.tif").write_bytes(b"not read")
    (folder / "images" / "micron_to_mosaic_pixel_transform.csv").write_text("9.2 0 -8\n0 9.2 -9\n0 0 1\n")
    return Written(folder, counts, genes, cells, positions, *UNITS["MERSCOPE"])


def write_cosmx(folder: Path, *, n_cells: int = 24, seed: int = 0, packed: bool = False) -> Written:
    """CosMx flat files: `<run>_exprMat_file.csv` with a cell 0 per field of view, `<run>_metadata_file.csv`, others."""
    random, counts, genes = _start("CosMx", folder, n_cells=n_cells, seed=seed)
    # the last field of view has one cell
    fov = np.minimum(np.arange(n_cells) // 8 + 1, 3)
    fov[-1] = 4
    number = np.concatenate([np.arange(1, 1 + (fov == field).sum()) for field in np.unique(fov)])
    local = random.integers(0, 4256, (n_cells, 2))
    positions = (local + 4256 * fov[:, None]).astype(np.float64)
    cells = tuple(f"{cell}_{field}" for field, cell in zip(fov, number, strict=True))
    inside = pd.DataFrame({"fov": fov, "cell_ID": number})
    background = pd.DataFrame({"fov": np.unique(fov), "cell_ID": 0})
    outside = random.poisson(5, (len(background), len(genes)))
    table = pd.concat([background, inside], ignore_index=True)
    table[list(genes)] = np.vstack([outside, counts]).astype(np.int64)
    end = ".gz" if packed else ""
    table.sort_values(["fov", "cell_ID"]).to_csv(folder / f"Run1_exprMat_file.csv{end}", index=False)
    inside["Area"] = random.integers(500, 9000, n_cells)
    inside["AspectRatio"] = random.random(n_cells).round(2)
    for number_of, axis in enumerate("XY"):
        inside[f"Center{axis}_local_px"] = local[:, number_of]
    for number_of, axis in enumerate("XY"):
        inside[f"Center{axis}_global_px"] = positions[:, number_of]
    inside["Width"] = random.integers(20, 90, n_cells)
    inside["Mean.CD298/B2M"] = random.integers(0, 9000, n_cells)
    inside["cell_id"] = [f"c_1_{field}_{cell}" for field, cell in zip(inside["fov"], inside["cell_ID"], strict=True)]
    inside.to_csv(folder / f"Run1_metadata_file.csv{end}", index=False)
    (folder / f"Run1_fov_positions_file.csv{end}").write_text("fov,x_global_px,y_global_px\n")
    (folder / f"Run1_tx_file.csv{end}").write_bytes(b"not read")
    (folder / "CellComposite").mkdir()
    (folder / "CellComposite" / "CellComposite_F001.jpg").write_bytes(b"not read")
    return Written(folder, counts, genes, cells, positions, *UNITS["CosMx"])


def _start(vendor: str, folder: Path, *, n_cells: int, seed: int) -> tuple[np.random.Generator, np.ndarray, tuple]:
    folder.mkdir(parents=True)
    random = np.random.default_rng([seed, len(vendor)])
    genes = (*GENES[:2], *CONTROLS[vendor], *GENES[2:])
    counts = random.poisson(0.8, (n_cells, len(genes)))
    counts[:, 0] += 1
    return random, counts, genes


def _write_10x(path: Path, counts: np.ndarray, genes: list[str], kinds: list[str], cells: tuple[str, ...]) -> None:
    """Features by cells, compressed by cell, as Cell Ranger writes it."""
    matrix = sparse.csr_matrix(counts)
    with h5py.File(path, "w") as file:
        file.attrs["filetype"], file.attrs["version"] = "matrix", 2
        file.attrs["library_ids"] = np.array([b"a run"])
        group = file.create_group("matrix")
        group["barcodes"] = np.array(cells, dtype="S")
        group.create_dataset("data", data=matrix.data.astype(np.int32), compression="gzip")
        group.create_dataset("indices", data=matrix.indices.astype(np.int64), compression="gzip")
        group.create_dataset("indptr", data=matrix.indptr.astype(np.int64), compression="gzip")
        group["shape"] = np.array(counts.shape[::-1], dtype=np.int32)
        features = group.create_group("features")
        features["id"] = np.array([f"ENSMUSG{number:011d}" for number in range(len(genes))], dtype="S")
        features["name"] = np.array(genes, dtype="S")
        features["feature_type"] = np.array(kinds, dtype="S")
        features["genome"] = np.array(["Unknown"] * len(genes), dtype="S")
        features["_all_tag_keys"] = np.array([b"genome"])
