"""A prepared slice as a SpatialData store: the table, and the elements that its source has beside it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lloki_atlas.stages.elements import elements_digest
from lloki_atlas.stages.prepare import PreparedSlice
from lloki_atlas.stages.readers import REGION_ATTRIBUTES, readable
from lloki_atlas.stages.units import MICROMETER

TABLE = "table"
METADATA = "lloki_atlas"
ELEMENTS = ("points", "shapes", "images", "labels")


def write_slice(prepared: PreparedSlice, folder: str | Path) -> None:
    """Write a slice as a SpatialData store: the table `table`, and the elements that its source has beside it.

    Parameters
    ----------
    prepared
        The slice.
    folder
        Where; it may not exist.

    Raises
    ------
    InputError
        If the elements of the source cannot be read.
    """
    from anndata import AnnData
    from spatialdata import SpatialData

    genes = prepared.genes
    var = pd.DataFrame(
        {"symbol": np.array(genes.canonical, dtype=object), "mapping": pd.Categorical(genes.how)},
        index=pd.Index(genes.source, dtype=object),
    )
    uns: dict[str, Any] = {METADATA: json.dumps(prepared.metadata, sort_keys=True, allow_nan=False)}
    regions = _kept_regions(prepared)
    if regions:
        uns[REGION_ATTRIBUTES] = regions
    table = AnnData(X=prepared.counts, obs=prepared.obs, var=var, obsm={"spatial": prepared.coordinates}, uns=uns)
    with warnings.catch_warnings():
        # about regions that are no element, and about names of dask's internals
        warnings.simplefilter("ignore")
        source = prepared.elements
        with readable(source) if isinstance(source, Path) else nullcontext():
            elements = _carried_elements(prepared, regions=regions)
            data = SpatialData.init_from_elements({**elements, TABLE: table})
        with _blaming(source):
            data.write(folder)


@contextmanager
def _blaming(source: Any) -> Iterator[None]:
    """Read a source again after an error: if it is the source that is damaged, that is what is said."""
    from spatialdata import read_zarr

    try:
        yield
    except Exception:
        if isinstance(source, Path):
            with readable(source):
                elements_digest(read_zarr(source, selection=ELEMENTS))
        raise


def _kept_regions(prepared: PreparedSlice) -> dict[str, Any]:
    """Which elements the stored table annotates: of the source's regions those that have a cell in this slice."""
    columns = prepared.metadata["obs_columns"]
    keys = {name: columns.get(prepared.regions.get(name, "")) for name in ("region_key", "instance_key")}
    if None in keys.values():
        return {}
    present = list(dict.fromkeys(prepared.obs[keys["region_key"]].astype(str)))
    return {"region": present if len(present) > 1 else present[0], **keys}


def _carried_elements(prepared: PreparedSlice, *, regions: dict[str, Any]) -> dict[str, Any]:
    """Elements of the source but for tables and regions without a cell, with a transformation to micrometre."""
    from spatialdata import read_zarr
    from spatialdata.transformations import get_transformation, set_transformation

    source = prepared.elements
    if source is None:
        return {}
    if isinstance(source, Path):
        source = read_zarr(source, selection=ELEMENTS)
    kept = [str(name) for name in np.atleast_1d(regions["region"])] if regions else []
    others = set(prepared.regions.get("region", ())) - set(kept)
    carried: dict[str, Any] = {}
    for kind in ELEMENTS:
        for name, element in getattr(source, kind).items():
            if name in others:
                continue
            clone = element.copy() if kind == "points" else element.copy(deep=False)
            known = dict(get_transformation(clone, get_all=True))
            to_micrometer = _to_micrometer(source, element, kept, scale=prepared.metadata["um_per_unit"])
            if to_micrometer is not None:
                known[MICROMETER] = to_micrometer
            set_transformation(clone, known, set_all=True)
            carried[name] = clone
    return carried


def _to_micrometer(source: Any, element: Any, regions: list[str], *, scale: float) -> Any:
    """Transformation of an element into the table's coordinates, times micrometres per unit.

    The table's coordinates are those of the shapes that it annotates, or else the source's `global` ones.
    """
    from spatialdata.transformations import (
        Scale,
        Sequence,
        get_transformation,
        get_transformation_between_coordinate_systems,
    )

    to_unit = Scale([scale, scale], axes=("x", "y"))
    annotated = next((source[name] for name in regions if name in source), None)
    if element is annotated:
        return to_unit
    try:
        if annotated is None:
            return Sequence([get_transformation(element, to_coordinate_system="global"), to_unit])
        return Sequence([get_transformation_between_coordinate_systems(source, element, annotated), to_unit])
    except (ValueError, RuntimeError):
        # nothing says where this element lies with regard to the cells
        return None
