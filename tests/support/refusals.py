"""What a refusal of the command line looks like: one sentence, an exit code, and a catalog as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from support.commands import Result, run_main
from support.folders import folder_digest

OPTIONS = {"--technology": "MERFISH", "--organism": "mouse", "--unit": "micrometer", "--slice-id": "new"}


def ingest_arguments(catalog: Path, source: Path, *extra: object, **changed: object) -> list[object]:
    """Arguments of `ingest`; an option that is None is left out."""
    options = {**OPTIONS, **{f"--{name.replace('_', '-')}": value for name, value in changed.items()}}
    given = [part for name, value in options.items() if value is not None for part in (name, value)]
    return ["ingest", catalog, source, *given, *extra]


def assert_refused(result: Result, *words: str, code: int = 3) -> None:
    """One line that says what is wrong and how to mend it, and nothing else."""
    assert result.code == code, result.err
    assert result.out == ""
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 500
    assert re.search(": .|needs", lines[0].removeprefix("error: ")), "what is wrong, then how to mend it"
    for word in words:
        assert word in lines[0]


def assert_refused_by(
    catalog: Path, command: list[object], *words: str, code: int = 3, run: Callable[..., Result] = run_main
) -> None:
    """Refused, and every name and byte of the catalog is as it was."""
    before = folder_digest(catalog)
    assert_refused(run(*command), *words, code=code)
    assert folder_digest(catalog) == before
