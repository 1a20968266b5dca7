"""The preloaded library, and the rules that a process gives it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

COUNT, FAIL, FAIL_ALWAYS, KILL_BEFORE, KILL_AFTER, SHORT = range(6)
SOURCE = Path(__file__).with_name("fault.c")


def compiler() -> str | None:
    """A C compiler's command; None where there is none."""
    return next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


def build(folder: Path) -> Path:
    """Compile the library into `folder`."""
    library = folder / "fault.so"
    command = [str(compiler()), "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return library


class Faults:
    """The library that this process was started with."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self._library.fault_name.restype = ctypes.c_char_p

    def add(self, call: str, path: str, nth: int, action: int, error: int = 0) -> int:
        """The n-th (from 1) call of that name, `*` for any, on a path that has `path` in it."""
        added: int = self._library.fault_add(call.encode(), path.encode(), nth, action, error)
        return added

    def clear(self) -> None:
        """Forget all rules."""
        self._library.fault_clear()

    def seen(self, rule: int) -> list[str]:
        """The names of the calls that a COUNT rule saw."""
        count: int = self._library.fault_seen(rule)
        return [self._library.fault_name(index).decode() for index in range(count)]
