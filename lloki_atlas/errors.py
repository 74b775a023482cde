"""The errors of lloki-atlas, grouped by what a caller would do about them.

LlokiAtlasError
├── InputError            (also ValueError)  what was given cannot be used: mend the input and call again
├── NotFoundError         (also KeyError)    a slice, version, model or column of that name does not exist
├── MemoryBudgetError                        the plan does not fit: smaller tiles, larger workers
├── ConflictError                            another writer committed first: open the head and try again
├── FormatError                              a store is damaged, or was written by a newer version
├── StorageError          (also OSError)     object storage cannot be reached, or refuses: run again
├── CheckpointError                          weights and their description do not fit each other
└── ClusterError                             workers are missing, lost, or too small for the plan

Every message is one sentence or two: what is wrong, where, and how to mend it.
`kind` is stable and meant for programs; `exit_code` is what the command line ends with.
"""

from __future__ import annotations


class LlokiAtlasError(Exception):
    """Base of every error that lloki-atlas raises on purpose."""

    kind = "error"
    exit_code = 1

    def __str__(self) -> str:
        # KeyError would print the repr of its argument; a message is a sentence, not a key
        return str(self.args[0]) if self.args else self.__class__.__name__


class InputError(LlokiAtlasError, ValueError):
    """What was given cannot be used; nothing was changed."""

    kind = "input"
    exit_code = 3


class NotFoundError(LlokiAtlasError, KeyError):
    """A slice, version, model, layer or column of that name does not exist."""

    kind = "not-found"
    exit_code = 3


class CheckpointError(LlokiAtlasError):
    """Weights and their description do not fit each other."""

    kind = "checkpoint"
    exit_code = 3


class ConflictError(LlokiAtlasError):
    """Another writer committed a change to the same slice or setting first."""

    kind = "conflict"
    exit_code = 4


class FormatError(LlokiAtlasError):
    """A store is damaged, incomplete, or was written by a newer version."""

    kind = "format"
    exit_code = 4


class StorageError(LlokiAtlasError, OSError):
    """Object storage cannot be reached, refuses, or does not honour conditions; nothing was committed."""

    kind = "storage"
    exit_code = 4


class MemoryBudgetError(LlokiAtlasError):
    """A task is projected to need more memory than a worker has; nothing was started."""

    kind = "memory-budget"
    exit_code = 5


class ClusterError(LlokiAtlasError):
    """Workers are missing, were lost too often, or lack a resource that the plan needs."""

    kind = "cluster"
    exit_code = 5
