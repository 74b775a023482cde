"""Manifests (`catalogs/*.toml`): an atlas described in one file, checked whole before anything is read."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from lloki_atlas.config import AtlasConfig, load_toml
from lloki_atlas.errors import InputError

# the catalog's folder is called by it where none is given
_NAME = re.compile(r"\w[\w .+-]*")
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


@dataclass(frozen=True)
class ReferenceSource:
    """`[reference]`: where the scRNA-seq counts are."""

    source: str
    organism: str
    label_key: str | None = None
    layer: str | None = None


@dataclass(frozen=True)
class SliceSource:
    """One `[[slices]]`: where a slice is and what cannot be read from it.

    With `slice_key` (a column of `obs`) and no `slice_value` every value of the column is a slice of its own.
    """

    source: str
    technology: str
    organism: str
    coordinate_unit: str
    slice_id: str | None = None
    slice_key: str | None = None
    slice_value: str | None = None
    um_per_unit: float | None = None
    spatial_key: str = "spatial"
    label_key: str | list[str] | None = None
    layer: str | None = None
    table: str | None = None
    empty_cells: str = "error"
    accept_normalized: bool = False
    gene_map: str | None = None
    url: str | None = None  # where a user gets the file; shown when it is missing


@dataclass(frozen=True)
class Simulation:
    """`[simulate]`: sources that are made rather than found."""

    n_cells: int = 8000
    n_slices: int = 4
    random_state: int = 0


@dataclass(frozen=True)
class _Atlas:
    """`[atlas]`: what it is called, and the folder that its sources are in."""

    name: str = ""
    data: str = "."


@dataclass(frozen=True)
class Manifest:
    """An atlas: name, data folder, reference, slices, settings."""

    path: Path
    name: str
    data: Path
    reference: ReferenceSource | None
    slices: tuple[SliceSource, ...]
    config: AtlasConfig
    simulation: Simulation | None = None


def read_manifest(path: str | Path) -> Manifest:
    """Read and check a manifest.

    `${NAME}` and `${NAME:-default}` in `data` are taken from the environment; a relative folder is relative to the
    manifest.

    Raises
    ------
    InputError
        If the file is missing, is not TOML, or says something that is not in the format.
    """
    path = Path(path)
    content = load_toml(path)
    unknown = set(content) - {"atlas", "reference", "slices", "settings", "simulate"}
    if unknown:
        raise InputError(f"{path} has unknown sections: {', '.join(sorted(unknown))}")
    atlas = _table(_Atlas, content.get("atlas", {}), f"{path} [atlas]")
    if not atlas.name:
        raise InputError(f'{path} has no name: begin with [atlas] and name = "..."')
    if not _NAME.fullmatch(atlas.name):
        raise InputError(f"{path} has the name {atlas.name!r}: a folder is called by it, use letters, digits, '-', '_'")
    if not isinstance(content.get("slices", []), list):
        raise InputError(f"{path} has one table [slices]: write [[slices]], once for every slice")
    simulation = _table(Simulation, content["simulate"], f"{path} [simulate]") if "simulate" in content else None
    if simulation is None and ("reference" not in content or not content.get("slices")):
        raise InputError(f"{path} needs [reference] and at least one [[slices]], or [simulate]")
    reference = content.get("reference")
    data = _data_folder(atlas.data, path)
    return Manifest(
        path=path,
        name=atlas.name,
        data=data,
        reference=None if reference is None else _table(ReferenceSource, reference, f"{path} [reference]"),
        slices=tuple(
            read_entry(entry, where=f"{path} [[slices]] number {number}")
            for number, entry in enumerate(content.get("slices", []), start=1)
        ),
        config=_with_checkpoint(AtlasConfig.from_dict(content.get("settings", {})), data),
        simulation=simulation,
    )


def read_entry(values: Any, *, where: str) -> SliceSource:
    """Check one table of `[[slices]]`; `where` is what to call it in messages."""
    entry: SliceSource = _table(SliceSource, values, where)
    return entry


def _table(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise InputError(f"{where} is {values!r}: give a table of keys and values")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in fields:
            raise InputError(f"{where} has an unknown key '{name}': choose from {', '.join(fields)}")
        kinds = [get_origin(part) or part for part in get_args(hints[name]) or (hints[name],)]
        if type(value) not in kinds and not (type(value) is int and float in kinds):
            raise InputError(f"'{name}' in {where} is {value!r}: give a {kinds[0].__name__}")
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    for name in required:
        if name not in values:
            raise InputError(f"{where} lacks '{name}': it needs {', '.join(required)}")
    return kind(**values)


def _with_checkpoint(config: AtlasConfig, data: Path) -> AtlasConfig:
    """A relative checkpoint lies in the data folder, like every other source."""
    if config.embedder.checkpoint is None or Path(config.embedder.checkpoint).is_absolute():
        return config
    embedder = dataclasses.replace(config.embedder, checkpoint=str(data / config.embedder.checkpoint))
    return dataclasses.replace(config, embedder=embedder)


def _data_folder(text: str, manifest: Path) -> Path:
    def value(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name) or default
        if found is None:
            raise InputError(f"{manifest} looks for its data in ${name}: set it to the folder that holds the files")
        return found

    folder = Path(_VARIABLE.sub(value, text)).expanduser()
    return folder if folder.is_absolute() else manifest.resolve().parent / folder
