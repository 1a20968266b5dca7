"""A real S3-protocol server on loopback, and a proxy in front of it that injects faults."""

from __future__ import annotations

import hashlib
import http.client
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.files import contents

BUCKET = "bucket"
KEYS = {"AWS_ACCESS_KEY_ID": "the-key-id", "AWS_SECRET_ACCESS_KEY": "the-secret-key"}


@dataclass
class Request:
    """A request as it came: its method, its path with the query, and its headers."""

    method: str
    path: str
    headers: dict[str, str]


#: What the proxy does in place of the server: a status, `cut`, `drop` (no answer), `done` (an error
#: after the server did it), `gone` (no answer after that), or a function called before.
Fault = int | str | Callable[[], object] | None


@dataclass
class Proxy:
    """Passes requests on, asks `fault` of each what is to go wrong, and keeps all of them."""

    server: str
    port: int = 0
    fault: Callable[[Request], Fault] = lambda request: None
    seen: list[Request] = field(default_factory=list)
    generations: dict[str, str] = field(default_factory=dict)

    def count(self, method: str) -> int:
        return sum(request.method == method for request in self.seen)


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = Request(self.command, self.path, dict(self.headers))
            proxy.seen.append(request)
            fault = proxy.fault(request)
            if callable(fault):
                fault()
            if isinstance(fault, int):
                self._answer(fault, [("Content-Length", "0")], b"")
                return
            if fault == "drop":
                self.close_connection = True
                return
            there = http.client.HTTPConnection(proxy.server, timeout=60)
            sent = _as_amazon(dict(self.headers), proxy.generations)
            there.request(self.command, self.path, body, {**_ANYONE, **sent})
            answer = there.getresponse()
            data = answer.read()
            headers = [(n, v) for n, v in answer.getheaders() if n.lower() not in _OURS]
            if tag := answer.getheader("ETag"):
                headers.append(("x-goog-generation", _generation(tag)))
                proxy.generations[_generation(tag)] = tag
            if self.command == "HEAD":
                headers.append(("Content-Length", answer.getheader("Content-Length") or "0"))
            else:
                headers.append(("Content-Length", str(len(data))))
            there.close()
            if fault == "done":
                self._answer(500, [("Content-Length", "0")], b"")
                return
            if fault == "gone":
                self.close_connection = True
                return
            if fault == "cut":
                self._answer(answer.status, headers, data[: len(data) // 2])
                self.close_connection = True
                return
            self._answer(answer.status, headers, data)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_one  # noqa: N815

        def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    return Handler


def _generation(tag: str) -> str:
    """The number by which Google's protocol names what Amazon's names by a tag."""
    return str(int(hashlib.md5(tag.encode()).hexdigest()[:14], 16))


def _as_amazon(headers: dict[str, str], generations: dict[str, str]) -> dict[str, str]:
    """Headers with Google's condition of a write as Amazon's."""
    if headers.get("authorization", "").startswith("Bearer"):
        del headers["authorization"]
    wanted = headers.pop("x-goog-if-generation-match", None)
    if wanted == "0":
        return {**headers, "If-None-Match": "*"}
    if wanted is not None:
        return {**headers, "If-Match": generations.get(wanted, "none")}
    return headers


# moto forbids what nobody signed; which key it was it does not ask.
_ANYONE = {
    "authorization": "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=x"
}
_OURS = {"content-length", "connection", "transfer-encoding", "server"}


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    """A server on a port of loopback."""
    handler.disable_nagle_algorithm = True  # else the body waits 40 ms for the headers' receipt
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def store() -> Iterator[Proxy]:
    """moto's S3, empty, behind a proxy."""
    moto = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    proxy = Proxy(f"{host}:{port}")
    try:
        with serving(_handler(proxy)) as proxy.port:
            yield proxy
    finally:
        server.stop()


@dataclass
class Bucket:
    """The objects of the bucket, as a test puts and sees them: past the proxy, without reshard."""

    proxy: Proxy
    client: Any

    def names(self, prefix: str = "") -> list[str]:
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        return [entry["Key"] for entry in found]

    def uploads(self) -> list[str]:
        found = self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
        return [entry["Key"] for entry in found]

    def put(self, name: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=name, Body=data)

    def get(self, name: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=BUCKET, Key=name)["Body"].read()
        return data

    def upload(self, folder: Path, prefix: str) -> str:
        """Put a folder's files below a prefix; returns its URL."""
        for name, data in contents(folder).items():
            self.put(f"{prefix}/{name}", data)
        return f"s3://{BUCKET}/{prefix}"

    def download(self, prefix: str) -> dict[str, bytes]:
        """What lies below a prefix, by name."""
        return {name[len(prefix) + 1 :]: self.get(name) for name in self.names(f"{prefix}/")}


def slowly(seconds: float) -> Callable[[], object]:
    """A fault: the answer comes late."""
    return lambda: time.sleep(seconds)
