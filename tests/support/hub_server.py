"""A local stand-in for the Hub, for clients in this process and in others.

Uploads go through the LFS protocol, so its clients need ``HF_HUB_DISABLE_XET=1``.
"""

import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_RDWR
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.hub_api import HubApi
from tests.support.hub_repos import RefusedError, Reply, Request


@dataclass
class Failure:
    method: str
    pattern: str
    status: int | None
    times: float
    headers: Mapping[str, str]
    cut: str | None


class HubServer(HubApi):
    """A Hub on a port of this machine.

    Args:
        port: The port; 0 for any that is free.
    """

    def __init__(self, port: int = 0) -> None:
        self._failures: list[Failure] = []
        self._http = _HTTPServer(("127.0.0.1", port), _Handler)
        self._http.hub = self
        super().__init__(f"http://127.0.0.1:{self._http.server_port}")

    @contextmanager
    def running(self) -> Iterator["HubServer"]:
        thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            thread.join()
            self._http.close_connections()
            self._http.server_close()

    def environment(self, token: str | None = "hf_user") -> dict[str, str]:
        """For processes that are to use this server."""
        return os.environ | {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token or "",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def fail(
        self,
        method: str,
        pattern: str,
        *,
        status: int | None = None,
        times: float = 1,
        headers: Mapping[str, str] | None = None,
        cut: str | None = None,
    ) -> None:
        """Have requests fail whose path matches: with a status, or by a connection that is cut.

        `cut` is "request" (in the middle of the body, which is not seen) or "response" (in the middle of the answer to
        a request that was served).
        """
        self._failures.append(Failure(method, pattern, status, times, headers or {}, cut))

    def stop_failing(self) -> None:
        self._failures.clear()

    def failure_for(self, method: str, path: str) -> Failure | None:
        with self.lock:
            for failure in self._failures:
                if failure.times > 0 and failure.method == method and re.search(failure.pattern, path):
                    failure.times -= 1
                    return failure
        return None


class _HTTPServer(ThreadingHTTPServer):
    hub: HubServer
    # Joined at the end, so that nothing of one test reaches into the next.
    daemon_threads = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._connections: set[Any] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Clients may go away at any time.
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # One packet for headers and body.
    wbufsize = -1
    disable_nagle_algorithm = True
    server: _HTTPServer

    def _serve(self) -> None:
        address = urlsplit(self.path)
        failure = self.server.hub.failure_for(self.command, address.path)
        if failure and failure.cut == "request":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self._cut()
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, address.path, parse_qs(address.query), headers, self._body())
        if failure and failure.status:
            self.server.hub.requests.append(request)
            reply = RefusedError(failure.status, f"Failure {failure.status} of the test").reply
            reply = Reply(reply.body, reply.status, dict(reply.headers) | dict(failure.headers))
        else:
            reply = self.server.hub.answer(request)
        cut = failure is not None and failure.cut == "response"
        if cut and not reply.body:
            self._cut()
            return
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[: len(reply.body) // 2] if cut else reply.body)
        self.wfile.flush()
        if cut:
            self._cut()

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """The hub keeps a log of its own."""
