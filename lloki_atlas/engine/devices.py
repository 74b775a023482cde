"""What a machine and a worker process have: GPUs that may be used, and threads that prepare work for one.

torch is not asked: it would take memory of every GPU in every process that asks.
"""

from __future__ import annotations

import os
from pathlib import Path

from lloki_atlas.errors import InputError

VISIBLE = "CUDA_VISIBLE_DEVICES"
HOST_THREADS = "LLOKI_ATLAS_HOST_THREADS"
_DRIVER = Path("/proc/driver/nvidia/gpus")


def visible_gpus() -> tuple[str, ...]:
    """Names of the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` takes them.

    Those of `CUDA_VISIBLE_DEVICES` where it is set, up to the first that is no device, as CUDA reads it; else one for
    each that the driver lists.
    """
    given = os.environ.get(VISIBLE)
    if given is None:
        return tuple(str(number) for number, _ in enumerate(_DRIVER.iterdir())) if _DRIVER.is_dir() else ()
    names: list[str] = []
    for name in (part.strip() for part in given.split(",")):
        if not name or name.startswith("-") or name == "NoDevFiles":
            break
        names.append(name)
    return tuple(names)


def host_threads() -> int:
    """Threads that prepare work for the device of this process: `LLOKI_ATLAS_HOST_THREADS`, 1 where it is not set.

    Raises
    ------
    InputError
        If the variable is no positive number.
    """
    given = os.environ.get(HOST_THREADS, "1")
    if not given.isdecimal() or int(given) < 1:
        raise InputError(f"{HOST_THREADS} is '{given}': set it to the threads of a GPU worker, 1 or more")
    return int(given)
