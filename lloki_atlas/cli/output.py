"""How commands print: tables for people, one JSON document for machines, errors in one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import typer

from lloki_atlas.errors import LlokiAtlasError


def emit(content: Any, *, as_json: bool, text: str) -> None:
    """Print `content` as JSON, or `text`."""
    typer.echo(json.dumps(content, indent=1, default=_plain) if as_json else text)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Left-aligned columns of text, two spaces apart."""
    lines = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def fail(error: LlokiAtlasError) -> int:
    """Print one line on standard error; return the exit code."""
    typer.echo(f"error: {' '.join(str(error).split())}", err=True)
    return error.exit_code


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)
