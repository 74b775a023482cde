"""The atlas that the tests of this folder ask."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.queries import build_once


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small atlas with embeddings, shared by all tests: copy it where a test changes it."""
    return build_once(tmp_path_factory.getbasetemp() / "queries")
