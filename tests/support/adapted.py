"""A finished atlas of two technologies that is adapted to a third; copy the folders where a test changes something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.atlases import add_slice, copied

from lloki_atlas.stages.adapt import adapt_autoencoder
from lloki_atlas.stages.lineage import platform_name
from lloki_atlas.stages.status import status
from lloki_atlas.store.catalog import Catalog

NEW, TECHNOLOGY = "simish_1", "SimISH"
STAGES = ("ingest", "tile", "reference", "propagate", "embed", "integrate")
DONE = dict.fromkeys(STAGES, "done")


def adapt(catalog: Catalog, client: Any, *, technology: str = TECHNOLOGY, **options: Any) -> Catalog:
    """Adapt without a progress bar."""
    return adapt_autoencoder(catalog, technology=technology, client=client, progress=False, **options)


def finished_files(catalog: Catalog) -> dict[Path, bytes]:
    """Bytes of every file of a finished embedding or model."""
    files = [path for kind in ("embeddings", "models") for path in (catalog.root / kind).rglob("*") if path.is_file()]
    return {path.relative_to(catalog.root): path.read_bytes() for path in files}


def tokens(catalog: Catalog) -> dict[str, str]:
    """Roles of the tokens of a version, and their keys."""
    return {role: key for role, key in catalog.state.models.items() if role.startswith("token:")}


def role_of(catalog: Catalog, slice_id: str = NEW) -> str:
    """Role of the token of a slice's platform."""
    return f"token:{platform_name(catalog.slice(slice_id))}"


def statuses(catalog: Catalog) -> dict[str, dict[str, str]]:
    """State of every stage, by slice."""
    return {part["slice_id"]: part["stages"] for part in status(catalog)["slices"]}


@pytest.fixture(scope="session")
def grown(built: Path, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished atlas of two technologies with a slice of a third, which it does not know."""
    return add_slice(copied(built, tmp_path_factory.mktemp("grown") / "atlas"), sources, NEW).root


@pytest.fixture(scope="session")
def adapted(grown: Path, client: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same atlas after adapting to the third technology."""
    return adapt(copied(grown, tmp_path_factory.mktemp("adapted") / "atlas"), client).root
