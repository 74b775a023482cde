"""What is looked at in a vendor's files before its reader is called: columns, names of cells, sizes."""

from __future__ import annotations

import csv
import gzip
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
import pandas as pd

from lloki_atlas.errors import InputError
from lloki_atlas.stages.matrices import check_stored
from lloki_atlas.stages.source_files import SMALL_BYTES, check_hdf5

COPY_BYTES = 1 << 20
INDEX_BLOCK = 1 << 22


def read_header(path: Path, *, needed: Sequence[str], first: str | None = None) -> list[str]:
    """Read the names of a text table's columns.

    Parameters
    ----------
    path
        Comma-separated, gzip if it ends in `.gz`.
    needed
        Columns that have to be there.
    first
        What the first column has to be called.

    Raises
    ------
    InputError
        If the table is empty, a column is missing, or one is there twice.
    """
    with open_text(path) as handle:
        line = handle.readline(SMALL_BYTES)
    columns = next(csv.reader([line.decode("utf-8-sig").rstrip("\r\n")]), [])
    if not columns:
        raise InputError(f"{path} is empty: export it again")
    wanted = [*needed, *([first] if first else [])]
    missing = [name for name in wanted if name not in columns]
    if missing or (first and columns[0] != first):
        raise InputError(
            f"{path} lacks the column {', '.join(missing) or first}: give the file as the vendor writes it"
        )
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise InputError(f"{path} has duplicate columns ({', '.join(twice[:3])}): keep one column of each")
    return columns


def open_text(path: Path) -> IO[bytes]:
    """Open a file that may be compressed."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def read_columns(path: Path, columns: Sequence[int] | None = None, *, text: Sequence[int]) -> pd.DataFrame:
    """Read columns of a text table by their numbers, all when None; those of `text` stay as they are written."""
    return pd.read_csv(
        path,
        usecols=None if columns is None else list(columns),
        converters=dict.fromkeys(text, str),
        float_precision="round_trip",
        low_memory=False,
        index_col=False,
    )


def decompress(source: Path, target: Path) -> None:
    """Write out a gzip file."""
    with gzip.open(source, "rb") as packed, target.open("wb") as plain:
        shutil.copyfileobj(packed, plain, COPY_BYTES)


def same_cells(counted: pd.Index, described: pd.Index, *, counts: Path, metadata: Path) -> None:
    """Refuse two files that do not have the same cells, or one of them twice."""
    for names, path in ((counted, counts), (described, metadata)):
        if not len(names):
            raise InputError(f"{path} has no cells: export it again")
        if names.has_duplicates:
            raise InputError(f"{path} has the cell {names[names.duplicated()][0]} twice: export it again")
    for some, others, path, other in ((counted, described, counts, metadata), (described, counted, metadata, counts)):
        lost = some.difference(others, sort=False)
        if len(lost):
            raise InputError(
                f"{len(lost)} of {len(some)} cells of {path} are not in {other.name} ({lost[0]}): "
                "give the files of one run, with all their cells"
            )


def check_xenium_matrix(path: Path) -> pd.Index:
    """Refuse a `cell_feature_matrix.h5` whose parts contradict each other; the names of its cells."""
    with h5py.File(path, "r") as file:
        check_hdf5(file, path=path)
        matrix = file.get("matrix")
        if not isinstance(matrix, h5py.Group) or "features" not in matrix or "barcodes" not in matrix:
            raise InputError(f"{path} has no matrix of features and barcodes: give the file as the vendor writes it")
        check_stored(matrix, where=path.name)
        shape = [int(length) for length in np.ravel(matrix["shape"][...])]
        declared = [len(matrix["features/id"]), len(matrix["indptr"]) - 1]
        if shape != declared or len(matrix["barcodes"]) != shape[1]:
            raise InputError(f"{path} says that it is {shape}, but holds {declared}: copy or export it again")
        check_indices(matrix["indices"], shape[0], path=path)
        return pd.Index(matrix["barcodes"].asstr()[...], dtype=object)


def check_indices(indices: h5py.Dataset, bound: int, *, path: Path) -> None:
    """Refuse numbers of genes that no gene has, since compiled code trusts them."""
    for start in range(0, len(indices), INDEX_BLOCK):
        block = indices[start : start + INDEX_BLOCK]
        if block.min() < 0 or block.max() >= bound:
            raise InputError(f"{path} counts a gene beyond its {bound} genes: copy or export it again")


def check_xenium_cells(path: Path, *, counted: pd.Index, counts: Path) -> None:
    """Refuse a `cells.parquet` that lacks a column, or does not have the cells of the counts in their order."""
    import pyarrow.parquet  # type: ignore[import-untyped]

    described: Any = pyarrow.parquet.read_metadata(path)
    columns = described.schema.to_arrow_schema().names
    missing = [name for name in ("cell_id", "x_centroid", "y_centroid", "cell_area") if name not in columns]
    if missing:
        raise InputError(f"{path} lacks the column {', '.join(missing)}: give the file as the vendor writes it")
    if described.num_rows != len(counted):
        raise InputError(
            f"{path} has {described.num_rows} cells, {counts.name} has {len(counted)}: give the files of one run"
        )
    names = pyarrow.parquet.read_table(path, columns=["cell_id"])["cell_id"].to_pylist()
    listed = pd.Index([name.decode() if isinstance(name, bytes) else str(name) for name in names], dtype=object)
    same_cells(counted, listed, counts=counts, metadata=path)
    if not listed.equals(counted):
        raise InputError(f"{path} has its cells in another order than {counts.name}: give the files of one run")
