"""What a command costs, in a process of its own: the budget of every refusal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1 << 20
#: Bytes and seconds of processor time that a command may take to refuse a file.
MEMORY, SECONDS = 256 * MIB, 5.0

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="no /proc to measure by"
)

# VmHWM of /proc, unlike ru_maxrss, starts anew with the program and does not count what the test
# held when it forked.
_PEAK = """
import sys, time
from pathlib import Path

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

start = 0
"""
_COMMAND = """
from reshard.cli.app import main
try:
    main()
except SystemExit:
    pass
"""
_ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def peak(code: str, *arguments: str | Path, seconds: float = 120) -> int:
    """The most bytes that `code` held at once, in a process of its own that ends within `seconds`.

    `code` may set `start = peak()`, to measure only what comes on top of that.
    """
    return int(_run(f"{_PEAK}{code}\nprint(peak() - start)\n", *arguments, seconds=seconds).stdout)


def run(*arguments: str | Path, seconds: float = 120) -> tuple[float, int, str]:
    """A command's seconds, peak bytes, and what it printed; it ends within `seconds`."""
    code = f"{_PEAK}{_COMMAND}\nprint(time.process_time(), peak())\n"
    done = _run(code, *arguments, seconds=seconds)
    *printed, cost = done.stdout.splitlines()
    took, peak = cost.split()
    return float(took), int(peak), "\n".join([*printed, done.stderr])


def _run(
    code: str, *arguments: str | Path, seconds: float = 120
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, env=_ENVIRONMENT, check=True, capture_output=True, text=True, timeout=seconds
    )


def check_refused(*arguments: str | Path) -> str:
    """What a command says, which stays within the budget and has no traceback."""
    seconds, peak, said = run(*arguments)
    assert seconds < SECONDS, f"{seconds} s: {said[:1000]}"
    assert peak < MEMORY, f"{peak // MIB} MiB: {said[:1000]}"
    assert "Traceback" not in said, said
    assert "error: " in said
    assert len(said) < 2000
    return said
