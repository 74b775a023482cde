"""An S3 server on loopback that keeps conditions under races, and misbehaves when told to.

    python tests/support/s3_server.py          prints its address, serves until standard input closes

moto looks whether an object is there and stores it later, so that two creators may both win; conditional requests are
let in one at a time here. `POST /_faults` takes a JSON list of faults, each
`{"kind", "method", "match", "times", "conditional"}`: the first that fits a request (method, part of the path, only
conditional ones if said) is used up `times` times. Kinds: `lose` does what was asked and answers 503, `conflict`
answers 409 and does nothing, `fail` answers 500 and does nothing, `drop` does what was asked and closes the
connection, `slow` waits `seconds` first, `ignore` forgets the condition. `GET /_log` gives the requests so far.
"""

from __future__ import annotations

import io
import json
import socket
import sys
import threading
import time
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

CONDITIONS = ("HTTP_IF_NONE_MATCH", "HTTP_IF_MATCH")


class Quiet(WSGIRequestHandler):
    """Logs nothing; keeps connections."""

    protocol_version = "HTTP/1.1"

    def log(self, *_args: Any) -> None:
        """Nothing."""


class Application:
    """moto behind a lock for conditional requests, and the faults."""

    def __init__(self, *, racy: bool = False) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._conditional = threading.Lock()
        self._state = threading.Lock()
        self._faults: list[dict[str, Any]] = []
        self._log: list[list[str]] = []
        self._racy = racy

    def __call__(self, env: dict[str, Any], start: Any) -> Any:
        """Answer one request."""
        path, method = env["PATH_INFO"], env["REQUEST_METHOD"]
        body = env["wsgi.input"].read(int(env.get("CONTENT_LENGTH") or 0))
        env["wsgi.input"] = io.BytesIO(body)
        if path.startswith("/_"):
            return self._control(path, body, start)
        conditional = any(name in env for name in CONDITIONS)
        fault = self._take(method, path, conditional=conditional)
        with self._state:
            self._log.append([method, path, "conditional" if conditional else "", fault["kind"] if fault else ""])
        kind = fault["kind"] if fault else ""
        if kind == "slow":
            time.sleep(fault["seconds"])
        if kind in ("fail", "conflict"):
            code = "ConditionalRequestConflict" if kind == "conflict" else "InternalError"
            return _error(start, "409 Conflict" if kind == "conflict" else "500 Internal Server Error", code)
        if kind == "ignore":
            for name in CONDITIONS:
                env.pop(name, None)
        if conditional and not self._racy:
            with self._conditional:
                answer = self._answer(env, start, lost=kind in ("lose", "drop"))
        else:
            answer = self._answer(env, start, lost=kind in ("lose", "drop"))
        if kind == "lose":
            return _error(start, "503 Service Unavailable", "SlowDown")
        if kind == "drop":
            env["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError("dropped")
        return answer

    def _answer(self, env: dict[str, Any], start: Any, *, lost: bool) -> list[bytes]:
        return list(self._app(env, (lambda *_args, **_options: None) if lost else start))

    def _take(self, method: str, path: str, *, conditional: bool) -> dict[str, Any] | None:
        with self._state:
            for fault in self._faults:
                fits = fault.get("method", method) == method and fault.get("match", "") in path
                if fits and fault.get("times", 1) > 0 and (conditional or not fault.get("conditional", False)):
                    fault["times"] = fault.get("times", 1) - 1
                    return fault
        return None

    def _control(self, path: str, body: bytes, start: Any) -> list[bytes]:
        with self._state:
            if path == "/_faults":
                self._faults = json.loads(body)
                self._log.clear()
            answer = json.dumps(self._log).encode()
        start("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(answer)))])
        return [answer]


def _error(start: Any, status: str, code: str) -> list[bytes]:
    answer = f"<Error><Code>{code}</Code><Message>told to</Message></Error>".encode()
    start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(answer)))])
    return [answer]


def main() -> None:
    """Serve until standard input closes."""
    racy = "--racy" in sys.argv
    if racy:
        sys.setswitchinterval(1e-6)
    server = make_server("127.0.0.1", 0, Application(racy=racy), threaded=True, request_handler=Quiet)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
