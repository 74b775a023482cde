"""The atlases that the tests of this folder ask."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.adapted import grown
from support.atlases import built, client, ingested, sources
from support.queries import build_once

__all__ = ["built", "client", "grown", "ingested", "root", "sources"]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small atlas with embeddings, shared by all tests: copy it where a test changes it."""
    return build_once(tmp_path_factory.getbasetemp() / "queries")
