"""A bucket for tests, where moto is installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NEEDS = "needs moto, of the extra `dev`"
SERVER = Path(__file__).with_name("s3_server.py")
INSTALLED = importlib.util.find_spec("moto") is not None


class Bucket:
    """One bucket of a running server; `environment` is what a process needs to use it."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.name = f"bucket-{uuid.uuid4().hex[:8]}"
        self.environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test-key",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_REGION": "us-east-1",
            "LLOKI_ATLAS_STORAGE_TIMEOUT": "5",
            "LLOKI_ATLAS_STORAGE_RETRIES": "2",
        }
        self._ask("PUT", f"/{self.name}")

    def __str__(self) -> str:
        return f"s3://{self.name}"

    def faults(self, *faults: dict[str, Any]) -> None:
        """Misbehave so from now on; nothing given ends it."""
        self._ask("POST", "/_faults", json.dumps(faults).encode())

    def requests(self) -> list[list[str]]:
        """Method, path, "conditional" or "", and fault of each request since the last call of `faults`."""
        found: list[list[str]] = json.loads(self._ask("GET", "/_log"))
        return found

    def _ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        asked = urllib.request.Request(self.endpoint + path, data=body or None, method=method)
        with urllib.request.urlopen(asked, timeout=30) as answer:
            found: bytes = answer.read()
            return found


@contextmanager
def s3_server(*options: str) -> Iterator[str]:
    """Run a server; its address."""
    process = subprocess.Popen(
        [sys.executable, str(SERVER), *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
