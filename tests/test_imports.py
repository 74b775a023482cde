"""Importing costs nothing: the package and the help of its commands load none of the heavy libraries."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lloki_atlas

HEAVY = ("torch", "numba", "spatialdata", "anndata", "dask", "distributed", "zarr", "pandas", "scipy")
COMMANDS = (
    "",
    "build",
    "create",
    "demo",
    "ingest",
    "plan",
    "run",
    "simulate",
    "train",
    "adapt",
    "status",
    "sparsity",
    "log",
    "verify",
    "remove",
    "rollback",
    "gc",
    "export-version",
    "import-version",
    "configure",
)
IMPORT = "import lloki_atlas; [lloki_atlas.__version__, dir(lloki_atlas)]"
HELP = """
import contextlib, io, sys
from lloki_atlas.cli import main
for command in {commands!r}:
    sys.argv = ["lloki-atlas", *command.split(), "--help"]
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            main()
        except SystemExit as end:
            assert not end.code, (command, end.code)
    assert "Usage" in text.getvalue(), command
"""


@pytest.fixture(scope="module", params=["package", "help"])
def loaded(request):
    """Names of all modules that a fresh process holds afterwards."""
    code = IMPORT if request.param == "package" else HELP.format(commands=COMMANDS)
    code += "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("library", HEAVY)
def test_a_heavy_library_is_not_loaded(loaded, library):
    assert not {name for name in loaded if name.split(".")[0] == library}


def test_the_installed_command_prints_its_help():
    command = Path(sys.executable).with_name("lloki-atlas")
    if not command.exists():
        pytest.skip("the command is not installed beside this Python")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, "build" in done.stdout) == (0, True)


@pytest.mark.parametrize("name", lloki_atlas.__all__)
def test_every_public_name_resolves(name):
    assert getattr(lloki_atlas, name) is not None


@pytest.mark.parametrize("name", [name for name in lloki_atlas.__all__ if name != "__version__"])
def test_a_public_name_is_documented_and_called_as_where_it_is_defined(name):
    value = getattr(lloki_atlas, name)
    assert value.__name__ == name
    assert value.__doc__


def test_all_equals_the_lazy_table():
    assert sorted(lloki_atlas.__all__) == sorted([*lloki_atlas._PUBLIC, "__version__"])


def test_type_checkers_are_told_of_the_same_names_in_the_same_places():
    tree = ast.parse(Path(lloki_atlas.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {alias.name: node.module for node in block.body for alias in node.names}
    assert told == lloki_atlas._PUBLIC


def test_dir_lists_the_public_names():
    assert dir(lloki_atlas) == sorted(lloki_atlas.__all__)


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'lloki_atlas' has no attribute 'embed_everything'"):
        lloki_atlas.embed_everything  # noqa: B018


def test_a_public_name_is_imported_from_where_the_table_says():
    for name, module in lloki_atlas._PUBLIC.items():
        assert getattr(importlib.import_module(module), name) is getattr(lloki_atlas, name)


def test_the_version_is_that_of_the_installed_distribution():
    assert importlib.metadata.version("lloki-atlas") == lloki_atlas.__version__
