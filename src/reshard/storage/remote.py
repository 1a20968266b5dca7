"""Objects of stores behind the same door as files: what lies at a URL, and its bytes.

What a store said is kept for a short time, and asked again each time that a user names a URL: a
conversion asks some thousand times what lies in a folder, and one list answers all of it.

A folder of ours is complete once it has its `reshard.json`, which is written last. Until then it
holds `reshard.partial.json`, and reading it is an `IncompleteError`.

Reads of neighbouring bytes become one request (`Ahead`): headers are read in small steps, and
weights in blocks of 1 to 4 MiB, front to back.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from msgspec import Struct, field

from reshard.core.locations import HUB, RemotePath, located, named
from reshard.errors import IncompleteError, NotFoundError
from reshard.storage import credentials
from reshard.storage.stores import Listing, Object, Store, bucket_of

#: The last object of an output, and the one that stands while it is written.
MANIFEST, CLAIM = "reshard.json", "reshard.partial.json"
# Seconds that an answer of a store is taken for.
_FRESH = 60.0
# Bytes of the first request at a place, and of the requests of one who reads on from there.
_FIRST, _MOST = 128 << 10, 4 << 20
# Bytes of a stretch that is kept even once all of it was used.
_HEADER = 1 << 20
# Bytes that are kept of what was read ahead, in all files together.
_KEPT = 48 << 20


# What is not in a list.
_NOTHING = Object(-2)


class _View(Struct):
    """What a store said, and when; `listed` are the folders that it was asked for at any time."""

    store: Store
    generation: int
    since: float
    folders: dict[str, Listing] = field(default_factory=dict)
    heads: dict[str, Object | None] = field(default_factory=dict)
    listed: set[str] = field(default_factory=set)
    lock: Any = field(default_factory=threading.RLock)

    def refresh(self) -> None:
        """Forget what is out of date."""
        if self.generation != named() or time.monotonic() - self.since > _FRESH:
            self.forget()

    def forget(self) -> None:
        """Ask anew for everything."""
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
    """That something was written or deleted, or may have been: ask the store anew."""
    _view(path).forget()


#: The URLs of the outputs that this process writes, and reads while they are not complete.
being_written: set[str] = set()


def listing(path: RemotePath) -> Listing:
    """What lies in a folder, by name; empty where there is none.

    Raises `IncompleteError` for an output of ours that is not complete.
    """
    found = contents(path)
    if CLAIM in found and MANIFEST not in found and str(path) not in being_written:
        raise IncompleteError(
            f"it is an output of reshard that is not complete: it has no {MANIFEST}, which is "
            "written last.",
            path=path,
            hint="Wait for the run that writes it; if none does, convert again with --overwrite.",
        )
    return found


def contents(path: RemotePath) -> Listing:
    """What lies in a folder, complete or not."""
    view = _view(path)
    with view.lock:
        view.refresh()
        if path.key not in view.folders:
            view.folders[path.key] = view.store.folder(path.key)
            view.listed.add(path.key)
        return view.folders[path.key]


def below(path: RemotePath) -> Mapping[str, Object]:
    """Every object below a folder, by its name there with `/`."""
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


def status(path: RemotePath) -> os.stat_result | None:
    """What `os.stat` would say; None where nothing is there. Raises `NotFoundError`."""
    try:
        there = found(path)
    except FileNotFoundError:
        return None
    if there is None:
        return os.stat_result((stat.S_IFDIR | 0o755, 0, 0, 1, 0, 0, 0, 0, 0, 0))
    when = int(there.modified)
    return os.stat_result((stat.S_IFREG | 0o644, 0, 0, 1, 0, 0, there.nbytes, when, when, when))


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
        raise NotFoundError("there is no such object.", path=path) from None
    if there is None:
        raise NotFoundError("it is a folder, not an object.", path=path)
    return Opened(place, _view(place).store, there, _ahead(path, identity(there)))


@lru_cache(4096)
def _ahead(path: str, which: tuple[int, int, int, int]) -> Ahead:
    """What was read of an object: a run opens most of them several times."""
    return Ahead()


class _Kept:
    """Stretches of objects that were read ahead, the last used last. Safe to use from threads."""

    def __init__(self, nbytes: int) -> None:
        self._most = nbytes
        self._held = 0
        self._all: OrderedDict[tuple[int, int], tuple[Ahead, memoryview]] = OrderedDict()
        self.lock = threading.Lock()

    def put(self, owner: Ahead, start: int, data: memoryview) -> None:
        """Keep a stretch; call with the lock held."""
        self._all[id(owner), start] = owner, data
        owner.stretches[start] = data
        self._held += len(data)
        while self._held > self._most and len(self._all) > 1:
            (_, first), (other, old) = self._all.popitem(last=False)
            other.stretches.pop(first, None)
            self._held -= len(old)

    def drop(self, owner: Ahead, start: int) -> None:
        """Forget a stretch; call with the lock held."""
        found = self._all.pop((id(owner), start), None)
        if found is not None:
            owner.stretches.pop(start, None)
            self._held -= len(found[1])


_kept = _Kept(_KEPT)


class Ahead:
    """What was read of one object and not yet used, and where its readers are expected next."""

    def __init__(self) -> None:
        self.stretches: dict[int, memoryview] = {}
        self._expected: OrderedDict[int, int] = OrderedDict()
        self._coming: dict[int, int] = {}
        self._arrived = threading.Condition(_kept.lock)

    def read_into(self, opened: Opened, offset: int, buffer: memoryview) -> None:
        """Fill a buffer, by what is kept and by new requests."""
        done = 0
        while done < len(buffer):
            at = offset + done
            with self._arrived:
                there = self._take(at, len(buffer) - done)
                if there is None and any(
                    start <= at < stop for start, stop in self._coming.items()
                ):
                    self._arrived.wait()
                    continue
                if there is None:
                    needed, nbytes = len(buffer) - done, opened.known.nbytes
                    stop = self._reach(at, needed, nbytes, opened.path)
                    self._coming[at] = stop
            if there is None:
                self._fetch(opened, at, stop)
            else:
                buffer[done : done + len(there)] = there
                done += len(there)

    def _take(self, at: int, nbytes: int) -> memoryview | None:
        """What is kept from `at` on, at most `nbytes` bytes."""
        for start, data in self.stretches.items():
            if start <= at < start + len(data):
                there = data[at - start : at - start + nbytes]
                # Weights are read once, headers again and again.
                if at + len(there) == start + len(data) and len(data) > _HEADER:
                    _kept.drop(self, start)
                return there
        return None

    def _reach(self, at: int, needed: int, nbytes: int, path: RemotePath) -> int:
        """Where a request from `at` on ends: who reads on gets twice as much each time."""
        if at >= nbytes:
            raise IncompleteError(
                f"the object ends at byte {nbytes}; bytes to {at + needed} are needed.",
                path=path,
                hint="The file was cut off; copy it again or use another checkpoint.",
            )
        window = self._expected.pop(at, _FIRST)
        stop = min(at + max(min(needed, 2 * _MOST), window), nbytes)
        # Not beyond what is kept or comes already.
        others = [*self.stretches, *self._coming]
        stop = min([stop, *(start for start in others if start > at)])
        self._expected[stop] = min(2 * window, _MOST)
        while len(self._expected) > 64:
            self._expected.popitem(last=False)
        return stop

    def _fetch(self, opened: Opened, at: int, stop: int) -> None:
        try:
            data = opened.store.read(opened.path.key, at, stop, opened.known)
        except BaseException:
            with self._arrived:
                del self._coming[at]
                self._arrived.notify_all()
            raise
        with self._arrived:
            del self._coming[at]
            _kept.put(self, at, data)
            self._arrived.notify_all()
