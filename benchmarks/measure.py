"""One command in a process of its own: time, memory, bytes and system calls."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# A command prints this line where the first part of its work is done.
MARK = "done"


@dataclass(frozen=True, slots=True)
class Calls:
    """What a command and the children that it waited for read and wrote, by /proc/PID/io.

    `read` and `written` are the bytes of read-like and write-like system calls, cached or not
    (copy_file_range among them, mapped files not); `reads` and `writes` count these calls.
    """

    read: int
    written: int
    reads: int
    writes: int


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of a command took.

    `marked` are the seconds until it printed `MARK`, None if it did not. `cpu_seconds` are user and
    system time of the command and its children. `peak_nbytes` is the kernel's `ru_maxrss`: resident
    memory, mapped file pages included, of the largest process of the command. A child begins as a
    copy of the benchmark itself, so it cannot be less than the benchmark's own 30 MiB or so.
    `disk_nbytes` is the largest size of the watched folder while the command ran, beyond what it
    held before. `calls` is None where the system does not count them.
    """

    seconds: float
    marked: float | None
    cpu_seconds: float
    peak_nbytes: int
    output: str
    calls: Calls | None
    disk_nbytes: int = 0


class CommandError(Exception):
    """A contender ended with another exit code than 0."""


# Seconds between two looks at a folder: thousands of files take 15 ms.
_LOOK_SECONDS = 0.25


class _Watch:
    """Looks at a folder's size while a command runs."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._before = self._size()
        self.most = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while self._folder is not None and not self._end.wait(_LOOK_SECONDS):
            self.most = max(self.most, self._size() - self._before)

    def _size(self) -> int:
        return 0 if self._folder is None else allocated(self._folder)


def allocated(folder: Path) -> int:
    """Bytes that the files under `folder` take on the disk; files may vanish meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += Path(place, name).lstat().st_blocks * 512
    return total


def run(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    watched: Path | None = None,
) -> Run:
    """Run `command` to its end. Raises `CommandError`, with the end of what it said."""
    watch = _Watch(watched)
    marked: float | None = None
    said: list[str] = []
    start = time.perf_counter()
    try:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=None if environment is None else dict(environment),
        )
        if process.stdout is None:
            raise CommandError(f"no output to read from {command[0]}")
        for line in process.stdout:
            if line.rstrip() == MARK:
                marked = time.perf_counter() - start
            said.append(line)
        # It has ended, and its counters are still there, until it is waited for.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        seconds = time.perf_counter() - start
        calls = _calls(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
    finally:
        watch.close()
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    output = "".join(said)
    if process.returncode != 0:
        raise CommandError(f"{' '.join(command)}: {process.returncode}\n{output[-2000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return Run(seconds, marked, cpu, usage.ru_maxrss * 1024, output, calls, watch.most)


def _calls(pid: int) -> Calls | None:
    try:
        text = Path(f"/proc/{pid}/io").read_text(encoding="ascii")
    except OSError:
        return None
    counts = {name: int(count) for name, count in (line.split(":") for line in text.splitlines())}
    return Calls(counts["rchar"], counts["wchar"], counts["syscr"], counts["syscw"])


# In a process of its own: its peak would be taken for that of the next command.
_HOLD = """
import mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
memory[:: mmap.PAGESIZE] = bytes(len(memory) // mmap.PAGESIZE)
print(flush=True)
sys.stdin.read()
"""


@contextmanager
def memory_in_hand(nbytes: int) -> Iterator[None]:
    """Hold `nbytes` of touched memory within the block; afterwards it is free and at hand.

    A virtual machine gives free memory back to its host within seconds; getting it again took up
    to 2 s a gigabyte, by chance in the run of one contender or of another.
    """
    if sys.platform != "linux":
        yield
        return
    whole = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    command = [sys.executable, "-S", "-c", _HOLD, str(whole)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        if holder.stdout is None or not holder.stdout.readline():
            raise CommandError(f"{nbytes} bytes of memory are not to be had")
        yield


def warm(paths: Iterable[Path]) -> int:
    """Read the files among `paths`, so that the page cache holds what fits; bytes read."""
    buffer = bytearray(1 << 22)
    total = 0
    for path in sorted(paths):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    total += count
    return total
