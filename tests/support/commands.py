"""Run the command line as a user does: in this process through its entry point, or in a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import warnings
from dataclasses import dataclass
from typing import Any
from unittest import mock

from lloki_atlas.cli.main import main

# what Python shows of its own accord
_SILENT = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


@dataclass(frozen=True)
class Result:
    """How a command ended: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on standard output; NaN and Infinity are no JSON."""
        return json.loads(self.out, parse_constant=_refuse)


def run_main(*arguments: object) -> Result:
    """Call the entry point in this process; warnings that a user would see are part of `err`."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["lloki-atlas", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.resetwarnings()
        for category in _SILENT:
            warnings.simplefilter("ignore", category)
        try:
            main()
            code: Any = 0
        except SystemExit as end:
            code = end.code or 0
    shown = [warnings.formatwarning(w.message, w.category, w.filename, w.lineno) for w in caught]
    return Result(code, out.getvalue(), err.getvalue() + "".join(shown))


def run_process(*arguments: object) -> Result:
    """Call the entry point in a process of its own."""
    command = [sys.executable, "-c", "from lloki_atlas.cli.main import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
