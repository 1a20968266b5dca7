"""Run the user's shell command after each conversion, with the output's path."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

# Seconds that a command has to exit when the watch ends.
_GRACE = 10.0


def run(command: str, *, output: Path, step: str, source: Path) -> int:
    """Run a command and return its exit code; of one that a signal ended, 128 and its number.

    If this process is interrupted meanwhile, the command is ended too.
    """
    environment = {
        **os.environ,
        "RESHARD_OUTPUT": os.fspath(output),
        "RESHARD_STEP": step,
        "RESHARD_SOURCE": os.fspath(source),
    }
    words = ["/bin/sh", "-c", f'{command} "$@"', "sh", os.fspath(output)]
    with subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL) as process:
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    return code if code >= 0 else 128 - code
