"""A small disk that is full or nearly so: a tmpfs of a test's own, and ballast on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BALLAST = "ballast"


@contextmanager
def small_disk(folder: Path, *, megabytes: int = 20, inodes: int | None = None) -> Iterator[Path]:
    """Mount a small disk at a new folder; skips the test where that is not allowed."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small disk is mounted on Linux, by root, with `mount`")
    folder.mkdir(parents=True)
    options = f"size={megabytes}m" + (f",nr_inodes={inodes}" if inodes is not None else "")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small disk failed: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        # with -l, because a thread of a library may still have a file open
        subprocess.run(["umount", "-l", folder], check=True, capture_output=True)


def leave(disk: Path, n_bytes: int) -> None:
    """Fill the disk up to so many free bytes; called again, it makes more room or less."""
    ballast = disk / BALLAST
    ballast.touch()
    held = ballast.stat().st_size
    size = max(0, held + free_bytes(disk) - n_bytes)
    with open(ballast, "r+b") as handle:
        if size < held:
            handle.truncate(size)
        elif size > held:
            os.posix_fallocate(handle.fileno(), held, size - held)


def leave_inodes(disk: Path, n: int) -> None:
    """Leave so many files that can still be made; called again, it leaves more or fewer."""
    folder = disk / f"{BALLAST}.files"
    folder.mkdir(exist_ok=True)
    while (free := os.statvfs(disk).f_ffree) != n:
        names = sorted(folder.iterdir())
        if free < n:
            for path in names[: n - free]:
                path.unlink()
            if not names:
                return
        else:
            for number in range(free - n):
                (folder / f"{len(names) + number:06d}").touch()


def free_bytes(disk: Path) -> int:
    """Bytes that a file may still take."""
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize
