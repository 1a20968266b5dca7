"""Object stores: what a bucket is asked, and what it refuses, in words.

A thin layer over obstore, which signs requests, and repeats them with the store's back-off after
errors of the server and of the network. Imported only once a URL is named.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import xxhash
from msgspec import Struct

from reshard._version import __version__
from reshard.core.locations import RemotePath
from reshard.core.regex import regex
from reshard.errors import IncompleteError, NotFoundError, UnsupportedError, WriteError, printable
from reshard.storage import credentials
from reshard.storage.requests import count

if TYPE_CHECKING:
    from obstore import GetOptions, PutMode
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

# Bytes of a part of a multipart upload, and parts of an upload at most (S3).
PART_NBYTES = 8 << 20
_MAX_PARTS = 10_000
# Parts of one object that are on their way at once: 32 MiB of memory for each file being written.
_PARTS_AT_ONCE = 4
# Keys of one page of a list (S3, GCS; Azure has 5000).
_PAGE = 1000
# How often a read that broke off is repeated; the wait begins at 0.1 s and doubles each time.
_TRIES = 6
#: How the client repeats what a server answers with an error, or not at all.
RETRY: RetryConfig = {
    "max_retries": 10,
    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=15)},
    "retry_timeout": timedelta(minutes=3),
}


class Object(Struct, frozen=True):
    """An object of a store: its bytes, its entity tag, and when it was written (seconds).

    `nbytes` is -1 where a list does not say it. `version` is what the store calls it beside its
    tag; Google Cloud replaces objects by that.
    """

    nbytes: int
    tag: str = ""
    modified: float = 0.0
    version: str = ""


#: What lies in a folder, by name; None is a folder.
Listing = Mapping[str, "Object | None"]


class Store(Protocol):
    """A bucket, a host or a model of the hub, read by keys."""

    def head(self, key: str) -> Object | None:
        """The object of a key; None where there is none."""

    def folder(self, key: str) -> Listing:
        """What lies in a folder; empty where there is no such folder."""

    def below(self, key: str) -> Mapping[str, Object]:
        """Every object below a folder, by its name there with `/`."""

    def read(self, key: str, start: int, stop: int, known: Object) -> memoryview:
        """Bytes `[start, stop)` of an object, which must be the one that is `known`."""


class Bucket:
    """A bucket of S3, Google Cloud Storage or Azure. Safe to use from several threads.

    Its errors are `NotFoundError` (a question), `IncompleteError` (a read), `WriteError`.
    """

    def __init__(self, raw: ObjectStore, url: str) -> None:
        self.url = url
        self._raw = raw

    def head(self, key: str) -> Object | None:
        return head(self._raw, key, f"{self.url}/{key}")

    def folder(self, key: str) -> Listing:
        import obstore

        with asking(f"{self.url}/{key}"):
            found = obstore.list_with_delimiter(self._raw, key or None)
        folders = [str(name) for name in found["common_prefixes"]]
        count(list=1 + (len(folders) + len(found["objects"])) // _PAGE)
        listing: dict[str, Object | None] = {name.rpartition("/")[2]: None for name in folders}
        for meta in found["objects"]:
            path = meta["path"]
            if path != key:  # the mark of an empty folder, which consoles make
                listing[path.rpartition("/")[2]] = _object(meta)
        return listing

    def below(self, key: str) -> Mapping[str, Object]:
        import obstore

        found: dict[str, Object] = {}
        start = len(key) + 1 if key else 0
        with asking(f"{self.url}/{key}"):
            for page in obstore.list(self._raw, key or None):
                for meta in page:
                    if meta["path"] != key:
                        found[meta["path"][start:]] = _object(meta)
        count(list=1 + len(found) // _PAGE)
        return found

    def read(self, key: str, start: int, stop: int, known: Object) -> memoryview:
        return read_range(self._raw, key, start, stop, f"{self.url}/{key}", known.tag)

    def put(
        self, key: str, data: bytes, *, new: bool = False, instead_of: Object | None = None
    ) -> Object:
        """Write a small object.

        With `new`, raises `FileExistsError` where there is one; with `instead_of`, where the object
        is not that one.
        """
        import obstore

        mode: PutMode = "create" if new else "overwrite"
        if instead_of is not None:
            mode = {"e_tag": instead_of.tag}
            if instead_of.version:
                mode["version"] = instead_of.version
        count(put=1, bytes_written=len(data))
        try:
            with writing(f"{self.url}/{key}"):
                done = obstore.put(self._raw, key, data, mode=mode, use_multipart=False)
        except (FileExistsError, WriteError):
            # A store may have done what it answered with an error, and refuse the same again.
            found = None if mode == "overwrite" else self._sent(key, len(data), data)
            if found is None:
                raise
            return found
        return Object(len(data), done["e_tag"] or "", version=done["version"] or "")

    def upload(self, key: str, pieces: Iterator[bytes], nbytes: int) -> Object:
        """Write an object of `nbytes` bytes as they come, in parts.

        Where `pieces` raises, nothing is left of it in the store.
        """
        import obstore

        part = max(PART_NBYTES, -(-nbytes // _MAX_PARTS) + 4095 & ~4095)
        count(put=2 + -(-nbytes // part), bytes_written=nbytes)
        passed = _Passed(pieces)
        try:
            with writing(f"{self.url}/{key}"):
                done = obstore.put(
                    self._raw,
                    key,
                    passed,
                    use_multipart=True,
                    chunk_size=part,
                    max_concurrency=_PARTS_AT_ONCE,
                )
        except WriteError:
            found = self._sent(key, nbytes, passed.hasher) if passed.complete else None
            if found is None:
                raise
            return found
        return Object(nbytes, done["e_tag"] or "", version=done["version"] or "")

    def _sent(self, key: str, nbytes: int, sent: bytes | xxhash.xxh3_128) -> Object | None:
        """The object of a key, if it holds what was sent: all of it is read."""
        wanted = sent if isinstance(sent, xxhash.xxh3_128) else xxhash.xxh3_128(sent)
        hasher = xxhash.xxh3_128()
        try:
            there = self.head(key)
            if there is None or there.nbytes != nbytes:
                return None
            for start in range(0, nbytes, PART_NBYTES):
                hasher.update(self.read(key, start, min(start + PART_NBYTES, nbytes), there))
        except (NotFoundError, IncompleteError):
            return None
        return there if hasher.digest() == wanted.digest() else None

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that are not there are no error."""
        import obstore

        names = list(keys)
        if not names:
            return
        count(delete=1 + len(names) // _PAGE)
        try:
            with writing(f"{self.url}/{names[0]}"), suppress(FileNotFoundError):
                obstore.delete(self._raw, names)
                return
        except WriteError:
            if len(names) == 1:
                raise
        for name in names:  # Azure ends a list of them at one that is not there
            count(delete=1)
            with writing(f"{self.url}/{name}"), suppress(FileNotFoundError):
                obstore.delete(self._raw, name)


class _Passed:
    """Bytes on their way, hashed as they pass; `complete` once there are no more."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.hasher = xxhash.xxh3_128()
        self.complete = False
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            self.hasher.update(piece)
            yield piece
        self.complete = True


def bucket_of(path: RemotePath) -> Bucket:
    """The bucket that a URL lies in. Raises `UnsupportedError` without the extra."""
    return _bucket(path.scheme, path.bucket, credentials.fingerprint())


@lru_cache(64)
def _bucket(scheme: str, name: str, settings: object) -> Bucket:
    stores, url = library(), f"{scheme}://{name}"
    # Another server than Google's or Azure's own is one that the user's settings name.
    open_ = scheme == "gs" or os.environ.get("AZURE_STORAGE_USE_EMULATOR", "").lower() == "true"
    more: dict[str, Any] = {"client_options": client(open_), "retry_config": RETRY}
    with asking(url):
        if scheme == "s3":
            found = credentials.aws()
            more["client_options"] = client(found.get("endpoint", "").startswith("http://"))
            return Bucket(stores.S3Store(name, config=found, **more), url)
        return Bucket((stores.GCSStore if scheme == "gs" else stores.AzureStore)(name, **more), url)


def library() -> Any:
    """obstore's stores. Raises `UnsupportedError` where it is not installed."""
    try:
        import obstore.store
    except ImportError:
        raise UnsupportedError(
            "URLs are read and written with obstore, which is not installed.",
            hint="Install the extra, in reshard's folder, with Python 3.11 or newer: "
            "pip install '.[remote]'.",
        ) from None
    return obstore.store


def client(allow_http: bool, **headers: str) -> ClientConfig:
    """How the client connects; `allow_http`, where the user's own settings name such a server."""
    options: ClientConfig = {
        "allow_http": allow_http,
        "user_agent": f"reshard/{__version__}",
        "connect_timeout": timedelta(seconds=10),
        "read_timeout": timedelta(minutes=1),
        "timeout": timedelta(minutes=10),
    }
    return {**options, "default_headers": headers} if headers else options


def head(raw: ObjectStore, key: str, url: str) -> Object | None:
    """The object of a key; None where there is none."""
    import obstore

    count(head=1)
    try:
        with asking(url):
            return _object(obstore.head(raw, key))
    except AbsentError:
        return None


def read_range(
    raw: ObjectStore, key: str, start: int, stop: int, url: str, tag: str = ""
) -> memoryview:
    """Bytes `[start, stop)` of an object; a body that breaks off is read again.

    Raises `IncompleteError`; where the object has no longer the `tag` that is given,
    `ChangedError`.
    """
    import obstore
    from obstore.exceptions import BaseError, PreconditionError

    options: GetOptions = {"range": (start, stop)}
    if tag:
        options["if_match"] = tag
    for again in range(_TRIES):
        count(get=1, repeated=int(again > 0))
        try:
            got = memoryview(obstore.get(raw, key, options=options).bytes())
        except PreconditionError:
            raise ChangedError(url) from None
        except FileNotFoundError:
            raise IncompleteError("the object is gone.", path=url, hint=_GONE) from None
        except (BaseError, OSError) as error:
            words, hint, broken = _refusal(error)
            if not broken or again + 1 == _TRIES:
                raise IncompleteError(f"it cannot be read: {words}.", path=url, hint=hint) from None
        else:
            if len(got) == stop - start:
                count(bytes_read=len(got))
                return got
        time.sleep(0.1 * 2**again * random.uniform(0.5, 1.0))
    raise IncompleteError(
        f"the server did not return bytes {start} to {stop} completely.", path=url, hint=_GONE
    )


_GONE = "Convert again once nothing writes to the checkpoint."


class ChangedError(IncompleteError):
    """An object changed since it was first read."""

    def __init__(self, url: str) -> None:
        super().__init__("the object changed while it was read.", path=url, hint=_GONE)


class AbsentError(Exception):
    """The object does not exist."""


@contextmanager
def asking(url: str) -> Iterator[None]:
    """Turn the refusal of a question into a `NotFoundError`."""
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise NotFoundError("there is no such bucket.", path=url) from None
        raise AbsentError from None
    except (BaseError, OSError) as error:
        words, hint, _ = _refusal(error)
        raise NotFoundError(f"it cannot be accessed: {words}.", path=url, hint=hint) from None


@contextmanager
def writing(url: str) -> Iterator[None]:
    """Turn the refusal of a write into a `WriteError`; that an object exists is passed on."""
    from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

    try:
        yield
    except (AlreadyExistsError, PreconditionError):
        raise FileExistsError(url) from None
    except (BaseError, OSError) as error:
        words, hint, _ = _refusal(error)
        raise WriteError(f"it cannot be written: {words}.", path=url, hint=hint) from None


_STATUS = regex(r"status code: (\d+ [A-Z][A-Za-z ]*[a-z])")
_CODE = regex(r"<Code>(\w+)</Code>(?:\s*<Message>([^<]{1,300})</Message>)?")
_ACCESS = "Check the store's own settings: its keys, region and endpoint (docs/remote.md)."
_SECRET = regex(r"(?<=://)[^/@\s]*@|\?\S*")


def _refusal(error: Exception) -> tuple[str, str | None, bool]:
    """What a store said, in words without secrets; a hint; and whether a body merely broke off."""
    text = str(error).partition("\n\nDebug source")[0]
    status, code = _STATUS.search(text), _CODE.search(text)
    said = [status[1]] if status else []
    said += (
        [f"{code[1]}{f' ({code[2].strip().rstrip(chr(46))})' if code[2] else ''}"] if code else []
    )
    if said:
        denied = status is not None and status[1][:3] in ("301", "307", "400", "401", "403", "404")
        return printable(", ".join(said)), _ACCESS if denied else None, False
    words = _SECRET.sub("", text.splitlines()[0] if text else type(error).__name__)
    settled = re.search(r"after \d+ retries", words)
    unset = "169.254." in words or "credential" in words.lower() or "metadata" in words.lower()
    return printable(words[:300].rstrip(".:")), _ACCESS if unset else None, not (settled or unset)


def _object(meta: Any) -> Object:
    tag, when = meta["e_tag"] or "", meta["last_modified"].timestamp()
    return Object(meta["size"], tag, when, meta["version"] or "")
