"""Output folders of vendors: Xenium, MERSCOPE and CosMx, read by spatialdata-io.

The reader sees a folder of its own that holds nothing but the files that are needed, so that images, masks and
transcripts are neither read nor part of the source's digest, and may be missing.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
from scipy import sparse

from lloki_atlas.errors import InputError
from lloki_atlas.stages import vendor_tables as tables
from lloki_atlas.stages.matrices import check_numbers
from lloki_atlas.stages.parts import Parts

XENIUM = ("experiment.xenium", "cells.parquet", "cell_feature_matrix.h5")
MERSCOPE = ("cell_by_gene.csv", "cell_metadata.csv")
COSMX = ("_exprMat_file.csv", "_metadata_file.csv")

# CosMx instruments: 0.120280945 µm in Bruker's own description, which its software rounds
COSMX_UM_PER_PIXEL = 0.12028

_MERSCOPE_POSITION = ["center_x", "center_y"]
_COSMX_POSITION = ["CenterX_global_px", "CenterY_global_px"]
_COSMX_LOCAL = ["CenterX_local_px", "CenterY_local_px"]


@dataclass(frozen=True)
class Vendor:
    """Whose folder it is, and the files that are read: name that the reader knows, and path."""

    name: str
    files: Mapping[str, Path]


def find_vendor(folder: Path) -> Vendor | None:
    """Recognise a vendor's folder by its files.

    Returns
    -------
    Vendor
        None when not one file of a vendor is there.

    Raises
    ------
    InputError
        If a file is missing or a link, or the folder has files of several vendors or runs.
    """
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    found = {
        vendor: files
        for vendor, files in (
            ("Xenium", {name: name for name in XENIUM}),
            ("MERSCOPE", {name: name for name in MERSCOPE}),
            *(("CosMx", files) for files in _cosmx_runs(folder, names)),
        )
        if not set(files.values()).isdisjoint(names)
    }
    if len(found) > 1:
        raise InputError(f"{folder} has files of {' and of '.join(found)}: give a folder of one run")
    for vendor, files in found.items():
        missing = [name for name in files.values() if name not in names]
        if missing:
            raise InputError(
                f"{folder} looks like the output of {vendor}, but {', '.join(missing)} is missing: copy it there"
            )
        for name in files.values():
            if (folder / name).is_symlink() or not (folder / name).is_file():
                raise InputError(f"{folder / name} is no plain file: copy it there without links")
        return Vendor(vendor, {known: folder / name for known, name in files.items()})
    return None


def nested_vendors(folder: Path) -> str:
    """Hint at folders one level below that are a vendor's, for the end of a sentence."""
    marks = {*XENIUM, *MERSCOPE}
    below = [
        entry.name
        for entry in sorted(folder.iterdir())
        if entry.is_dir() and any(file.name in marks or COSMX[0] in file.name for file in entry.iterdir())
    ]
    return f" (such as {', '.join(below[:3])} in it)" if below else ""


def vendor_parts(folder: Path, vendor: Vendor) -> Parts:
    """Read the cells of a vendor's folder: counts of every gene and control, positions, columns of the cells.

    Parameters
    ----------
    folder
        The vendor's folder.
    vendor
        What `find_vendor` found there.

    Raises
    ------
    InputError
        If spatialdata-io is missing, or the files do not fit each other.
    """
    read = {"Xenium": _xenium, "MERSCOPE": _merscope, "CosMx": _cosmx}[vendor.name]
    with _view(vendor) as view:
        obs, names, counts, positions = read(vendor, view)
    return Parts(
        obs=obs,
        var_names=pd.Index(names, dtype=object),
        X=counts,
        layers={},
        obsm={"spatial": positions},
        description=f"{vendor.name} folder {folder.name}",
        origin={"kind": vendor.name, "path": str(folder.absolute()), "table": None},
        files=vendor.files,
        unit=("pixel", COSMX_UM_PER_PIXEL) if vendor.name == "CosMx" else ("micrometer", 1.0),
    )


_Table = tuple[pd.DataFrame, Iterable[str], Any, np.ndarray]


def _xenium(vendor: Vendor, view: Path) -> _Table:
    specs, cells, counts = vendor.files.values()
    content = json.loads(specs.read_bytes())
    if not isinstance(content, dict) or "analysis_sw_version" not in content:
        raise InputError(f"{specs} says no analysis_sw_version: give the file as the instrument writes it")
    barcodes = tables.check_xenium_matrix(counts)
    tables.check_xenium_cells(cells, counted=barcodes, counts=counts)
    # without a version that it knows the reader does not look for masks in the zip
    (view / specs.name).write_text(json.dumps({"analysis_sw_version": "", "pixel_size": 1.0}))
    with zipfile.ZipFile(view / "cells.zarr.zip", "w") as archive:
        archive.writestr(".zgroup", json.dumps({"zarr_format": 2}))
    off = ("cells_boundaries", "nucleus_boundaries", "cells_labels", "nucleus_labels", "transcripts")
    images = ("morphology_mip", "morphology_focus", "aligned_images")
    table = _reader("xenium")(view, gex_only=False, **dict.fromkeys((*off, *images), False))["table"]
    # intensities of proteins are no counts
    genes = (table.var["feature_types"] != "Protein Expression").to_numpy()
    obs = table.obs.drop(columns=["cell_id", "region"])
    return obs, table.var_names[genes], sparse.csr_matrix(table.X)[:, genes], np.asarray(table.obsm["spatial"])


