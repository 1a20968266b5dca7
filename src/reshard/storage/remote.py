"""Objects of stores, accessed like files: what lies at a URL, and its bytes.

A store's answers are cached for a minute, and dropped each time a user names a URL: a conversion
asks a thousand times what lies in a folder, and one listing answers all of it.

A folder of ours is complete once it has its `reshard.json`, which is written last. Until then it
holds `reshard.partial.json`, and reading it is an `IncompleteError`. Readers never see the objects
`reshard.partial.*`, which a run keeps there for itself.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from reshard.core.locations import CLAIM, HUB, MANIFEST, MARKS, RemotePath, located, named
from reshard.errors import IncompleteError, NotFoundError
from reshard.storage import credentials
from reshard.storage.ahead import Ahead
from reshard.storage.places import MAX_DEPTH
from reshard.storage.stores import Listing, Object, Store, bucket_of

# Seconds for which a store's answer is cached.
_FRESH = 60.0
# Stands for an object that is not in a listing.
_NOTHING = Object(-2)


class _View(Struct):
    """A store's cached answers, and their time; `listed` are all folders that were ever listed."""

    store: Store
    generation: int
    since: float
    folders: dict[str, Listing] = field(default_factory=dict)
    heads: dict[str, Object | None] = field(default_factory=dict)
    listed: set[str] = field(default_factory=set)
    lock: Any = field(default_factory=threading.RLock)

    def refresh(self) -> None:
        """Drop the cached answers if they are out of date."""
        if self.generation != named() or time.monotonic() - self.since > _FRESH:
            self.forget()

    def forget(self) -> None:
        """Drop all cached answers."""
        with self.lock:
            self.folders.clear()
            self.heads.clear()
            self.generation, self.since = named(), time.monotonic()


def _view(path: RemotePath) -> _View:
    if path.scheme == HUB:
        _forget_revisions(named())
    return _opened(path.scheme, path.bucket, credentials.fingerprint())


@lru_cache(1)
def _forget_revisions(generation: int) -> None:
    from reshard.storage import hub

    hub.forget()
    _opened.cache_clear()


@lru_cache(64)
def _opened(scheme: str, bucket: str, settings: object) -> _View:
    path = located(f"{scheme}://{bucket}")
    assert isinstance(path, RemotePath)
    return _View(store_of(path), named(), time.monotonic())


def store_of(path: RemotePath) -> Store:
    """The store that a URL lies in. Raises `NotFoundError`, `UnsupportedError`."""
    if path.scheme == HUB:
        from reshard.storage.hub import model_of

        return model_of(path)
    if path.scheme in ("http", "https"):
        from reshard.storage.web import host_of

        return host_of(path)
    return bucket_of(path)


def forget(path: RemotePath) -> None:
    """Drop a store's cached answers: something was written or deleted, or may have been."""
    _view(path).forget()


#: The URLs of the outputs that this process writes, and reads while they are not complete.
being_written: set[str] = set()


def listing(path: RemotePath) -> Listing:
    """What lies in a folder, by name; empty where there is none.

    Raises `IncompleteError` for an output of ours that is not complete.
    """
    found = contents(path)
    if is_unfinished(path) and str(path) not in being_written:
        raise IncompleteError(
            f"it is an output of reshard that is not complete: it has no {MANIFEST}, which is "
            "written last.",
            path=path,
            hint="Wait for the run that writes it. If it was killed, run its command again; with "
            "--resume it goes on.",
        )
    return {name: there for name, there in found.items() if not name.startswith(MARKS)}


def is_unfinished(path: RemotePath) -> bool:
    """Whether an output of ours lies there that is not complete."""
    there = contents(path)
    return CLAIM in there and MANIFEST not in there


def read_whole(path: RemotePath) -> tuple[bytes, Object]:
    """A small object, as it is now, and which one it is. Raises `NotFoundError`."""
    store, key = _view(path).store, path.key
    there = store.head(key)
    if there is None:
        raise NotFoundError("the object does not exist.", path=path)
    return bytes(store.read(key, 0, there.nbytes, there)) if there.nbytes else b"", there


def contents(path: RemotePath) -> Listing:
    """What lies in a folder, complete or not, with what a run keeps there for itself."""
    view = _view(path)
    with view.lock:
        view.refresh()
        if path.key not in view.folders:
            view.folders[path.key] = view.store.folder(path.key)
            view.listed.add(path.key)
        return view.folders[path.key]


def below(path: RemotePath) -> Mapping[str, Object]:
    """Every object below a folder, by its name there with `/`, with those of `MARKS`."""
    return _view(path).store.below(path.key)


