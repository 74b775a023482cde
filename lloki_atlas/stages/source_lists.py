"""Many sources at once: a folder, a pattern, several paths, or a sheet with a line a source; always the same list."""

from __future__ import annotations

import csv
import dataclasses
import glob
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lloki_atlas.config import load_toml
from lloki_atlas.errors import InputError
from lloki_atlas.stages.manifest import SliceSource, read_entry
from lloki_atlas.stages.sources import section_values
from lloki_atlas.stages.vendors import find_vendor

SHEETS = (".csv", ".tsv", ".toml")
_SUFFIXES = (".h5ad", ".zarr")
# how a column of a sheet may be called as well: as the option of the command
_ALIASES = {"unit": "coordinate_unit"}
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")

Given = str | Path | SliceSource


def find_sources(sources: Given | Iterable[Given], **defaults: Any) -> list[SliceSource]:
    """List the slices that were asked for, each with its id; nothing is read but sheets and, for sections, `obs`.

    Parameters
    ----------
    sources
        One or several of: a source; a pattern such as `runs/*.h5ad`; a folder of h5ad files, SpatialData stores and
        vendors' output folders; a sheet (CSV, TSV, or TOML with `[[slices]]`) whose columns are the keys of
        `[[slices]]` in a manifest, `source` relative to the sheet; a `SliceSource`.
    defaults
        Values of keys that a sheet does not give.

    Returns
    -------
    list of SliceSource
        Absolute paths, in the order given, within a folder or a pattern by name; an entry with a `slice_key` and no
        value is one for every value.

    Raises
    ------
    InputError
        If a pattern or a folder holds no source, a sheet cannot be used, or two slices have one id.
    """
    given = [sources] if isinstance(sources, str | Path | SliceSource) else list(sources)
    known = {name: value for name, value in defaults.items() if value is not None}
    entries = [part for item in given for entry in _entries(item, known) for part in _sections(entry)]
    if not entries:
        raise InputError("there is no source to ingest: give a file, a folder, a pattern or a sheet")
    _check_ids(entries)
    return entries


def _entries(given: Given, defaults: Mapping[str, Any]) -> Iterator[SliceSource]:
    if isinstance(given, SliceSource):
        yield dataclasses.replace(given, source=str(Path(given.source).expanduser().absolute()))
        return
    text = str(given)
    path = Path(text).expanduser()
    if not path.exists() and glob.has_magic(text):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 (a pattern may be absolute)
        if not found:
            raise InputError(f"nothing is called like {text}: check the pattern")
        paths = [part for name in found for part in _sources_at(name)]
    elif path.suffix.lower() in SHEETS and not path.is_dir():
        yield from _read_sheet(path, defaults)
        return
    else:
        paths = _sources_at(path)
    for source in paths:
        yield _entry({"source": str(source.absolute())}, defaults, where=str(source))


def _sources_at(path: Path) -> list[Path]:
    """The source itself, or those in a folder that is none."""
    if not path.is_dir() or _is_source(path):
        return [path]
    found = [entry for entry in sorted(path.iterdir()) if entry.suffix in _SUFFIXES or _is_source(entry)]
    # a folder without any is handed on: reading it says what is the matter
    return found or [path]


def _is_source(path: Path) -> bool:
    if not path.is_dir():
        return False
    if path.suffix == ".zarr" or (path / "zarr.json").exists() or (path / "tables").is_dir():
        return True
    try:
        return find_vendor(path) is not None
    except InputError:  # a vendor's with something missing
        return True


def _read_sheet(path: Path, defaults: Mapping[str, Any]) -> Iterator[SliceSource]:
    rows = _toml_rows(path) if path.suffix.lower() == ".toml" else _table_rows(path)
    if not rows:
        raise InputError(f"the sheet {path} has no slice: write a line for each")
    for number, row in enumerate(rows, start=1):
        where = f"slice {number} of {path}"
        entry = _entry({_ALIASES.get(name, name): value for name, value in row.items()}, defaults, where=where)
        folder = path.absolute().parent
        gene_map = None if entry.gene_map is None else str(folder / Path(entry.gene_map).expanduser())
        yield dataclasses.replace(entry, source=str(folder / Path(entry.source).expanduser()), gene_map=gene_map)


def _toml_rows(path: Path) -> list[dict[str, Any]]:
    content = load_toml(path)
    rows = content.get("slices", [])
    if set(content) - {"slices"} or not isinstance(rows, list):
        raise InputError(f"the sheet {path} has to be [[slices]] alone, once for every slice: `build` takes a manifest")
    return rows


def _table_rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the sheet {path}: give a text file with a line a slice ({error})") from error
    reader = csv.DictReader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    rows = []
    for number, line in enumerate(reader, start=1):
        if None in line or None in line.values():
            raise InputError(f"slice {number} of {path} has not as many columns as the head: give each its value")
        filled = {name.strip(): text.strip() for name, text in line.items() if text.strip()}
        rows.append({name: _typed(name, text, where=f"slice {number} of {path}") for name, text in filled.items()})
    return rows


def _typed(name: str, text: str, *, where: str) -> Any:
    """A cell of a table as the value that the key has in a manifest."""
    if name == "um_per_unit":
        try:
            return float(text)
        except ValueError:
            raise InputError(f"'um_per_unit' of {where} is '{text}': give a number") from None
    if name == "accept_normalized":
        if text.lower() not in (*_TRUE, *_FALSE):
            raise InputError(f"'accept_normalized' of {where} is '{text}': give true or false")
        return text.lower() in _TRUE
    if name == "label_key" and ";" in text:
        return [part.strip() for part in text.split(";") if part.strip()]
    return text


def _entry(row: Mapping[str, Any], defaults: Mapping[str, Any], *, where: str) -> SliceSource:
    return read_entry({**defaults, **row}, where=where)


def _sections(entry: SliceSource) -> Sequence[SliceSource]:
    """One entry a slice: a file with a `slice_key` and no value holds several."""
    if entry.slice_key is None or entry.slice_value is not None:
        name = entry.slice_id or entry.slice_value or Path(entry.source).stem
        return [dataclasses.replace(entry, slice_id=name)]
    return [
        dataclasses.replace(entry, slice_value=value, slice_id=f"{entry.slice_id}_{value}" if entry.slice_id else value)
        for value in section_values(entry.source, entry.slice_key, table=entry.table)
    ]


def _check_ids(entries: Sequence[SliceSource]) -> None:
    twice = [name for name, count in Counter(entry.slice_id for entry in entries).items() if count > 1]
    if twice:
        first = [entry.source for entry in entries if entry.slice_id == twice[0]][:2]
        more = f" (and {len(twice) - 1} more ids)" if len(twice) > 1 else ""
        raise InputError(
            f"two slices are called '{twice[0]}', of {first[0]} and of {first[1]}{more}: give each its own id in a "
            "sheet with the columns source and slice_id"
        )
