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

_CHILD = """
import sys, time
from pathlib import Path
from reshard.cli.app import main
try:
    main()
except SystemExit:
    pass
status = Path("/proc/self/status").read_text()
print(time.process_time(), int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


def run(*arguments: str | Path) -> tuple[float, int, str]:
    """A command's seconds, peak bytes, and what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _CHILD, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, timeout=120
    )
    *printed, cost = done.stdout.splitlines()
    seconds, peak = cost.split()
    return float(seconds), int(peak), "\n".join([*printed, done.stderr])


def check_refused(*arguments: str | Path) -> str:
    """What a command says, which stays within the budget and has no traceback."""
    seconds, peak, said = run(*arguments)
    assert seconds < SECONDS, f"{seconds} s: {said[:1000]}"
    assert peak < MEMORY, f"{peak // MIB} MiB: {said[:1000]}"
    assert "Traceback" not in said, said
    assert "error: " in said
    assert len(said) < 2000
    return said
