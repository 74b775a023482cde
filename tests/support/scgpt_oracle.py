"""Call the published `scgpt` package (0.2.4) as an oracle, with stand-ins for what it imports and does not use."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch


class _Vocab:
    """The part of torchtext's vocabulary that scgpt's embedding calls."""

    def __init__(self, other: _Vocab | None = None) -> None:
        self._rows: dict[str, int] = {} if other is None else dict(other._rows)
        self._default: int | None = None

    @property
    def vocab(self) -> _Vocab:
        return self

    def __contains__(self, token: str) -> bool:
        return token in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, token: str) -> int:
        return self._rows[token] if self._default is None else self._rows.get(token, self._default)

    def __call__(self, tokens: Sequence[str]) -> list[int]:
        return [self[token] for token in tokens]

    def insert_token(self, token: str, row: int) -> None:
        assert row == len(self._rows), "scgpt inserts in order of the rows"
        self._rows[token] = row

    def append_token(self, token: str) -> None:
        self.insert_token(token, len(self._rows))

    def set_default_index(self, row: int | None) -> None:
        self._default = row


def _new_vocab(ordered: dict[str, int], **_: Any) -> _Vocab:
    vocab = _Vocab()
    for token in ordered:
        vocab.append_token(token)
    return vocab


def _stand_ins() -> dict[str, types.ModuleType]:
    contents: dict[str, dict[str, Any]] = {
        "IPython": {"get_ipython": lambda: None},
        "datasets": {"Dataset": object, "load_dataset": None},
        "torchtext": {},
        "torchtext.vocab": {"Vocab": _Vocab, "vocab": _new_vocab},
    }
    modules = {}
    for name, content in contents.items():
        modules[name] = types.ModuleType(name)
        modules[name].__dict__.update(content)
    modules["torchtext"].__dict__["vocab"] = modules["torchtext.vocab"]
    return modules


def import_scgpt() -> types.ModuleType:
    """Import the package, or skip the test where it, or what it needs, is absent."""
    if importlib.util.find_spec("scgpt") is None:
        pytest.skip("the scgpt package is not installed: pip install --no-deps scgpt==0.2.4")
    before = {name: sys.modules.get(name) for name in _stand_ins()}
    sys.modules.update(_stand_ins())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import scgpt
            import scgpt.tasks
    except ImportError as error:
        pytest.skip(f"the scgpt package does not import here: {error}")
    finally:
        # other packages look in sys.modules to see what is installed
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
    return scgpt


def embed_with_package(folder: Path, rows: np.ndarray, genes: Sequence[str], *, batch_size: int = 64) -> np.ndarray:
    """Return the package's embedding of dense rows, (n_cells, embsize) float32."""
    scgpt = import_scgpt()
    import anndata

    table = anndata.AnnData(np.asarray(rows, dtype=np.float32))
    table.var["feature_name"] = list(genes)
    with _quiet():
        embedded = scgpt.tasks.embed_data(
            table, folder, batch_size=batch_size, device="cpu", use_fast_transformer=False
        )
    return np.asarray(embedded.obsm["X_scGPT"])


def bin_with_package(values: np.ndarray, *, n_bins: int = 51) -> np.ndarray:
    """Return the package's value bins of one cell; random for equal values."""
    import_scgpt()
    from scgpt.preprocess import binning

    return np.asarray(binning(values.copy(), n_bins))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Load data in this process, without torch's fused layers (slow on a CPU), warnings or messages."""
    fused = torch.backends.mha.get_fastpath_enabled()
    logger = logging.getLogger("scGPT")
    level = logger.level
    torch.backends.mha.set_fastpath_enabled(False)
    logger.setLevel(logging.ERROR)
    try:
        # it starts as many loaders as there are cores: none
        with mock.patch.object(os, "sched_getaffinity", return_value=set()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        logger.setLevel(level)
