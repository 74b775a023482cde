"""The elements beside a SpatialData table, without spatialdata: centroids of shapes, digest of what is in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lloki_atlas.config import digest
from lloki_atlas.errors import InputError

STRIP_ROWS = 512


def region_centroids(elements: Any, obs: pd.DataFrame, *, regions: Mapping[str, Any], where: str) -> np.ndarray:
    """Centroid of the shape that each cell annotates.

    Parameters
    ----------
    elements
        Path of a SpatialData store, or a SpatialData.
    obs
        Has the region and the instance of each cell.
    regions
        `region` (names), `region_key` and `instance_key` of the table.
    where
        What to call the table in messages.

    Returns
    -------
    numpy.ndarray
        (n_cells, 2) float64, in the shapes' own coordinates.

    Raises
    ------
    InputError
        If the regions are no shapes, or a cell has none.
    """
    for key in ("region_key", "instance_key"):
        if regions[key] not in obs:
            raise InputError(
                f"{where} annotates shapes by the column '{regions[key]}', which obs lacks: "
                "give the cells' positions in obsm['spatial'], or mend the table"
            )
    region_of = obs[regions["region_key"]].astype(str).to_numpy()
    instances = obs[regions["instance_key"]].to_numpy()
    positions = np.full((len(obs), 2), np.nan)
    for name in dict.fromkeys(region_of):
        shapes = _shapes(elements, name, where=where)
        centers = shapes.geometry.centroid
        rows = np.flatnonzero(region_of == name)
        found = pd.Index(shapes.index).get_indexer(pd.Index(instances[rows]))
        if (found < 0).any():
            raise InputError(
                f"{int((found < 0).sum())} cells of {where} have no shape in '{name}': "
                "give their positions in obsm['spatial'], or mend the instance column"
            )
        positions[rows] = np.column_stack([centers.x.to_numpy(), centers.y.to_numpy()])[found]
    return positions


def elements_digest(elements: Any) -> str:
    """Digest the points, shapes, images and labels of a SpatialData in memory, with their transformations."""
    found = {}
    for kind in ("points", "shapes", "images", "labels"):
        for name, element in getattr(elements, kind).items():
            state = hashlib.sha256(repr(element.attrs.get("transform")).encode())
            for piece in _pieces(element):
                state.update(piece)
            found[f"{kind}/{name}"] = state.hexdigest()
    return digest(found)


def _pieces(element: Any) -> Iterator[bytes]:
    """Yield the bytes of an element, a partition or a strip of pixels at a time."""
    if hasattr(element, "geometry"):
        yield b"".join(element.geometry.to_wkb())
        yield from _frame_bytes(pd.DataFrame(element.drop(columns=element.geometry.name)))
    elif hasattr(element, "partitions"):
        for part in element.partitions:
            yield from _frame_bytes(part.compute(scheduler="synchronous"))
    elif hasattr(element, "subtree"):
        for node in element.subtree:
            for raster in node.data_vars.values():
                yield from _pieces(raster)
    else:
        for start in range(0, element.sizes["y"], STRIP_ROWS):
            strip = element.isel(y=slice(start, start + STRIP_ROWS))
            yield np.asarray(strip.compute(scheduler="synchronous").values).tobytes()


def _frame_bytes(frame: pd.DataFrame) -> Iterator[bytes]:
    yield digest([[str(name) for name in frame.columns], frame.index.astype(str).tolist()]).encode()
    for name in frame.columns:
        yield digest(frame[name].astype(str).tolist()).encode()


def _shapes(elements: Any, name: str, *, where: str) -> Any:
    if isinstance(elements, Path):
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise InputError(f"{where} annotates '{name}', which is no name of an element: mend the table's region")
        file = elements / "shapes" / name / "shapes.parquet"
        if file.is_file():
            import geopandas  # type: ignore[import-untyped]

            return geopandas.read_parquet(file)
    elif name in elements.shapes:
        return elements.shapes[name]
    raise InputError(
        f"{where} has no obsm['spatial'], and '{name}', which it annotates, is no shapes element: "
        "put the cells' positions in obsm['spatial']"
    )
