"""One file that is sent to a store: its bytes are put in order, and sent as soon as possible.

Threads make a file's bytes side by side, and an upload takes them one after another. A thread that
brings the next bytes waits only for the upload; one that is ahead waits while too many bytes are.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

from msgspec import Struct

from reshard.transfer.output import StoppedError

# Bytes of all files together that wait for what lies before them.
_AHEAD = 32 << 20
# Bytes of one file that wait for its upload.
_READY = 8 << 20
# A file of at most so many bytes is one request, and is held until it is whole.
_SMALL = 4 << 20


#: Uploads an object of a name and size as its pieces come.
Send = Callable[[str, Iterator[bytes], int], None]


class Shared(Struct):
    """What the uploads of one output share: what they wait for, and the bytes that are ahead."""

    changed: threading.Condition
    ahead: int = 0


class Upload:
    """A file of `nbytes` bytes. `send` uploads what it is given, in a thread of its own.

    `sealed` once everyone is done with it, `failure` once it cannot go on.
    """

    def __init__(self, name: str, nbytes: int, shared: Shared, send: Send) -> None:
        self.name = name
        self.nbytes = nbytes
        self.sealed = False
        self.failure: BaseException | None = None
        self.small: bool = nbytes <= _SMALL
        self._shared = shared
        self._changed = shared.changed
        self._upload = send
        self._next = 0
        self._held: dict[int, bytes] = {}
        self._counted: set[int] = set()
        self._ready: deque[bytes] = deque()
        self._ready_nbytes = 0
        self._thread: threading.Thread | None = None
        if not self.small:
            self._thread = threading.Thread(target=self._send, name="reshard-upload", daemon=True)
            self._thread.start()

    def put(self, data: memoryview, offset: int, *, known: bool) -> None:
        """Take bytes; those that are `known` beforehand are few, and never wait."""
        with self._changed:
            if not known:
                self._changed.wait_for(lambda: self.failure is not None or self._room(offset))
            if self.failure is not None:
                raise self.failure
            self._held[offset] = bytes(data)
            if not known and offset != self._next:
                self._counted.add(offset)
                self._shared.ahead += len(data)
            while (there := self._held.pop(self._next, None)) is not None:
                if self._next in self._counted:
                    self._counted.remove(self._next)
                    self._shared.ahead -= len(there)
                self._next += len(there)
                if there:
                    self._ready.append(there)
                    self._ready_nbytes += len(there)
            self._changed.notify_all()

    def whole(self) -> bytes:
        """All of a small file."""
        return b"".join(self._ready)

    def finish(self) -> None:
        """Wait until it is in the store. Raises what failed."""
        if self._thread is not None:
            self._thread.join()
        if self.failure is not None:
            raise self.failure

    def drop(self) -> None:
        """End it; nothing is left of it."""
        with self._changed:
            self.failure = self.failure or StoppedError()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _room(self, offset: int) -> bool:
        if offset == self._next:
            return self.small or self._ready_nbytes <= _READY
        return self._shared.ahead <= _AHEAD

    def _send(self) -> None:
        try:
            self._upload(self.name, self._pieces(), self.nbytes)
        except BaseException as error:
            with self._changed:
                self.failure = self.failure or error
                self._changed.notify_all()

    def _pieces(self) -> Iterator[bytes]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.failure or self._ready or self.complete)
                if self.failure is not None:
                    raise StoppedError
                if not self._ready:
                    return
                data = self._ready.popleft()
                self._ready_nbytes -= len(data)
                self._changed.notify_all()
            yield data

    @property
    def complete(self) -> bool:
        """Whether everyone is done with it, and all of it is there."""
        return self.sealed and self._next == self.nbytes
