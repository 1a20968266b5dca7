"""Finish written files in a few threads: sync each to the disk, then give it its name.

A universal checkpoint has four files for each parameter. Synced one after the other, each waits for
a commit of the file system's journal; synced side by side, many share one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_THREADS = 32
# Files that are written and not yet synced: each holds a descriptor.
_WAITING = 64


class Seals:
    """Calls what it is given in threads of its own, and raises what failed.

    Safe to use from threads. After a failure nothing more is called.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="reshard-seal")
        self._changed = threading.Condition()
        self._pending = 0
        self._failure: BaseException | None = None

    def add(self, seal: Callable[[], None]) -> None:
        """Have `seal` called soon. Waits while many wait; raises what an earlier one raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending < _WAITING)
            self._raise()
            self._pending += 1
        self._pool.submit(self._call, seal)

    def settle(self) -> None:
        """Wait for all. Raises what one of them raised."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending)
            self._raise()

    def close(self) -> None:
        """Wait for what is under way, and drop what has not begun."""
        self._pool.shutdown(cancel_futures=True)

    def _call(self, seal: Callable[[], None]) -> None:
        failure = self._failure
        try:
            if failure is None:
                seal()
        except BaseException as error:
            failure = error
        with self._changed:
            self._failure = self._failure or failure
            self._pending -= 1
            self._changed.notify_all()

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure
