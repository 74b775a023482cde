"""Where results go: objects that are written whole, and objects that many tasks fill tile by tile."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lloki_atlas.config import canonical_json
from lloki_atlas.errors import FormatError
from lloki_atlas.store.arrays import ArraySpec, Rows, create_arrays, open_rows
from lloki_atlas.store.durable import remove_tree, write_whole
from lloki_atlas.store.objects import is_complete
from lloki_atlas.store.places import Place, place
from lloki_atlas.store.publishing import own_staging, publish


@dataclass(frozen=True)
class Output:
    """Where a task's result goes.

    Parameters
    ----------
    path
        The finished object, `<root>/<kind>/<key>...`.
    staging
        Where it is filled before it is published by one rename.
    lineage
        What the object was made of; part of its receipt.
    tiles
        First row of every tile that the task fills; () when it writes or publishes the whole object.
    specs
        The arrays of an object that is filled tile by tile.
    dims
        Dimension names per array of an object that is written whole.
    attributes
        Attributes of the object.
    folder
        True when the task's function fills the staging folder by itself.
    """

    path: str
    staging: str
    lineage: Mapping[str, Any]
    tiles: tuple[int, ...] = ()
    specs: Mapping[str, ArraySpec] = field(default_factory=dict)
    dims: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    folder: bool = False

    def marker(self, start: int) -> Place:
        """The file that says that the rows of the tile that begins with row `start` are on disk."""
        return place(f"{self.staging}.tiles") / f"{start}.json"

    def missing(self) -> tuple[int, ...]:
        """Tiles that the task has yet to fill, none once the object is published."""
        if is_complete(self.path):
            return ()
        return tuple(start for start in self.tiles if not _holds_bytes(self.marker(start)))


@contextmanager
def publishing(output: Output) -> Iterator[str]:
    """A folder of this attempt's own, published at the end: two runs at once never write into each other's."""
    with own_staging(output.staging) as staging:
        yield str(staging)
        publish(staging, output.path, lineage=dict(output.lineage))


class Filling:
    """An object that a task is filling: its arrays are made with the first tile, and stay open."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._rows: dict[str, Rows] = {}

    def write(self, start: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the rows of a tile; its marker says so once they are on the disk."""
        output = self._output
        if not self._rows:
            self._rows = _opened(output)
        files: dict[str, list[Any]] = {}
        for name, rows in self._rows.items():
            files |= rows.write(start, arrays[name])
        # one that a power failure takes along costs its tile once more, so nothing waits for it
        write_whole(output.marker(start), canonical_json({"files": files}))


def publish_tiles(output: Output) -> None:
    """Publish an object whose tiles are all there, with the digests that their writers noted.

    Raises
    ------
    FormatError
        If rows are not as long as they were written. Their marker is gone then, so that the next run writes them again.
    """
    written: dict[str, list[Any]] = {}
    unfit = []
    for marker in _markers(output.staging):
        try:
            files = json.loads(marker.read_bytes())["files"]
            whole = all((place(output.staging) / file).stat().st_size == entry[0] for file, entry in files.items())
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, FileNotFoundError):
            whole = False
        if whole:
            written |= files
        else:
            marker.unlink(missing_ok=True)
            unfit.append(marker.name.removesuffix(".json"))
    if unfit:
        raise FormatError(f"rows {', '.join(unfit)} and on of {output.staging} are not what was written: run again")
    if not _is_there(output) and place(output.staging).is_dir():
        for file in _chunks(output):
            if file not in written and not _holds_bytes(place(output.staging) / file):
                raise FormatError(f"{file} of {output.staging} was never written: run again")
        _opened(output)
    # markers go first: one that outlived the rows it speaks of would let them be skipped for ever
    remove_tree(f"{output.staging}.tiles")
    publish(output.staging, output.path, lineage=dict(output.lineage), written=written)


def _opened(output: Output) -> dict[str, Rows]:
    """The arrays to fill, made where they are not there; their form is written anew where a power failure took it."""
    try:
        create_arrays(output.staging, dict(output.specs), attributes=dict(output.attributes))
    except FormatError:
        for name in ("", *output.specs):  # rows and their markers are what they were
            (place(output.staging) / name / "zarr.json").unlink(missing_ok=True)
        create_arrays(output.staging, dict(output.specs), attributes=dict(output.attributes))
    return {name: open_rows(output.staging, name, mode="r+") for name in output.specs}


def _is_there(output: Output) -> bool:
    """Whether another run made the object: a rename makes it whole, in a bucket its receipt."""
    final = place(output.path)
    return final.is_dir() if isinstance(final, Path) else is_complete(final)


def _chunks(output: Output) -> Iterator[str]:
    """Files of all rows, relative to the object."""
    for name, spec in output.specs.items():
        for number in range(-(-spec.shape[0] // spec.chunk_rows)):
            yield "/".join([name, "c", str(number), *("0" for _ in spec.shape[1:])])


def _markers(staging: str) -> list[Place]:
    folder = place(f"{staging}.tiles")
    return sorted(path for path in folder.iterdir() if path.name.endswith(".json")) if folder.is_dir() else []


def _holds_bytes(marker: Place) -> bool:
    try:
        return marker.stat().st_size > 0
    except FileNotFoundError:
        return False
