"""Who is at work in a catalog: small files that writers and collectors of garbage leave while they are at it.

Nothing that is committed depends on them; they keep a collector from taking objects that a writer is about to name.
Each announces itself first and looks for the other afterwards, so of two that begin together at least one sees the
other: a writer waits and then refuses, a collector refuses at once. A file is refreshed every minute; one that was not
for a quarter of an hour, or whose process is gone from this machine, is nobody's.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from lloki_atlas.config import canonical_json, digest
from lloki_atlas.errors import ConflictError
from lloki_atlas.store.durable import write_whole
from lloki_atlas.store.places import Place

WRITERS = "writers"
BEAT_SECONDS = 60.0
STALE_SECONDS = 15 * 60.0
WAIT_SECONDS = 30.0
_LOOK_SECONDS = 0.1

# the kind is part of the name, so that writers find collectors by one listing
_COLLECTOR = "collecting-"
LEASE_NAME = re.compile(rf"({_COLLECTOR})?[0-9a-f]{{32}}\.json")


@dataclass
class _Held:
    """A lease of this process; `count` is how many calls share it."""

    path: Place
    content: bytes
    count: int = 1
    ended: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None

    def begin(self) -> None:
        write_whole(self.path, self.content)
        self.thread = threading.Thread(target=self._beat, name="lloki-atlas lease", daemon=True)
        self.thread.start()

    def refresh(self) -> None:
        """Say that the process is alive."""
        if isinstance(self.path, Path):
            try:
                os.utime(self.path)  # needs no space on a full disk
                return
            except FileNotFoundError:
                pass
        write_whole(self.path, self.content)

    def end(self) -> None:
        self.ended.set()
        if self.thread is not None:
            self.thread.join(timeout=BEAT_SECONDS)
        self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self.ended.wait(BEAT_SECONDS):
            try:
                self.refresh()
            except OSError:  # the next beat tries again
                continue


# of each process (a fork has none of its parent's) the lease of each root that it writes to
_held: dict[tuple[int, str], _Held] = {}
_guard = threading.Lock()


@contextmanager
def writing(root: Place, what: str, *, wait_seconds: float | None = None) -> Iterator[None]:
    """Announce a writer for as long as the block lasts; blocks inside others share one announcement.

    Parameters
    ----------
    root
        The catalog's root.
    what
        What is being done, for the message of a collector that has to wait.
    wait_seconds
        How long to wait for a collector to end; WAIT_SECONDS when None.

    Raises
    ------
    ConflictError
        If garbage is still being collected then.
    """
    held = _enter(root, what, time.monotonic() + (WAIT_SECONDS if wait_seconds is None else wait_seconds))
    key = (os.getpid(), str(root))
    with _guard:
        _held.setdefault(key, held)
    try:
        yield
    finally:
        _release(root, held)


@contextmanager
def collecting(root: Place) -> Iterator[Callable[[], None]]:
    """Announce a collector of garbage for as long as the block lasts.

    Yields
    ------
    A function to call every few seconds while deleting: it raises ConflictError when somebody writes after all, which
    can be when this process was stopped for so long that it was taken for dead.

    Raises
    ------
    ConflictError
        If there is a writer, or another collector; it is named.
    """
    held = _announce(root, "collecting garbage", prefix=_COLLECTOR)

    def check() -> None:
        held.refresh()
        others = _others(root, held)
        if others:
            raise ConflictError(_sentence(root, "is in use", others[0]))

    try:
        check()
        yield check
    finally:
        held.end()


def at_work(root: Place) -> list[dict[str, Any]]:
    """Say who is at work: `what`, `host`, `pid`, `started`, `file`, and whether it is `collecting`."""
    return _others(root, None)


def _enter(root: Place, what: str, until: float) -> _Held:
    while True:
        held = _share(root)
        is_new = held is None
        if held is None:
            held = _announce(root, what, prefix="")
        try:
            if not is_new:
                held.refresh()
            others = _others(root, held, prefix=_COLLECTOR)
        except BaseException:
            _release(root, held)
            raise
        if not others:
            return held
        # a collector that looks again shall not take one who waits for a writer
        _release(root, held)
        if time.monotonic() >= until:
            raise ConflictError(_sentence(root, "is being collected", others[0]))
        time.sleep(_LOOK_SECONDS)


def _share(root: Place) -> _Held | None:
    with _guard:
        held = _held.get((os.getpid(), str(root)))
        if held is not None:
            held.count += 1
        return held


def _announce(root: Place, what: str, *, prefix: str) -> _Held:
    content = {
        "what": what,
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    held = _Held(root / WRITERS / f"{prefix}{uuid.uuid4().hex}.json", canonical_json(content))
    held.begin()
    return held


def _release(root: Place, held: _Held) -> None:
    with _guard:
        held.count -= 1
        if held.count > 0:
            return
        key = (os.getpid(), str(root))
        if _held.get(key) is held:
            del _held[key]
    held.end()


def _others(root: Place, own: _Held | None, *, prefix: str = "") -> list[dict[str, Any]]:
    """Leases that are alive, but for one's own; who has one removes the files of those that are not."""
    try:
        entries: list[Place] = list((root / WRITERS).iterdir())
    except FileNotFoundError:
        return []
    found = []
    for entry in entries:
        is_other = own is None or entry.name != own.path.name
        if is_other and entry.name.startswith(prefix) and LEASE_NAME.fullmatch(entry.name):
            lease = _read(entry, _now(own), sweep=own is not None)
            if lease is not None:
                found.append(lease)
    return found


def _now(own: _Held | None) -> float:
    """The time by the clock of the storage, so that clocks of two machines need not agree."""
    try:
        return time.time() if own is None else own.path.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def _read(file: Place, now: float, *, sweep: bool) -> dict[str, Any] | None:
    """What a lease says, None when it is nobody's any more."""
    try:
        age, data = now - file.stat().st_mtime, file.read_bytes()
        content = json.loads(data or b"{}")
    except FileNotFoundError:
        return None  # it ended just now
    except ValueError:
        content = {}
    content = content if isinstance(content, dict) else {}
    pid = content.get("pid")
    is_gone = content.get("machine") == _machine() and isinstance(pid, int) and not _runs(pid)
    is_gone = is_gone or not data  # leases appear whole: a power failure emptied it, and ended who wrote it
    if is_gone or age > STALE_SECONDS:
        if sweep:
            file.unlink(missing_ok=True)
        return None
    said = {name: content.get(name, "unknown") for name in ("what", "host", "pid", "started")}
    return {**said, "file": str(file), "collecting": file.name.startswith(_COLLECTOR)}


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is somebody else's
        return True
    return True


@cache
def _machine() -> str:
    """What tells the machine and the space of process numbers from every other: containers may share a name."""
    try:
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    except OSError:
        parts = [str(uuid.getnode())]
    return digest([socket.gethostname(), *parts])


def _sentence(root: Place, what: str, lease: dict[str, Any]) -> str:
    return (
        f"{root} {what}: process {lease['pid']} on {lease['host']} ({lease['what']}) since {lease['started']}. "
        f"Wait until it ends; if it is gone for good, remove {lease['file']}"
    )
