"""A model of the Hugging Face hub, read where it is: hf://OWNER/NAME[@REVISION].

    ENDPOINT/api/models/OWNER/NAME/revision/REVISION        {"sha": the commit, ...}
    ENDPOINT/api/models/OWNER/NAME/tree/COMMIT?recursive=true
        [{"type": "file", "path", "size", "oid", "lfs": {"oid", ...}}, ...], in pages by `Link`
    ENDPOINT/OWNER/NAME/resolve/COMMIT/PATH                 the bytes, by way of a redirect

(huggingface_hub 2.4, hf_api.py, file_download.py.) A revision is resolved once, to its commit,
which does not change: all files are of one commit, whatever is pushed meanwhile.
"""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from reshard._version import __version__
from reshard.core.locations import RemotePath
from reshard.core.regex import regex
from reshard.errors import FormatError, NotFoundError, printable
from reshard.storage import credentials, strict_json
from reshard.storage.requests import count
from reshard.storage.stores import RETRY, Listing, Object, client, library, read_range

# Bytes of an answer; a page lists at most 1000 files.
_MAX_ANSWER = 16 << 20
_MAX_PAGES = 100
_TRIES = 6
_SECONDS = 30
_COMMIT = regex(r"[0-9a-f]{7,64}")


class Model:
    """A model of the hub at one commit."""

    def __init__(self, name: str, revision: str, endpoint: str, token: str | None) -> None:
        self.url: str = f"hf://{name}{f'@{revision}' if revision else ''}"
        self._api = f"{endpoint}/api/models/{quote(name)}"
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._commit = self._resolved(revision or "main")
        self._prefix = f"{name}/resolve/{self._commit}"
        self._raw = library().HTTPStore.from_url(
            endpoint,
            client_options=client(endpoint.startswith("http://"), **self._headers),
            retry_config=RETRY,
        )
        self._files = self._tree()

    def head(self, key: str) -> Object | None:
        return self._files.get(key)

    def folder(self, key: str) -> Listing:
        found: dict[str, Object | None] = {}
        for name, file in self.below(key).items():
            first, deeper, _ = name.partition("/")
            found[first] = None if deeper else file
        return found

    def below(self, key: str) -> Mapping[str, Object]:
        start = f"{key}/" if key else ""
        return {n[len(start) :]: f for n, f in self._files.items() if n.startswith(start)}

    def read(self, key: str, start: int, stop: int, known: Object) -> memoryview:
        # No If-Match: behind the redirect lies another server, with tags of its own.
        name = f"{self._prefix}/{key}"
        return read_range(self._raw, name, start, stop, f"{self.url}/{key}")

    def _resolved(self, revision: str) -> str:
        found = _ask(f"{self._api}/revision/{quote(revision, safe='')}", self._headers, self.url)[0]
        commit = found.get("sha") if isinstance(found, dict) else None
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise FormatError("the hub names no commit of it.", path=self.url)
        return commit

    def _tree(self) -> dict[str, Object]:
        files: dict[str, Object] = {}
        url: str | None = f"{self._api}/tree/{self._commit}?recursive=true"
        for _ in range(_MAX_PAGES):
            if url is None:
                return files
            page, url = _ask(url, self._headers, self.url)
            for entry in page if isinstance(page, list) else []:
                if isinstance(entry, dict) and entry.get("type") == "file":
                    path, nbytes = entry.get("path"), entry.get("size")
                    if not isinstance(path, str) or not isinstance(nbytes, int) or nbytes < 0:
                        raise FormatError("the hub's list of its files is damaged.", path=self.url)
                    lfs = entry.get("lfs")
                    tag = lfs.get("oid") if isinstance(lfs, dict) else entry.get("oid")
                    files[path] = Object(nbytes, f"{self._commit} {tag}")
        raise FormatError(f"it has more than {_MAX_PAGES} pages of files.", path=self.url)


def model_of(path: RemotePath) -> Model:
    """The model that a URL names. Raises `NotFoundError`, `UnsupportedError` without the extra."""
    return _model(path.bucket, credentials.hub_endpoint(), credentials.hub_token())


# A revision may move between two commands of one process, which `forget` is for.
@lru_cache(8)
def _model(bucket: str, endpoint: str, token: str | None) -> Model:
    name, _, revision = bucket.partition("@")
    return Model(name, unquote(revision), endpoint, token)


def forget() -> None:
    """Resolve revisions again."""
    _model.cache_clear()


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follow no redirect to another host: the token would go there."""

    def redirect_request(
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any
    ) -> Any:
        if urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            raise urllib.error.HTTPError(
                req.full_url, code, "redirect to another host", headers, fp
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_opener = urllib.request.build_opener(_SameHost)


def _ask(url: str, headers: Mapping[str, str], shown: str) -> tuple[Any, str | None]:
    """A JSON answer of the hub, and the URL of the next page. Raises `NotFoundError`."""
    for again in range(_TRIES):
        count(list=1)
        request = urllib.request.Request(
            url, headers={**headers, "user-agent": f"reshard/{__version__}"}
        )
        try:
            with _opener.open(request, timeout=_SECONDS) as answer:
                text = answer.read(_MAX_ANSWER + 1)
                link = re.search(r'<([^>]+)>;\s*rel="next"', answer.headers.get("Link", ""))
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise _refused(error, shown) from None
            words = f"{error.code} {error.reason}"
        except (OSError, ValueError) as error:
            words = str(error)
        else:
            if len(text) > _MAX_ANSWER:
                raise FormatError("the hub's answer is too long.", path=shown)
            following = link[1] if link else None
            if following and urlsplit(following).netloc != urlsplit(url).netloc:
                raise FormatError("the hub's next page is on another host.", path=shown)
            try:
                return strict_json.parse(text, shown), following
            except FormatError as error:  # it may have broken off
                words = error.message.removesuffix(".")
        time.sleep(0.1 * 2**again)
    raise NotFoundError(f"the hub does not answer: {printable(words[:200])}.", path=shown)


def _refused(error: urllib.error.HTTPError, shown: str) -> NotFoundError:
    hints = {
        401: "Log in: hf auth login, or set HF_TOKEN; and check the name.",
        403: "Accept the model's conditions on its page, and log in: hf auth login.",
        404: "Check the name and the revision; of a private model, log in: hf auth login.",
    }
    words = f"the hub refuses it: {error.code} {printable(str(error.reason))[:100]}."
    return NotFoundError(words, path=shown, hint=hints.get(error.code))
