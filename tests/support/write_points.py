"""Write points: every call to the system that changes something under a folder, named, listed, and died at.

The code under test has no hooks. Python announces opening, renaming, linking, removing and making folders to audit
hooks, whoever asks for them; `os.fsync`, which it does not announce, is wrapped. A hook stays for as long as its
process lives, so only a process of its own is watched.
"""
# paths are text here: that is what a hook is given
# ruff: noqa: PTH104, PTH106, PTH108, PTH109, PTH110, PTH112, PTH115, PTH117, PTH118, PTH120, PTH202

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# how a process ends at a point
BEFORE = "before"  # the call is not made; just after it is just before the next
TORN = "torn"  # nor is half of the file that was opened before it on the disk: killed in mid-write
EMPTIED = "emptied"  # a power failure: files that were not synced are there and empty
FORGOTTEN = "forgotten"  # a power failure: what was not synced never happened, files, names and folders
KILLS, POWER = (BEFORE, TORN), (EMPTIED, FORGOTTEN)

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_KEY = re.compile(r"[0-9a-f]{32}")
_SHORT = re.compile(r"-[0-9a-f]{8}\b")
# zarr's and our own temporary names
_TEMPORARY = re.compile(r"^\.(.+)\.<key>\.tmp$|^(.*)\.<key>\.partial$")


@dataclass(frozen=True)
class Point:
    """The `number`-th call of this name, from 0, and how to end there."""

    name: str
    number: int
    ending: str = BEFORE

    def __str__(self) -> str:
        return f"{self.name} #{self.number} {self.ending}"


