"""The parts of every kind of source under the same names; spatialdata itself is not needed to read them."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lloki_atlas.errors import InputError, LlokiAtlasError
from lloki_atlas.stages.parts import Parts
from lloki_atlas.stages.source_files import check_hdf5, check_zarr, checked_path, plain_files, unreadable
from lloki_atlas.stages.vendors import find_vendor, nested_vendors, vendor_parts

REGION_ATTRIBUTES = "spatialdata_attrs"

# what the operating system says about a file that is well: it may not be read, the disk fails, too many are open
_REFUSALS = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOSPC)


@contextmanager
def opened_parts(source: Any, *, table: str | None) -> Iterator[Parts]:
    """Open a source; a file that cannot be read is an InputError, whatever a library raised at it."""
    if isinstance(source, str | Path):
        path = checked_path(source)
        with readable(path), warnings.catch_warnings():
            # what libraries remark on a source is said by the checks, once and for all
            warnings.simplefilter("ignore")
            with _file_parts(path, table) as parts:
                yield parts
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
def readable(path: Path) -> Iterator[None]:
    """Turn whatever a library raises while a source is read into an InputError that names the source.

    Parameters
    ----------
    path
        The source.

    Raises
    ------
    InputError
        In place of every error that is not one of ours.
    """
    try:
        yield
    except LlokiAtlasError:
        raise
    except MemoryError as error:
        raise InputError(
            f"{path} needs more memory than there is: read it where there is more, or export it again ({_line(error)})"
        ) from error
    except OSError as error:
        if error.errno in _REFUSALS:
            raise unreadable(path, error) from error
        raise _damaged(path, error) from error
    except Exception as error:
        # libraries raise anything at a file that is cut short or of another kind
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    kind = "no store or folder of a vendor" if path.is_dir() else "no h5ad file"
    return InputError(
        f"{path} cannot be read, it is cut short or {kind}: copy or export it again "
        f"({type(error).__name__}: {_line(error)})"
    )


def _file_parts(path: Path, table: str | None) -> AbstractContextManager[Parts]:
    if not path.is_dir():
        return _h5ad_parts(path, table)
    vendor = None if (path / "tables").is_dir() else find_vendor(path)
    if vendor is None:
        return _zarr_parts(path, table)
    _no_table(table)
    return nullcontext(vendor_parts(path, vendor))


@contextmanager
def _h5ad_parts(path: Path, table: str | None) -> Iterator[Parts]:
    from anndata.io import read_elem

    _no_table(table)
    with h5py.File(path, "r") as file:
        check_hdf5(file, path=path)
        if "obs" not in file and isinstance(file.get("matrix"), h5py.Group):
            raise InputError(f"{path} is a matrix of 10x without positions: give the output folder that it is from")
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
        raise InputError(
            f"{path} has no table: give a SpatialData store with a table of cells, an h5ad file, or an output folder "
            f"of Xenium, MERSCOPE or CosMx{nested_vendors(path)}"
        )
    name = _table_name(names, table, where=path.name)
    plain_files(path)
    check_zarr(folder / name, plain_files(folder / name))
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
    keys = {key: np.asarray(found[key]) for key in ("region_key", "instance_key")}
    if any(value.ndim for value in keys.values()):
        raise InputError(f"the table's {REGION_ATTRIBUTES} do not name columns: write the SpatialData again")
    return {"region": names, **{key: str(value) for key, value in keys.items()}}


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
