"""Errors: the tree, what programs and shells see of them, and that they travel between processes."""

from __future__ import annotations

import inspect
import pickle
import re
import traceback

import pytest

from lloki_atlas import errors
from lloki_atlas.errors import (
    CheckpointError,
    ClusterError,
    ConflictError,
    FormatError,
    InputError,
    LlokiAtlasError,
    MemoryBudgetError,
    NotFoundError,
    StorageError,
)

# class, kind, exit code, built-in that it also is
TREE = [
    (InputError, "input", 3, ValueError),
    (NotFoundError, "not-found", 3, KeyError),
    (CheckpointError, "checkpoint", 3, Exception),
    (ConflictError, "conflict", 4, Exception),
    (FormatError, "format", 4, Exception),
    (StorageError, "storage", 4, OSError),
    (MemoryBudgetError, "memory-budget", 5, Exception),
    (ClusterError, "cluster", 5, Exception),
]
SENTENCE = "there is no slice 'a' in version 3: choose from b, c"
every_class = pytest.mark.parametrize("kind", [LlokiAtlasError, *(row[0] for row in TREE)])


@pytest.mark.parametrize(("error", "kind", "exit_code", "built_in"), TREE)
def test_an_error_has_its_place_in_the_tree(error, kind, exit_code, built_in):
    assert issubclass(error, LlokiAtlasError)
    assert issubclass(error, built_in)
    assert (error.kind, error.exit_code) == (kind, exit_code)


def test_the_module_has_exactly_the_errors_of_the_tree():
    defined = {kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__}
    assert defined == {LlokiAtlasError, *(row[0] for row in TREE)}


def test_kinds_are_unique():
    kinds = [LlokiAtlasError.kind, *(row[0].kind for row in TREE)]
    assert len(set(kinds)) == len(kinds)


def test_a_purposeful_error_never_ends_like_a_defect_or_a_usage_error():
    assert {row[0].exit_code for row in TREE}.isdisjoint({0, 1, 2})


def test_the_tree_in_the_documentation_is_the_real_one():
    assert set(re.findall(r"── (\w+)", str(errors.__doc__))) == {row[0].__name__ for row in TREE}


@every_class
def test_a_message_prints_as_the_sentence_that_it_is(kind):
    assert str(kind(SENTENCE)) == SENTENCE


@every_class
def test_a_traceback_ends_in_the_sentence_without_quotes(kind):
    last = traceback.format_exception_only(kind(SENTENCE))[-1]
    assert last.endswith(f"{kind.__name__}: {SENTENCE}\n")


@every_class
def test_an_error_survives_pickling(kind):
    back = pickle.loads(pickle.dumps(kind(SENTENCE)))
    assert (type(back), back.args, str(back)) == (kind, (SENTENCE,), SENTENCE)


@every_class
def test_an_error_without_a_message_prints_its_name(kind):
    assert str(kind()) == kind.__name__


@every_class
def test_every_error_says_what_it_is_for(kind):
    assert kind.__doc__
    assert kind.__doc__.strip().endswith(".")


@pytest.mark.parametrize("kind", [row[0] for row in TREE])
def test_no_error_of_the_tree_is_a_kind_of_another(kind):
    assert {row[0] for row in TREE if issubclass(kind, row[0])} == {kind}
