"""Options and fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.s3 import INSTALLED, NEEDS, Bucket, s3_server

# workers inherit it: one thread each, as in a real run
os.environ.setdefault("OMP_NUM_THREADS", "1")
# POT imports every array library that it finds
for name in ("PYTORCH", "JAX", "TENSORFLOW", "CUPY"):
    os.environ.setdefault(f"POT_BACKEND_DISABLE_{name}", "1")

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run tests marked slow")
    parser.addoption("--run-gpu", action="store_true", help="run tests marked gpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker in ("slow", "gpu"):
        if not config.getoption(f"--run-{marker}"):
            skip = pytest.mark.skip(reason=f"needs --run-{marker}")
            for item in items:
                if marker in item.keywords:
                    item.add_marker(skip)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Address of an S3 server on loopback."""
    if not INSTALLED:
        pytest.skip(NEEDS)
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bucket:
    """An empty bucket that this process can use."""
    made = Bucket(s3_endpoint)
    made.faults()
    for name, value in {**made.environment, "LLOKI_ATLAS_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    return made


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of the real slices; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("LLOKI_ATLAS_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "ref_mop_10x_biccn.h5ad").exists():
        pytest.skip(f"no real slices in {folder}: set LLOKI_ATLAS_DATA")
    return folder
