"""Files that are sent into a folder of a store: begun, filled in order, sealed, then objects.

Memory: what came before its turn and what waits for its upload (`upload`), and the parts on their
way (`storage.stores`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

from reshard.core.locations import RemotePath
from reshard.errors import ReshardError, WriteError
from reshard.storage.remote import Opened, opened_as
from reshard.storage.stores import Bucket, Object, bucket_of
from reshard.transfer.output import StoppedError
from reshard.transfer.seals import Seals
from reshard.transfer.upload import Shared, Upload

# Bytes of small files that wait for their request.
_WAITING = 32 << 20


class DiffersError(WriteError):
    """A file that an interrupted run left holds other bytes than this run would write."""


class Standing:
    """A file that an interrupted run completed, and that is reused: what is put is compared.

    `read` fills a buffer from an offset on, and raises `OSError`.
    """

    def __init__(self, name: str, opened: Opened) -> None:
        self.name = name
        self.object = opened.known
        self._opened = opened

    def read(self, buffer: memoryview, offset: int) -> None:
        try:
            self._opened.read_into(offset, buffer)
        except ReshardError as error:
            raise OSError(error.message) from None

    def read_all(self, buffer: memoryview, offset: int) -> None:
        """The same. Raises `DiffersError`."""
        try:
            self.read(buffer, offset)
        except OSError as error:
            raise self._differs(f"cannot be read again: {error}") from None

    def put(self, data: memoryview, offset: int) -> None:
        """Compare bytes with what is there. Raises `DiffersError`."""
        there = memoryview(bytearray(len(data)))
        if len(data):
            self.read_all(there, offset)
        if there != data:
            raise self._differs("does not hold what this run writes there")

    def _differs(self, how: str) -> DiffersError:
        return DiffersError(
            f"what an interrupted run left of it {how}.",
            path=self._opened.path,
            hint="It is deleted. Convert again with --resume: it is made again, and the other "
            "files are reused.",
        )


class Sending:
    """The files of one output that are being sent. Safe to use from threads.

    `made` are the objects that are complete, by name, and `begun` the names of those that may be.
    `heard` is told of each that is complete. Raises `WriteError`.
    """

    def __init__(
        self, target: RemotePath, heard: Callable[[str, Object], None] | None = None
    ) -> None:
        self.target = target
        self.bucket: Bucket = bucket_of(target)
        self.changed = threading.Condition()
        self.made: dict[str, Object] = {}
        self.begun: set[str] = set()
        self.failure: BaseException | None = None
        self._heard = heard
        self._shared = Shared(self.changed)
        self._open: dict[int, Upload | Standing] = {}
        self._count = 0
        self._waiting = 0
        self._seals = Seals()

    def key(self, name: str) -> str:
        """The key of a file of the output."""
        return (self.target / name).key

    def still(self, name: str, listed: Object | None, known: Object) -> Object | None:
        """What a list shows under a name, if it still is the object that is `known`."""
        if listed is not None and listed.tag != known.tag:
            listed = self.bucket.head(self.key(name))  # some lists write tags in another way
        if listed is None or (listed.nbytes, listed.tag) != (known.nbytes, known.tag):
            return None
        return listed

    def create(self, name: str, nbytes: int, standing: Object | None = None) -> int:
        """Begin a file of `nbytes` bytes, or compare with the one that is `standing`; its
        number."""
        with self.changed:
            self._count += 1
            number = self._count
            if standing is not None:
                self._open[number] = Standing(name, opened_as(self.target / name, standing))
            else:
                upload = self._open[number] = Upload(name, nbytes, self._shared, self._send)
                upload.failure = self.failure
        return number

    def standing(self, number: int) -> Standing | None:
        """The file of an interrupted run that is reused, if it is one."""
        found = self._open[number]
        return found if isinstance(found, Standing) else None

    def put(self, number: int, data: memoryview, offset: int, *, known: bool = False) -> None:
        """Take bytes of a file; `known` beforehand are few, and never wait."""
        file = self._open[number]
        if isinstance(file, Standing):
            file.put(data, offset)
        else:
            file.put(data, offset, known=known)

    def seal(self, number: int) -> None:
        """Let a file become an object once all of it is there; `settle` waits for it."""
        file = self._open[number]
        if isinstance(file, Standing):
            self.note(file.name, file.object)
            return
        with self.changed:
            if file.small:
                self.changed.wait_for(lambda: self._waiting <= _WAITING or self.failure)
                self._waiting += file.nbytes
            file.sealed = True
            self.begun.add(file.name)
            self.changed.notify_all()
        self._seals.add(lambda: self._finish(number, file))

    def note(self, name: str, object_: Object) -> None:
        """Note that an object is in the store."""
        with self.changed:
            self.made[name] = object_
        if self._heard is not None:
            self._heard(name, object_)

    def halt(self, failure: BaseException | None = None) -> None:
        """Let everyone who waits end: the run failed. Files of which all is there go on."""
        with self.changed:
            self.failure = self.failure or failure or StoppedError()
            for file in self._open.values():
                if isinstance(file, Upload) and not file.complete:
                    file.failure = file.failure or self.failure
            self.changed.notify_all()

    def settle(self) -> None:
        """Wait until every file that was sealed is in the store."""
        self._seals.settle()

    def close(self, *, finish: bool = False) -> None:
        """End what is under way; nothing is left of it. With `finish`, files of which all is there
        become objects before."""
        self.halt()
        if finish:
            for file in [*self._open.values()]:
                if isinstance(file, Upload) and file.complete:
                    with suppress(ReshardError, StoppedError):
                        file.finish()
        for file in [*self._open.values()]:
            if isinstance(file, Upload):
                file.drop()
        self._seals.close()

    def _send(self, name: str, pieces: Iterator[bytes], nbytes: int) -> None:
        """Upload a file as it is made."""
        self.note(name, self.bucket.upload(self.key(name), pieces, nbytes))

    def _finish(self, number: int, upload: Upload) -> None:
        try:
            if upload.small:
                whole = upload.whole()
                self.note(upload.name, self.bucket.put(self.key(upload.name), whole))
            else:
                upload.finish()
        finally:
            with self.changed:
                self._open.pop(number, None)
                self._waiting -= upload.nbytes if upload.small else 0
                self.changed.notify_all()