def _merscope(vendor: Vendor, view: Path) -> _Table:
    counts, metadata = vendor.files.values()
    names = tables.read_header(counts, needed=(), first="cell")[1:]
    tables.read_header(metadata, needed=_MERSCOPE_POSITION)
    counted = pd.Index(tables.read_columns(counts, [0], text=[0]).iloc[:, 0])
    described = tables.read_columns(metadata, text=[0])
    described = described.set_index(pd.Index(described.iloc[:, 0])).iloc[:, 1:]
    tables.same_cells(counted, described.index, counts=counts, metadata=metadata)
    described = described.loc[counted]
    described[_MERSCOPE_POSITION].rename_axis("EntityID").to_csv(view / metadata.name)
    (view / "images").mkdir()
    (view / "images" / "micron_to_mosaic_pixel_transform.csv").write_text("1 0 0\n0 1 0\n0 0 1\n")
    off = ("transcripts", "cells_boundaries", "mosaic_images")
    table = _reader("merscope")(view, z_layers=None, **dict.fromkeys(off, False))["table"]
    # the reader sets blanks apart; here they are genes, which are mapped as controls
    blanks = table.obsm["blank"].to_numpy()
    for values in (table.X, blanks):
        check_numbers(values.dtype, where=counts.name)
    columns = pd.Index([*table.var_names, *table.obsm["blank"].columns]).get_indexer(pd.Index(names))
    together = sparse.hstack([sparse.csr_matrix(table.X), sparse.csr_matrix(blanks)], format="csr")
    return described, names, together[:, columns], _positions(described, _MERSCOPE_POSITION)


def _cosmx(vendor: Vendor, view: Path) -> _Table:
    counts, metadata = vendor.files.values()
    keys = ["fov", "cell_ID"]
    found = tables.read_header(counts, needed=keys)
    listed = tables.read_header(metadata, needed=[*keys, *_COSMX_LOCAL, *_COSMX_POSITION])
    counted = _cosmx_cells(tables.read_columns(counts, _numbers(found, keys), text=_numbers(found, keys)))
    described = _cosmx_cells(tables.read_columns(metadata, text=_numbers(listed, keys)))
    tables.same_cells(counted.index, described.index, counts=counts, metadata=metadata)
    known = next(name for name, path in vendor.files.items() if path == metadata)
    described[[*keys, *_COSMX_LOCAL, *_COSMX_POSITION]].to_csv(view / known, index=False)
    (view / known.replace(COSMX[1], "_fov_positions_file.csv")).touch()
    for images in ("CellComposite", "CellLabels"):
        (view / images).mkdir()
    reader = _reader("cosmx")
    # where the images of a field lie cannot be told from one cell; no image is read, so it does not matter
    with mock.patch.dict(reader.__globals__, estimate_transform=_no_transform):
        table = reader(view, transcripts=False)["table"]
    described = described.loc[table.obs_names].astype(dict.fromkeys(keys, np.int64))
    return described, table.var_names, table.X, _positions(described, _COSMX_POSITION)


def _cosmx_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows by the reader's names of cells, without the row of a field that counts what is in no cell."""
    frame = frame.set_index(pd.Index(frame["cell_ID"] + "_" + frame["fov"], name=None))
    return frame[frame["cell_ID"] != "0"]


def _cosmx_runs(folder: Path, names: list[str]) -> list[dict[str, str]]:
    """Files of the one CosMx run in a folder, if there is any."""
    present = {name.removesuffix(".gz") for name in names}
    runs = sorted({name.removesuffix(end) for name in present for end in COSMX if name.endswith(end)})
    if len(runs) > 1:
        raise InputError(f"{folder} has files of several CosMx runs ({', '.join(runs)}): give a folder of one run")
    return [{f"{run}{end}": _packed(f"{run}{end}", names) for end in COSMX} for run in runs]


def _packed(name: str, names: list[str]) -> str:
    return f"{name}.gz" if name not in names and f"{name}.gz" in names else name


def _numbers(columns: list[str], names: list[str]) -> list[int]:
    return [columns.index(name) for name in names]


def _positions(frame: pd.DataFrame, columns: list[str]) -> np.ndarray:
    return frame[columns].to_numpy(dtype=np.float64)


def _no_transform(**_: Any) -> Any:
    class Identity:
        params = np.eye(3)

    return Identity()


@contextmanager
def _view(vendor: Vendor) -> Iterator[Path]:
    """A folder that holds the counts under the name that the reader knows, and nothing else."""
    with tempfile.TemporaryDirectory(prefix="lloki-atlas-") as folder:
        for name, path in vendor.files.items():
            if name in (XENIUM[0], MERSCOPE[1]) or name.endswith(COSMX[1]):
                continue
            if path.suffix == ".gz":
                tables.decompress(path, Path(folder, name))
            else:
                os.symlink(path.absolute(), Path(folder, name))  # noqa: PTH211
        yield Path(folder)


def _reader(name: str) -> Callable[..., Any]:
    try:
        import spatialdata_io

        return getattr(spatialdata_io, name)  # type: ignore[no-any-return]
    except ImportError as error:
        raise InputError(
            "output folders of vendors are read by spatialdata-io, which is not installed: "
            f"pip install 'lloki-atlas[vendors]' ({error})"
        ) from error
