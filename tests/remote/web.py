"""A web server and a hub on loopback: folders of this machine, with ranges."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.remote.server import serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Files(BaseHTTPRequestHandler):
    """GET and HEAD of files, by ranges, and index pages as nginx makes them."""

    protocol_version = "HTTP/1.1"
    root: Path
    seen: list[tuple[str, dict[str, str]]]
    index = True

    def do_GET(self) -> None:
        self.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
        self.answer(unquote(urlsplit(self.path).path).lstrip("/"))

    do_HEAD = do_GET  # noqa: N815

    def answer(self, name: str) -> None:
        path = self.root / name
        if path.is_dir() and self.index and self.path.endswith("/"):
            links = "".join(
                f'<a href="{p.name}{"/" * p.is_dir()}">{p.name}</a>\n' for p in path.iterdir()
            )
            page = f'<html><head><title>Index of /{name}</title></head><a href="../">../</a>{links}'
            self.send(200, page.encode(), {})
        elif path.is_dir() and self.index:
            self.send(301, b"", {"Location": f"{urlsplit(self.path).path}/"})
        elif path.is_file():
            self.send_file(path)
        else:
            self.send(404, b"no such file", {})

    def send_file(self, path: Path) -> None:
        data = path.read_bytes()
        tag = {"ETag": f'"{hashlib.md5(data).hexdigest()}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if self.headers.get("If-Match") not in (None, tag["ETag"]):
            self.send(412, b"", {})
        elif asked:
            start, stop = int(asked[1]), min(int(asked[2]) + 1, len(data))
            tag["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            self.send(206, data[start:stop], tag)
        else:
            self.send(200, data, tag)

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def web(root: Path, **changes: Any) -> Iterator[tuple[str, type[Files]]]:
    """A web server of a folder; its host, and its handler, which keeps what was asked."""
    handler = type("Handler", (Files,), {"root": root, "seen": [], **changes})
    with serving(handler) as port:
        yield f"127.0.0.1:{port}", handler


class Hub(Files):
    """The part of the hub's API that is read, for the model org/name; its bytes lie elsewhere."""

    token: str | None = None
    elsewhere: str

    def do_GET(self) -> None:
        self.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
        if self.token and self.headers.get("Authorization") != f"Bearer {self.token}":
            self.send(401, b"", {})
            return
        parts = urlsplit(self.path)
        api, at = "/api/models/org/name", f"/org/name/resolve/{COMMIT}/"
        if parts.path in (f"{api}/revision/main", f"{api}/revision/refs%2Fpr%2F1"):
            self.send(200, json.dumps({"sha": COMMIT}).encode(), {})
        elif parts.path == f"{api}/tree/{COMMIT}":
            self.page(parts.query)
        elif parts.path.startswith(at):
            place = f"http://{self.elsewhere}/{parts.path.removeprefix(at)}"
            self.send(302, b"", {"Location": place})
        else:
            self.send(404, b"", {})

    do_HEAD = do_GET  # noqa: N815

    def page(self, query: str) -> None:
        """One file a page, so that there are several."""
        files = sorted(path for path in self.root.rglob("*") if path.is_file())
        found = re.search(r"cursor=(\d+)", query)
        at = int(found[1]) if found else 0
        path = files[at]
        name = path.relative_to(self.root).as_posix()
        entry = {"type": "file", "path": name, "size": path.stat().st_size, "oid": name}
        link = f"http://{self.headers['Host']}{urlsplit(self.path).path}?cursor={at + 1}"
        headers = {"Link": f'<{link}>; rel="next"'} if at + 1 < len(files) else {}
        self.send(200, json.dumps([entry, {"type": "directory", "path": "d"}]).encode(), headers)
