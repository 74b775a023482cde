"""lloki-atlas: LLOKI embeddings of spatial transcriptomics slices, out of core and at the scale of an atlas.

Public names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "AtlasConfig": "lloki_atlas.config",
    "adapt_autoencoder": "lloki_atlas.stages.adapt",
    "adaptation_report": "lloki_atlas.stages.adapt",
    "build": "lloki_atlas.stages.build",
    "configure": "lloki_atlas.stages.configure",
    "create_catalog": "lloki_atlas.stages.create",
    "export_version": "lloki_atlas.store.portable",
    "fit_reference": "lloki_atlas.stages.reference",
    "gc": "lloki_atlas.store.retention",
    "history": "lloki_atlas.store.catalog",
    "import_version": "lloki_atlas.store.portable",
    "ingest": "lloki_atlas.stages.ingest",
    "ingest_many": "lloki_atlas.stages.ingest_many",
    "nearest_cells": "lloki_atlas.query",
    "open_catalog": "lloki_atlas.store.catalog",
    "plan": "lloki_atlas.stages.pipeline",
    "pretrain": "lloki_atlas.stages.pretrain",
    "propagation_report": "lloki_atlas.stages.reports",
    "propagate_slice": "lloki_atlas.stages.notebook",
    "remove": "lloki_atlas.store.revert",
    "rollback": "lloki_atlas.store.revert",
    "run": "lloki_atlas.stages.pipeline",
    "select_cells": "lloki_atlas.query",
    "simulate": "lloki_atlas.simulation",
    "status": "lloki_atlas.stages.status",
    "train_autoencoder": "lloki_atlas.stages.pipeline",
    "verify": "lloki_atlas.store.catalog",
    "verify_deep": "lloki_atlas.store.verification",
}

__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from lloki_atlas.config import AtlasConfig
    from lloki_atlas.query import nearest_cells, select_cells
    from lloki_atlas.simulation import simulate
    from lloki_atlas.stages.adapt import adapt_autoencoder, adaptation_report
    from lloki_atlas.stages.build import build
    from lloki_atlas.stages.configure import configure
    from lloki_atlas.stages.create import create_catalog
    from lloki_atlas.stages.ingest import ingest
    from lloki_atlas.stages.ingest_many import ingest_many
    from lloki_atlas.stages.notebook import propagate_slice
    from lloki_atlas.stages.pipeline import plan, run, train_autoencoder
    from lloki_atlas.stages.pretrain import pretrain
    from lloki_atlas.stages.reference import fit_reference
    from lloki_atlas.stages.reports import propagation_report
    from lloki_atlas.stages.status import status
    from lloki_atlas.store.catalog import history, open_catalog, verify
    from lloki_atlas.store.portable import export_version, import_version
    from lloki_atlas.store.retention import gc
    from lloki_atlas.store.revert import remove, rollback
    from lloki_atlas.store.verification import verify_deep


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lloki_atlas' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
