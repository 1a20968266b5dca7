"""Files of a web server, read where they are: https://HOST/FOLDER.

HTTP has no list of files. A folder is read where it says what is in it:

    reshard.json       of an output of reshard, which lists its files
    an index page      as nginx, Apache and Python's http.server make them ("Index of /",
                       "Directory listing for /")

A single file needs neither. The server must support ranges.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from html.parser import HTMLParser
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from msgspec import Raw, Struct

from reshard.core.locations import MANIFEST, RemotePath
from reshard.errors import FormatError, IncompleteError
from reshard.storage import strict_json
from reshard.storage.requests import count
from reshard.storage.stores import (
    RETRY,
    AbsentError,
    Listing,
    Object,
    asking,
    client,
    head,
    library,
    read_range,
)

if TYPE_CHECKING:
    from obstore.store import ObjectStore

# Bytes of an index page or a `reshard.json`.
_MAX_PAGE = 128 << 20
_TITLES = ("index of ", "directory listing for ")
_UNKNOWN = Object(-1)


class _Stated(Struct):
    """The part of a `reshard.json` that is parsed: only the files' names."""

    files: dict[str, Raw] = {}


class Host:
    """What a web server has."""

    def __init__(self, raw: ObjectStore, url: str) -> None:
        self.url = url
        self._raw = raw
        self._stated: dict[str, list[str]] = {}

    def head(self, key: str) -> Object | None:
        return head(self._raw, key, f"{self.url}/{key}")

    def folder(self, key: str) -> Listing:
        manifest = self._small(f"{key}/{MANIFEST}" if key else MANIFEST)
        if manifest is not None:
            self._stated[key] = [*_stated(manifest, f"{self.url}/{key}"), MANIFEST]
        for above, names in self._stated.items():
            if key == above or key.startswith(f"{above}/"):
                start = f"{key[len(above) + 1 :]}/" if key != above else ""
                inside = [name[len(start) :] for name in names if name.startswith(start)]
                return {n.partition("/")[0]: None if "/" in n else _UNKNOWN for n in inside}
        page = self._small(f"{key}/")
        return {} if page is None else _index(page.decode("utf-8", "replace"))

    def below(self, key: str) -> Mapping[str, Object]:
        found: dict[str, Object] = {}
        for name, file in self.folder(key).items():
            inside = f"{key}/{name}" if key else name
            if file is None:
                found |= {f"{name}/{n}": f for n, f in self.below(inside).items()}
            else:
                found[name] = self.head(inside) or _UNKNOWN
        return found

    def read(self, key: str, start: int, stop: int, known: Object) -> memoryview:
        # A weak tag never matches (RFC 9110, 13.1.1).
        tag = "" if known.tag.startswith("W/") else known.tag
        return read_range(self._raw, key, start, stop, f"{self.url}/{key}", tag)

    def _small(self, key: str) -> bytes | None:
        """A page or a small file whole; None where there is none."""
        import obstore

        count(get=1)
        try:
            with asking(f"{self.url}/{key}"):
                found = obstore.get(self._raw, key)
                if found.meta["size"] > _MAX_PAGE:
                    raise FormatError("it is too large.", path=f"{self.url}/{key}")
                data = bytes(found.bytes())
        except AbsentError:
            return None
        count(bytes_read=len(data))
        return data


def host_of(path: RemotePath) -> Host:
    """The server that a URL names. Raises `UnsupportedError` without the extra."""
    return _host(path.scheme, path.bucket)


@lru_cache(64)
def _host(scheme: str, name: str) -> Host:
    url = f"{scheme}://{name}"
    options = client(scheme == "http")
    return Host(library().HTTPStore.from_url(url, client_options=options, retry_config=RETRY), url)


def _stated(text: bytes, url: str) -> list[str]:
    """The files that a `reshard.json` lists. It is read strictly once the folder is verified."""
    try:
        files = strict_json.parse_as(text, _Stated, url).files
    except FormatError:
        files = {}
    if not files:
        raise IncompleteError(
            f"its {MANIFEST} lists no files, so that what is in it cannot be told.",
            path=url,
            hint="Copy the folder here, and name the copy.",
        )
    return list(files)


def _index(page: str) -> Listing:
    """What an index page links to; nothing where the page is another."""
    parser = _Links()
    parser.feed(page)
    if not parser.title.strip().lower().startswith(_TITLES):
        return {}
    found: dict[str, Object | None] = {}
    for link in parser.links:
        parts = urlsplit(link)
        name = unquote(parts.path).removeprefix("./")
        if parts.scheme or parts.netloc or parts.query or name.startswith(("/", "..")):
            continue
        if name.endswith("/") and name.count("/") == 1:
            found[name[:-1]] = None
        elif name and "/" not in name:
            found[name] = _UNKNOWN
    return found


class _Links(HTMLParser):
    """The title and the links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.title = ""
        self.links: list[str] = []
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_title = tag == "title"
        if tag == "a":
            self.links += [value for name, value in attrs if name == "href" and value]

    def handle_endtag(self, tag: str) -> None:
        self._in_title = False

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
