"""Uploads in parts that were begun in a store and never ended: those of runs that were killed.

obstore ends the uploads of a run that fails, and has no calls to list or to end others. S3's are
two requests, which are signed here (Signature Version 4, of the S3 API's "Authenticating requests:
using the Authorization header"). They need keys of the environment or of the files: those of a
machine's role are obstore's alone. Azure forgets blocks that were not committed after a week, or
when the object is written; for Google Cloud a lifecycle rule ends uploads.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from msgspec import Struct

from reshard._version import __version__
from reshard.core.locations import RemotePath
from reshard.storage import credentials
from reshard.storage.requests import count

_SECONDS = 30.0
_MAX_ANSWER = 4 << 20
# Pages of 1,000 uploads.
_MAX_PAGES = 100
_EMPTY = hashlib.sha256(b"").hexdigest()


class Begun(Struct, frozen=True):
    """An upload that was not ended: its object's key, and its number."""

    key: str
    number: str


def begun(folder: RemotePath, names: Iterable[str]) -> list[Begun] | None:
    """The uploads of these files of a folder that were not ended; None where that is not known."""
    if folder.scheme != "s3":
        return [] if folder.scheme == "az" else None
    wanted = {(folder / name).key for name in names}
    uploads: list[Begun] = []
    query = {"encoding-type": "url", "prefix": f"{folder.key}/", "uploads": ""}
    for _ in range(_MAX_PAGES):
        page = _ask("GET", folder.bucket, "", query)
        if page is None:
            return None
        for upload in re.findall(r"<Upload>(.*?)</Upload>", page, re.DOTALL):
            key, number = unquote(_text(upload, "Key")), _text(upload, "UploadId")
            if key in wanted and number:
                uploads.append(Begun(key, number))
        if _text(page, "IsTruncated") != "true":
            break
        query["key-marker"] = unquote(_text(page, "NextKeyMarker"))
        query["upload-id-marker"] = _text(page, "NextUploadIdMarker")
    return uploads


def end(folder: RemotePath, uploads: Iterable[Begun]) -> bool:
    """End uploads, so that their parts are deleted; whether all were ended."""
    answers = [
        _ask("DELETE", folder.bucket, upload.key, {"uploadId": upload.number}) for upload in uploads
    ]
    return None not in answers


def _text(page: str, tag: str) -> str:
    """What stands in the first element of this name."""
    found = re.search(rf"<{tag}>([^<]*)</{tag}>", page)
    return found[1].replace("&amp;", "&").replace("&quot;", '"') if found else ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: a signature is for one host."""

    def redirect_request(self, *given: Any, **more: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)


def _ask(method: str, bucket: str, key: str, query: Mapping[str, str]) -> str | None:
    """An answer of S3 as text; None where there is none, or no key to sign the request with."""
    settings = credentials.aws()
    keys = _keys(settings)
    if keys is None and os.environ.get("AWS_SKIP_SIGNATURE", "").lower() != "true":
        return None
    region = (
        os.environ.get("AWS_REGION")
        or os.environ.get("AWS_DEFAULT_REGION")
        or settings.get("region", "us-east-1")
    )
    root = settings.get("endpoint") or f"https://s3.{region}.amazonaws.com"
    path = quote(f"{urlsplit(root).path.rstrip('/')}/{bucket}/{key}".rstrip("/"), safe="/-_.~")
    asked = "&".join(f"{_quoted(name)}={_quoted(query[name])}" for name in sorted(query))
    headers = _signed(keys, method, urlsplit(root).netloc, path, asked, region) if keys else {}
    request = urllib.request.Request(
        f"{root.split('://')[0]}://{urlsplit(root).netloc}{path}?{asked}",
        headers={**headers, "user-agent": f"reshard/{__version__}"},
        method=method,
    )
    count(**{"list" if method == "GET" else "delete": 1})
    try:
        with _opener.open(request, timeout=_SECONDS) as answer:
            text: bytes = answer.read(_MAX_ANSWER)
    except urllib.error.HTTPError as error:
        return "" if method == "DELETE" and error.code == 404 else None
    except (OSError, ValueError):
        return None
    return text.decode("utf-8", "replace")


def _quoted(text: str) -> str:
    return quote(text, safe="-_.~")


class _Keys(Struct, frozen=True):
    """What requests are signed with."""

    identity: str
    secret: str
    token: str


def _keys(settings: Mapping[str, str]) -> _Keys | None:
    """The keys of the environment, else those of the files; None where there are none."""
    names = ("access_key_id", "secret_access_key", "session_token")
    for given in ({n: os.environ.get(f"AWS_{n.upper()}", "") for n in names}, settings):
        identity, secret, token = (given.get(name, "") for name in names)
        if identity:
            return _Keys(identity, secret, token)
    return None


def _signed(
    keys: _Keys, method: str, host: str, path: str, query: str, region: str
) -> dict[str, str]:
    """The headers of a request without a body, with its signature."""
    now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    headers = {"host": host, "x-amz-content-sha256": _EMPTY, "x-amz-date": now}
    if keys.token:
        headers["x-amz-security-token"] = keys.token
    names = ";".join(sorted(headers))
    lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
    request = "\n".join((method, path, query, lines, names, _EMPTY))
    scope = f"{now[:8]}/{region}/s3/aws4_request"
    digest = hashlib.sha256(request.encode()).hexdigest()
    text = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{digest}"
    key = f"AWS4{keys.secret}".encode()
    for part in (now[:8], region, "s3", "aws4_request", text):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return {
        **headers,
        "authorization": f"AWS4-HMAC-SHA256 Credential={keys.identity}/{scope}, "
        f"SignedHeaders={names}, Signature={key.hex()}",
    }
