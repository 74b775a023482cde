"""The command line: parse, call the public functions, print."""

from lloki_atlas.cli.main import main

__all__ = ["main"]