def found(path: RemotePath) -> Object | None:
    """What lies at a URL: an object, None for a folder. Raises `FileNotFoundError`."""
    if path.is_root:
        return None
    view = _view(path)
    with view.lock:
        view.refresh()
        above = next((p for p in path.parents if p.key in view.listed or p.is_root), path)
        if above.key in view.listed:
            return _below(view, above, path.relative_to(above).parts)
        # Not the folder above: it may hold thousands of others, or be closed to this user.
        if listing(path):
            return None
        return _head(view, path)


def _below(view: _View, folder: RemotePath, names: tuple[str, ...]) -> Object | None:
    """What lies below a folder that was listed."""
    for name in names[:-1]:
        if listing(folder).get(name, _NOTHING) is not None:
            raise FileNotFoundError(str(folder / name))
        folder = folder / name
    there = listing(folder).get(names[-1], _NOTHING)
    if there is _NOTHING:
        raise FileNotFoundError(str(folder / names[-1]))
    return there if there is None or there.nbytes >= 0 else _head(view, folder / names[-1])


def _head(view: _View, path: RemotePath) -> Object:
    if path.key not in view.heads:
        view.heads[path.key] = view.store.head(path.key)
    there = view.heads[path.key]
    if there is None:
        raise FileNotFoundError(str(path))
    return there


class Stored(Struct, frozen=True):
    """A URL that can be asked about, as `places.Local` is a path of this machine.

    A store has no links, and no current folder.
    """

    path: RemotePath

    def status(self, *, follow: bool = True) -> os.stat_result | None:
        try:
            there = found(self.path)
        except FileNotFoundError:
            return None
        mode, nbytes, when = stat.S_IFDIR | 0o755, 0, 0.0
        if there is not None:
            mode, nbytes, when = stat.S_IFREG | 0o644, there.nbytes, there.modified
        seconds, exactly = int(when), int(when * 1e9)
        return os.stat_result(
            (mode, 0, 0, 1, 0, 0, nbytes, seconds, seconds, seconds),
            dict.fromkeys(("st_atime_ns", "st_mtime_ns", "st_ctime_ns"), exactly),
        )

    def is_link(self) -> bool:
        return False

    def names(self) -> list[str]:
        return sorted(listing(self.path))

    def own_folders(self) -> list[Path]:
        return [self.path / name for name in self.names() if listing(self.path)[name] is None]

    def below(self, depth: int = MAX_DEPTH) -> Iterator[Path]:
        names = (name for name in sorted(below(self.path)) if not name.startswith(MARKS))
        return (self.path / name for name in names)

    def real(self) -> Path:
        return self.path

    def absolute(self) -> Path:
        return self.path

    def is_here(self) -> bool:
        return False


def identity(there: Object) -> tuple[int, int, int, int]:
    """Which object it is, as `storage.local` keeps it of files: by its tag and size."""
    tag = there.tag or str(there.modified)
    digest = hashlib.blake2b(tag.encode(), digest_size=16).digest()
    return -1, int.from_bytes(digest, "little"), there.nbytes, 0


class Opened(Struct, frozen=True):
    """An object that is read, as it was when it was opened."""

    path: RemotePath
    store: Store
    known: Object
    ahead: Ahead

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on. Raises `IncompleteError`."""
        self.ahead.read_into(self, offset, buffer)

    @property
    def nbytes(self) -> int:
        return self.known.nbytes

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes `[start, stop)`, by one request. Raises `IncompleteError`."""
        return self.store.read(self.path.key, start, stop, self.known)

    def identity_now(self) -> tuple[int, int, int, int] | None:
        """Which object lies there now (`forget` first); None where there is none."""
        if self.path.scheme == HUB:  # a commit does not change
            return identity(self.known)
        try:
            there = found(self.path)
        except (FileNotFoundError, NotFoundError):
            return None
        return None if there is None else identity(there)


def forget_all(paths: Iterable[str]) -> None:
    """Ask the stores of these URLs anew; paths of this machine may be among them."""
    urls = [path for path in map(located, paths) if isinstance(path, RemotePath)]
    for path in {(path.scheme, path.bucket): path for path in urls}.values():
        forget(path)


def opened(path: str) -> Opened:
    """The object of a URL. Raises `NotFoundError`."""
    place = located(path)
    assert isinstance(place, RemotePath)
    try:
        there = found(place)
    except FileNotFoundError:
        raise NotFoundError("the object does not exist.", path=path) from None
    if there is None:
        raise NotFoundError("it is a folder, not an object.", path=path)
    return Opened(place, _view(place).store, there, _ahead(path, identity(there)))


def opened_as(path: RemotePath, known: Object) -> Opened:
    """An object that was seen before: reading another one in its place is an `IncompleteError`."""
    return Opened(path, _view(path).store, known, Ahead())


@lru_cache(4096)
def _ahead(path: str, which: tuple[int, int, int, int]) -> Ahead:
    """What was read of an object: a run opens most of them several times."""
    return Ahead()