@dataclass
class WritePoints:
    """Watch the calls that this process makes under `root`, and die at one.

    Parameters
    ----------
    root
        The folder.
    stop
        Where to die; None only lists.
    claim
        Of several processes that watch for one point, only the one that makes this file dies.
    """

    root: Path
    stop: Point | None = None
    seen: list[Point] = field(default_factory=list)
    # a file that is made by the first who dies; whoever finds it lives on
    claim: Path | None = None
    # every file that was opened to be written, under the name that it has now
    written: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._prefix = f"{os.path.realpath(self.root)}{os.sep}"
        self._counts: Counter[str] = Counter()
        self._opened = ""  # by the call before
        self._unsynced: set[str] = set()
        self._undo: list[tuple[str, Callable[[], None]]] = []  # folder that has to be synced -> how to forget

    def install(self) -> None:
        """Begin; there is no way back."""
        import sys

        real = os.fsync

        def fsync(descriptor: Any) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            path = self._inside(os.readlink(f"/proc/self/fd/{number}"))
            if path:
                self._arrive("fsync", path)
                self._unsynced.discard(path)
                self._undo = [(folder, undo) for folder, undo in self._undo if folder != path]
            real(descriptor)

        os.fsync = fsync
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        heard = _EVENTS.get(event)
        if heard is not None:
            heard(self, *arguments)

    def _open(self, path: Any, mode: Any, flags: int) -> None:
        if not flags & _WRITING or isinstance(path, int):
            return
        path = self._inside(path)
        if not path:
            return
        self._arrive("open", path)
        self._opened = path
        self.written.add(path)
        self._unsynced.add(path)
        if not os.path.exists(path):
            self._later(path, lambda: os.unlink(path))

    def _rename(self, source: Any, target: Any, source_fd: int = -1, target_fd: int = -1) -> None:
        source, target = self._inside(source, source_fd), self._inside(target, target_fd)
        if not source or not target:
            return
        self._arrive("rename", target)
        if not os.path.exists(target):
            self._later(target, lambda: os.rename(target, source))
        self.written = {_moved(name, source, target) for name in self.written}
        self._unsynced = {_moved(name, source, target) for name in self._unsynced}

    def _link(self, source: Any, target: Any, source_fd: int = -1, target_fd: int = -1) -> None:
        source, target = self._inside(source, source_fd), self._inside(target, target_fd)
        if not target:
            return
        self._arrive("link", target)
        if not os.path.exists(target):
            self._later(target, lambda: os.unlink(target))
        self.written.add(target)
        if source in self._unsynced:
            self._unsynced.add(target)

    def _remove(self, path: Any, descriptor: int = -1) -> None:
        path = self._inside(path, descriptor)
        if path and os.path.lexists(path):
            self._arrive("unlink", path)
            self.written.discard(path)
            self._unsynced.discard(path)

    def _mkdir(self, path: Any, mode: int, descriptor: int = -1) -> None:
        path = self._inside(path, descriptor)
        # asking for one that is there changes nothing
        if path and not os.path.isdir(path):
            self._arrive("mkdir", path)
            self._later(path, lambda: os.rmdir(path))

    def _rmdir(self, path: Any, descriptor: int = -1) -> None:
        path = self._inside(path, descriptor)
        if path:
            self._arrive("rmdir", path)

    def _truncate(self, path: Any, length: int) -> None:
        path = self._inside(path) if not isinstance(path, int) else ""
        if path:
            self._arrive("truncate", path)

    def _later(self, path: str, undo: Callable[[], None]) -> None:
        self._undo.append((os.path.dirname(path), undo))

    def _inside(self, path: Any, descriptor: int = -1) -> str:
        """The absolute path when it is the root or lies under it, else ""."""
        text = os.fsdecode(path)
        if not os.path.isabs(text):
            base = os.getcwd() if descriptor < 0 else os.readlink(f"/proc/self/fd/{descriptor}")
            text = os.path.join(base, text)
        text = os.path.normpath(text)
        return text if f"{text}{os.sep}".startswith(self._prefix) else ""

    def _arrive(self, operation: str, path: str) -> None:
        name = f"{operation} {describe(path[len(self._prefix) :])}"
        point = Point(name, self._counts[name])
        self._counts[name] += 1
        opened, self._opened = self._opened, ""
        endings = [BEFORE, *([TORN] if opened else []), *([EMPTIED] if self._unsynced else [])]
        endings += [FORGOTTEN] if self._undo or self._unsynced else []
        if self.stop is None:
            self.seen += [Point(name, point.number, ending) for ending in endings]
        elif (self.stop.name, self.stop.number) == (name, point.number) and self._is_first():
            self._end(opened)

    def _is_first(self) -> bool:
        if self.claim is None:
            return True
        try:
            os.close(os.open(self.claim, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def _end(self, opened: str) -> None:
        ending, self.stop = self.stop.ending if self.stop else BEFORE, None
        undo, unsynced = self._undo, self._unsynced
        self._prefix = "\0"  # what is done from here on is no point
        if ending == TORN:
            _cut(opened, keep=0.5)
        if ending in POWER:
            for path in unsynced:
                _cut(path, keep=0.0)
        if ending == FORGOTTEN:
            for _, forget in reversed(undo):
                with suppress(OSError):  # it was removed or moved since, or holds something that was synced
                    forget()
        os.kill(os.getpid(), signal.SIGKILL)


_EVENTS: dict[str, Callable[..., None]] = {
    "open": WritePoints._open,
    "os.rename": WritePoints._rename,
    "os.link": WritePoints._link,
    "os.symlink": WritePoints._link,
    "os.remove": WritePoints._remove,
    "os.mkdir": WritePoints._mkdir,
    "os.rmdir": WritePoints._rmdir,
    "os.truncate": WritePoints._truncate,
}


def describe(relative: str) -> str:
    """Name a place in a catalog without keys, numbers and tokens: all chunks of all arrays are one, and so on."""
    parts = [_KEY.sub("<key>", part) for part in relative.split("/")]
    found = _TEMPORARY.match(parts[-1])
    if found:
        parts[-1] = (found[1] or {"zarr": "zarr.json"}.get(found[2], found[2]) or "chunk") + " (temporary)"
    if parts[0] == "versions" and len(parts) > 1:
        parts[-1] = re.sub(r"\d{8}\.json", "<version>.json", parts[-1])
    if len(parts) < 2:
        return parts[0] or "the root"
    top = _SHORT.sub("-<try>", parts[1])
    top = re.sub(r"(search\d+)-\d+-by-\d+", r"\1", top)
    if len(parts) == 2:
        return f"{parts[0]}/{top}"
    leaf = parts[-1]
    if top.endswith(".tiles"):
        leaf = re.sub(r"^\d+\.json", "<row>.json", leaf)
    elif "c" in parts[2:-1] or leaf.removesuffix(" (temporary)") == "c":
        # `c` is the folder of an array's chunks, and the chunk of one without axes
        leaf = "chunk (temporary)" if leaf.endswith(" (temporary)") else "chunk"
    elif "." not in leaf:
        leaf = "folder"
    return f"{parts[0]}/{top}/{leaf}"


def _moved(name: str, source: str, target: str) -> str:
    if name == source:
        return target
    return target + name[len(source) :] if name.startswith(source + os.sep) else name


def _cut(path: str, *, keep: float) -> None:
    with suppress(FileNotFoundError):
        os.truncate(path, int(os.path.getsize(path) * keep))
