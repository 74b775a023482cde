"""The parts of every kind of source under the same names; spatialdata itself is not needed to read them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from lloki_atlas.errors import InputError, LlokiAtlasError

REGION_ATTRIBUTES = "spatialdata_attrs"


@dataclass
class Parts:
    """What an open source has, not yet read but for `obs`; `read` turns an item of `obsm` into an array."""

    obs: pd.DataFrame
    var_names: pd.Index
    X: Any
    layers: Mapping[str, Any]
    obsm: Mapping[str, Any]
    description: str
    origin: dict[str, Any]
    read: Callable[[Any], Any] = lambda item: item
    elements: Any = None
    regions: dict[str, Any] = field(default_factory=dict)


@contextmanager
def opened_parts(source: Any, *, table: str | None) -> Iterator[Parts]:
    """Open a source; a file that cannot be read is an InputError, whatever a library raised at it."""
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if not path.exists():
            raise InputError(f"{path} does not exist: give the path of an h5ad file or of a SpatialData store")
        try:
            with _zarr_parts(path, table) if path.is_dir() else _h5ad_parts(path, table) as parts:
                yield parts
        except LlokiAtlasError:
            raise
        except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            # libraries raise anything at a file that is cut short or of another kind
            raise InputError(
                f"{path} cannot be read, it is cut short or no {'SpatialData store' if path.is_dir() else 'h5ad file'}"
                f": copy or export it again ({type(error).__name__}: {_line(error)})"
            ) from error
    elif hasattr(source, "tables") and hasattr(source, "shapes"):
        yield _spatial_parts(source, table)
    elif hasattr(source, "obsm") and hasattr(source, "var_names"):
        _no_table(table)
        yield _parts(source, kind="AnnData", path=None, description="the AnnData")
    else:
        raise InputError(
            f"a {type(source).__name__} is no source: give an h5ad file, a SpatialData store, an AnnData or SpatialData"
        )


@contextmanager
def _h5ad_parts(path: Path, table: str | None) -> Iterator[Parts]:
    from anndata.io import read_elem

    _no_table(table)
    with h5py.File(path, "r") as file:
        if "obs" not in file or "var" not in file:
            raise InputError(f"{path} is HDF5 but has no obs and var: export it as h5ad with AnnData.write_h5ad")
        yield Parts(
            obs=read_elem(file["obs"]),
            var_names=read_elem(file["var"]).index,
            X=file.get("X"),
            layers=file.get("layers", {}),
            obsm=file.get("obsm", {}),
            read=read_elem,
            description=path.name,
            origin={"kind": "h5ad", "path": str(path.absolute()), "table": None},
        )


@contextmanager
def _zarr_parts(path: Path, table: str | None) -> Iterator[Parts]:
    from anndata.experimental import read_lazy

    folder = path / "tables"
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    if not names:
        raise InputError(f"{path} has no table: give a SpatialData store with a table of cells, or an h5ad file")
    name = _table_name(names, table, where=path.name)
    with warnings.catch_warnings():
        # tables that spatialdata writes are not consolidated one by one
        warnings.simplefilter("ignore")
        lazy = read_lazy(str(folder / name))
    parts = _parts(lazy, kind="SpatialData", path=str(path.absolute()), description=f"table '{name}' of {path.name}")
    parts.obs, parts.elements, parts.origin["table"] = lazy.obs.to_memory(), path, name
    yield parts


def _spatial_parts(source: Any, table: str | None) -> Parts:
    if not len(source.tables):
        raise InputError("the SpatialData has no table: give one with a table of cells")
    name = _table_name(sorted(source.tables), table, where="the SpatialData")
    description = f"table '{name}' of the SpatialData"
    parts = _parts(source.tables[name], kind="SpatialData", path=None, description=description)
    parts.elements, parts.origin["table"] = source, name
    return parts


def _parts(adata: Any, *, kind: str, path: str | None, description: str) -> Parts:
    return Parts(
        obs=adata.obs,
        var_names=adata.var_names,
        X=adata.X,
        layers=adata.layers,
        obsm=adata.obsm,
        description=description,
        origin={"kind": kind, "path": path, "table": None},
        regions=_region_attributes(adata.uns) if kind == "SpatialData" else {},
    )


def _region_attributes(uns: Mapping[str, Any]) -> dict[str, Any]:
    found = uns.get(REGION_ATTRIBUTES)
    if not found or found.get("region") is None:
        return {}
    regions = found["region"]
    regions = regions.compute(scheduler="synchronous") if hasattr(regions, "compute") else regions
    names = [str(name) for name in np.atleast_1d(np.asarray(regions))]
    return {"region": names, **{key: str(np.asarray(found[key])) for key in ("region_key", "instance_key")}}


def _table_name(names: list[str], table: str | None, *, where: str) -> str:
    if table is not None and table not in names:
        raise InputError(f"{where} has no table '{table}': choose from {', '.join(names)}")
    if table is None and len(names) > 1 and "table" not in names:
        raise InputError(f"{where} has {len(names)} tables: choose one with table= from {', '.join(names)}")
    return table or ("table" if "table" in names else names[0])


def _no_table(table: str | None) -> None:
    if table is not None:
        raise InputError(f"table '{table}' was asked for, but only a SpatialData source has tables: leave it out")


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:160] if text else "no message"
