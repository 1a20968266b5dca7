"""Hold signals back while an operation is half done.

Python runs a signal's handler between any two steps of the main thread, and most handlers raise:
between two renames, or half-way through a clean-up, that would leave a broken state. SIGKILL cannot
be held back; the next run repairs what it leaves (`leftovers`).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@contextmanager
def held_signals() -> Iterator[None]:
    """Within the block, the signals that end a program wait; on leaving, they arrive.

    Masks would not do: another thread may take a signal that the main thread masks, and Python
    still runs its handler in the main thread. In other threads than the main one, in which no
    handler runs, this does nothing. Blocks may be nested: signals arrive on leaving the outermost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        came.append(signum)

    before: dict[int, Any] = {}
    try:
        for signum in _HELD:
            handler = signal.getsignal(signum)
            # None: a handler that was not installed from Python, and could not be put back.
            if handler is not None and handler != signal.SIG_IGN:
                before[signum] = handler
                signal.signal(signum, note)
        yield
    finally:
        for held, handler in before.items():
            signal.signal(held, handler)
        for number in came:
            signal.raise_signal(number)
