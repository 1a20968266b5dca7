"""Runs commands in forks of one process that has imported them, and measures each.

A process of its own takes 0.3 s to start, a fork 0.02: there are thousands of trials. A fork's
peak counts what the process held when it forked, which is what an import costs.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType

from tests.budget import MEMORY, MIB, SECONDS

ROOT = Path(__file__).parents[2]
# A command that takes no processor time and does not end is ended.
_HANGS = 60
# Bytes of address space, of a file: a bomb ends the fork, and not the machine.
_MAX_MAPPED = 2 << 30
_MAX_WRITTEN = 64 << 20
#: Bytes that a command may print beside its report.
MAX_SAID = 4000


@dataclass(frozen=True)
class Ended:
    """How a command ended. `code` is negative where a signal ended it; `asked` are the paths whose
    status it asked for, where they were recorded."""

    code: int
    seconds: float
    peak: int
    said: str
    asked: tuple[str, ...] = ()

    def check(self) -> None:
        """Within the budget, in words."""
        what = f"exit code {self.code}: {self.said[-1500:]}"
        assert self.code in (0, 1, 2), what
        assert "Traceback" not in self.said, what
        assert self.seconds < SECONDS, f"{self.seconds:.1f} s, {what}"
        assert self.peak < MEMORY, f"{self.peak // MIB} MiB, {what}"
        if self.code:
            assert len(self.said) < MAX_SAID, what


class Bench:
    """The process; it ends with the block."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT), *sys.path)),
            "OPENBLAS_NUM_THREADS": "1",
            "COLUMNS": "100",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.bench"],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str | Path, recording: bool = False) -> Ended:
        """How `reshard` ends with these arguments."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([list(map(str, arguments)), recording]) + "\n")
        self._process.stdin.flush()
        found = json.loads(self._process.stdout.readline())
        return Ended(**{**found, "asked": tuple(found["asked"])})

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=_HANGS)


def _peak() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _recorded() -> set[str]:
    """From now on, every path of which a status or the content is asked for."""
    from reshard.storage import local, places, source

    asked: set[str] = set()
    status, opened = places.Local.status, source.open_regular

    def recording(self: places.Local, *, follow: bool = True) -> os.stat_result | None:
        asked.add(os.fspath(self.path))
        return status(self, follow=follow)

    def opening(path: str) -> tuple[int, os.stat_result]:
        asked.add(path)
        return opened(path)

    setattr(places.Local, "status", recording)  # noqa: B010 (mypy takes a method for read-only)
    setattr(local, "open_regular", opening)  # noqa: B010 (the name that it has imported)
    return asked


def _in_fork(arguments: Sequence[str], *, recording: bool, said: int, told: int) -> None:
    """Run the command, and write what it cost."""
    from reshard.cli.app import main

    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MAPPED, _MAX_MAPPED))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_WRITTEN, _MAX_WRITTEN))
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
    signal.alarm(_HANGS)
    for stream in (1, 2):
        os.dup2(said, stream)
    sys.argv = ["reshard", *arguments]
    asked = _recorded() if recording else set()
    before = resource.getrusage(resource.RUSAGE_SELF)
    code = 70
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # the child must end here, and say why
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    os.write(told, json.dumps([code, seconds, _peak(), sorted(asked)]).encode())
    os._exit(0)


def _fork(arguments: Sequence[str], *, recording: bool) -> Ended:
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as told:
        pid = os.fork()
        if pid == 0:
            try:
                _in_fork(arguments, recording=recording, said=said.fileno(), told=told.fileno())
            finally:
                os._exit(1)
        _, status, used = os.wait4(pid, 0)
        text = os.pread(said.fileno(), 1 << 20, 0).decode("utf-8", "replace")
        cost = os.pread(told.fileno(), 1 << 24, 0)
    if not cost:
        seconds = used.ru_utime + used.ru_stime
        return Ended(os.waitstatus_to_exitcode(status) or 70, seconds, used.ru_maxrss * 1024, text)
    code, seconds, peak, asked = json.loads(cost)
    return Ended(code, seconds, peak, text, tuple(asked))


def main() -> None:
    """Serve commands, a line each."""
    for module in ("cli.app", "cli.commands", "cli.diff", "cli.doctor", "conversion.convert",
                   "comparison.compare", "checkpoint", "inspection"):  # fmt: skip
        import_module(f"reshard.{module}")
    for line in sys.stdin:
        arguments, recording = json.loads(line)
        print(json.dumps(asdict(_fork(arguments, recording=recording))), flush=True)


if __name__ == "__main__":
    main()
