"""Sync written bytes to the disk while others are still being written.

Without this the file stays in the page cache until the fsync at its end, and the disk is idle until
then: for a shard of 1 GB that was half of a conversion's time.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from reshard.errors import WriteError

# Bytes written between two syncs. Smaller steps keep the disk no busier.
_STEP = 128 << 20


class Writeback:
    """Syncs files in the background, one sync at a time. Use as a context manager.

    Errors of the disk are raised by `wrote` or on leaving, as `WriteError`: the kernel reports
    each only once for a file, so the last fsync would not see it again.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reshard-sync")
        self._lock = threading.Lock()
        self._running: Future[None] | None = None
        self._unsynced = 0

    def wrote(self, fd: int, nbytes: int) -> None:
        """Note that `nbytes` were written to `fd`. Returns at once."""
        with self._lock:
            self._unsynced += nbytes
            if self._unsynced < _STEP or not (self._running is None or self._running.done()):
                return
            self._unsynced = 0
            finished, self._running = self._running, self._pool.submit(_sync, os.dup(fd))
        if finished is not None:
            finished.result()

    def __enter__(self) -> Writeback:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown()
        if error is None and self._running is not None:
            self._running.result()


def _sync(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        raise WriteError(f"the output cannot be written: {error.strerror or error}.") from None
    finally:
        os.close(fd)
