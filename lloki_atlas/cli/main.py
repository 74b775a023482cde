"""`lloki-atlas`: the commands, and how they end (0 done, 2 usage, 3 input, 4 catalog, 5 cluster, 1 a defect)."""

from __future__ import annotations

import sys

import typer

from lloki_atlas import __version__
from lloki_atlas.cli import atlas, autoencoders, catalogs, models, queries, sources
from lloki_atlas.cli.output import fail
from lloki_atlas.errors import InputError, LlokiAtlasError
from lloki_atlas.store.durable import describe_os_error

INTERRUPTED = 130  # what typer makes of Ctrl-C

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Embed spatial transcriptomics slices of any gene panel in one space, and ask the atlas questions.",
    epilog="Begin with: lloki-atlas demo my-first-atlas",
)
for module in (atlas, sources, autoencoders, catalogs, models, queries):
    module.register(app)


@app.callback(invoke_without_command=True)
def version(show: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    """Embed spatial transcriptomics slices of any gene panel in one space, and ask the atlas questions."""
    if show:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point of the console script."""
    try:
        app(standalone_mode=True)
    except LlokiAtlasError as error:
        sys.exit(fail(error))
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError | TimeoutError):
            raise
        sys.exit(fail(InputError(describe_os_error(error))))
    except SystemExit as end:
        if end.code == INTERRUPTED:
            typer.echo("interrupted: what was finished is kept, the same command continues", err=True)
        raise
