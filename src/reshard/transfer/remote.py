"""An output in an object store: streamed as it is made, and complete with its last object.

    OUT/reshard.partial.json    the first: which run writes, and which files; until the end
    OUT/model-00001-of-...      an upload in parts, which nobody sees until it is whole
    OUT/reshard.json            the last: with it the output is complete

A store has no rename. Readers take a folder with the first of these and without the last for an
output that is not complete (`storage.remote`). The first is written on the condition that there is
none, so of two runs of one output one is refused. A run that fails ends its uploads and deletes
what it wrote; one that is killed leaves its first object, which says what else may be left, for
`--overwrite` to delete. With `--overwrite` the old output goes when the first file of the new one
is whole: a store cannot exchange the two in one step.

Memory: what came before its turn and what waits for its upload (`upload`), and the parts on their
way (`storage.stores`).
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from reshard._version import __version__
from reshard.core.findings import Finding
from reshard.core.locations import CLAIM, MANIFEST, RemotePath
from reshard.errors import ReshardError, UnsupportedError, WriteError
from reshard.storage import remote, strict_json
from reshard.storage.stores import Bucket, Object, bucket_of
from reshard.transfer.journal import Journal
from reshard.transfer.output import StoppedError
from reshard.transfer.seals import Seals
from reshard.transfer.upload import Shared, Upload

# Bytes of small files that wait for their request.
_WAITING = 32 << 20


class RemoteFolder:
    """A folder of a store being written. Use as a context manager; call `commit` last.

    `names` are those of all files that will be written. `partial` is where verification finds them
    before the end: in their place. Raises `WriteError`.
    """

    in_order = True
    journal: Journal | None = None  # what a killed run left is deleted
    resumed = ""

    def __init__(
        self, target: RemotePath, digest: str, names: Iterable[str], *, overwrite: bool = False
    ) -> None:
        self.target = target
        self.partial: Path = target
        self.overwrite = overwrite
        self.findings: list[Finding] = []
        self.committed = False
        self.changed = threading.Condition()
        self._shared = Shared(self.changed)
        self.bucket: Bucket = bucket_of(target)
        self._names = [*names, MANIFEST]
        self._plan = digest
        self._claim: Object | None = None
        self._manifest = b""
        self._made: dict[str, Object] = {}
        self._begun: set[str] = set()
        self._open: dict[int, Upload] = {}
        self._count = 0
        self._waiting = 0
        self._old: list[str] = []
        self._displaced = False
        self._seals = Seals()

    def __enter__(self) -> RemoteFolder:
        self._begin()
        remote.being_written.add(str(self.target))
        return self

    def key(self, name: str) -> str:
        """The key of a file of the output."""
        return (self.target / name).key

    def _send(self, name: str, pieces: Iterator[bytes], nbytes: int) -> None:
        """Upload a file as it is made."""
        self._note(name, self.bucket.upload(self.key(name), pieces, nbytes))

    def _note(self, name: str, made: Object) -> None:
        """That an object is in the store."""
        with self.changed:
            self._made[name] = made

    def create(self, name: str, nbytes: int) -> int:
        """Begin a file of `nbytes` bytes; returns its number."""
        with self.changed:
            self._count += 1
            number = self._count
            self._open[number] = Upload(name, nbytes, self._shared, self._send)
        return number

    def put(
        self, name: str, fd: int, data: memoryview, offset: int, *, known: bool = False
    ) -> None:
        """Take `data` at `offset` of a file made by `create`; `known`: it is no tensor's."""
        self._open[fd].put(data, offset, known=known)

    def lend(self, name: str, fd: int) -> Path:
        """An object is written by one process."""
        raise UnsupportedError(
            "the workers of a cluster write into a shared folder, and this output is in a store.",
            path=self.target,
            hint="Name an output in a shared folder, or leave out --engine ray.",
        )

    def take_back(self, name: str, path: Path) -> int:
        """Never called: nothing was lent."""
        raise NotImplementedError

    def seal(self, name: str, fd: int) -> None:
        """Let a file become an object once all of it is there; `settle` waits for it."""
        upload = self._open[fd]
        self._displace()
        with self.changed:
            if upload.small:
                self.changed.wait_for(lambda: self._waiting <= _WAITING)
                self._waiting += upload.nbytes
            upload.sealed = True
            self._begun.add(name)
            self.changed.notify_all()
        self._seals.add(lambda: self._finish(fd, upload))

    def halt(self) -> None:
        """Let everyone who waits end: the run failed."""
        with self.changed:
            for upload in self._open.values():
                upload.failure = upload.failure or StoppedError()
            self.changed.notify_all()

    def settle(self) -> None:
        """Wait until every file that was sealed is in the store."""
        self._seals.settle()
        remote.forget(self.target)  # verification asks what is there

    def write(self, name: str, data: bytes) -> None:
        """Write a small file; `reshard.json` is kept until `commit`."""
        if name == MANIFEST:
            self._manifest = data
            return
        number = self.create(name, len(data))
        self.put(name, number, memoryview(data), 0, known=True)
        self.seal(name, number)

    def commit(self) -> None:
        """Complete the output by its last object, if all others are still what was written."""
        self.settle()
        self._displace()
        self._check_still_ours()
        try:
            self.bucket.put(self.key(MANIFEST), self._manifest, new=True)
        except FileExistsError:
            raise self._not_alone() from None
        self.committed = True
        try:
            self.bucket.delete([self.key(CLAIM)])
        except WriteError as error:
            self.findings.append(
                Finding(
                    "partial-output-kept",
                    f"the output is complete; {CLAIM} beside it cannot be deleted: {error.message}",
                    subject=str(self.target / CLAIM),
                )
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.halt()
            for upload in [*self._open.values()]:
                upload.drop()
            self._seals.close()
            if not self.committed:
                self._clear()
        except ReshardError as left:
            if not isinstance(error, ReshardError):
                raise
            error.message += f" What was written cannot be deleted: {left.message}"
        finally:
            if isinstance(error, ReshardError) and self._displaced and not self.committed:
                error.message += " The old output is deleted: a store cannot exchange the two."
            remote.being_written.discard(str(self.target))
            remote.forget(self.target)

    def _begin(self) -> None:
        old = remote.contents(self.target)
        if MANIFEST in old:
            if not self.overwrite:
                raise WriteError(
                    "the output exists.", path=self.target, hint="Name another output."
                )
            text = strict_json.read_file(self.target / MANIFEST, max_nbytes=strict_json.MAX_INDEX)
            self._old = [MANIFEST, *_listed(text)]
        if CLAIM in old and self.overwrite:
            # What a run that was killed left, or one whose output is complete.
            text = strict_json.parse_object(remote.claim(self.target), str(self.target / CLAIM))
            left = [] if MANIFEST in old else _listed(text)
            self.bucket.delete([self.key(name) for name in (*left, CLAIM)])
        stated = {
            "reshard": __version__,
            "plan": self._plan,
            "host": platform.node(),
            "pid": os.getpid(),
            "began": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "files": {name: {} for name in self._names},
        }
        try:
            claim = json.dumps(stated, indent=1).encode()
            self._claim = self.bucket.put(self.key(CLAIM), claim, new=True)
        except FileExistsError:
            raise self._not_alone() from None
        remote.forget(self.target)

    def _displace(self) -> None:
        """Delete the output that this one replaces, its `reshard.json` first."""
        with self.changed:
            old, self._old = self._old, []
        if old:
            self._displaced = True
            self.bucket.delete([self.key(MANIFEST)])
            self.bucket.delete([self.key(name) for name in old])

    def _finish(self, number: int, upload: Upload) -> None:
        try:
            if upload.small:
                key = self.key(upload.name)
                self._note(upload.name, self.bucket.put(key, upload.whole()))
            else:
                upload.finish()
        finally:
            with self.changed:
                self._open.pop(number, None)
                self._waiting -= upload.nbytes if upload.small else 0
                self.changed.notify_all()

    def _check_still_ours(self) -> None:
        """Raise where another run took this output over, or an object is no longer ours."""
        if not self._is_ours():
            raise self._not_alone()
        there = dict(remote.below(self.target))
        there.pop(CLAIM, None)
        for name in sorted({*there, *self._made}):
            mine, now = self._made.get(name), there.get(name)
            if mine is not None and now is not None and now.tag != mine.tag:
                now = self.bucket.head(self.key(name))  # some lists write tags in another way
            if mine is None or now is None or (mine.nbytes, mine.tag) != (now.nbytes, now.tag):
                raise WriteError(
                    f"something else wrote or deleted {name!r} while this run wrote.",
                    path=self.target,
                    hint="Name another output.",
                )

    def _is_ours(self) -> bool:
        """Whether the first object is still that of this run."""
        if self._claim is None:
            return False
        claim = self.bucket.head(self.key(CLAIM))
        return claim is not None and claim.tag == self._claim.tag

    def _not_alone(self) -> WriteError:
        return WriteError(
            "another run writes this output, or was killed while it did.",
            path=self.target,
            hint="Wait for it. If it no longer runs, convert again with --overwrite, which "
            "deletes what it left; or name another output.",
        )

    def _clear(self) -> None:
        """Delete what this run wrote, if the output is still this run's."""
        if self._is_ours():
            names = [*{*self._made, *self._begun}, CLAIM]
            self.bucket.delete([self.key(name) for name in names])


def _listed(stated: Mapping[str, Any]) -> list[str]:
    """The files that a `reshard.json`, or what stands for it, lists."""
    files = stated.get("files")
    names = [*files] if isinstance(files, dict) else []
    return [name for name in names if not {"", ".", ".."} & {*name.split("/")}]
