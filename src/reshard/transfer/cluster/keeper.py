"""Wait for the end of a program that started a cluster, and end what the cluster leaves.

    python keeper.py NAME=FOLDER      a variable of the environment of all its processes,
                                      and the folder of their sockets and logs

Ray's processes end with the program, even where it is killed, but for two agents: they try for a
minute to report to a server that is gone (ray 2.60, `_private/process_watcher.py`). The folder
stays, too. A program that ends by itself has removed it, and then nothing is done here.

This file runs as a program of its own, with nothing but Python's library. Its standard input ends
when the program does.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

# Times that processes are looked for, which others may have started meanwhile.
_TRIES = 50


def main(mark: str) -> None:
    """Wait, and clean up."""
    _, _, folder = mark.partition("=")
    sys.stdin.buffer.read()
    if not Path(folder).is_dir():
        return
    for _ in range(_TRIES):
        found = _marked(os.fsencode(mark))
        if not found:
            break
        for pid in found:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


def _marked(mark: bytes) -> list[int]:
    """The processes of this user that have a variable; none where the system has no /proc."""
    found = []
    with suppress(OSError):
        for place in Path("/proc").iterdir():
            with suppress(OSError):
                if place.name.isdigit() and mark in (place / "environ").read_bytes().split(b"\0"):
                    found.append(int(place.name))
    return found


if __name__ == "__main__":
    main(sys.argv[1])
