"""Running a module of these tests in a process of its own, for what forks ranks; and waiting."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.oracles import ROOT, lacking

__all__ = ["ROOT", "run", "until"]


def run(module: str, *arguments: str, **more: str) -> None:
    """Run `python -m module arguments` on one thread, with `more` in its environment.

    If it fails, the test fails with the end of what it said; where a package that it imports is not
    installed, the test is skipped.
    """
    missing = lacking(ROOT.joinpath(*module.split(".")).with_suffix(".py"))
    if missing is not None:
        pytest.skip(f"{missing} is not installed")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        **more,
    }
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]


def until(
    condition: Callable[[], object],
    process: subprocess.Popen[str] | None = None,
    seconds: float = 30,
) -> None:
    """Wait for a condition, so many seconds at most; the process must not end meanwhile."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)
