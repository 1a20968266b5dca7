"""Conversions into a store that are killed: each in a fork of a process that used no store yet.

A process that did has threads of the client's, which a fork would lack.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from tests.resume.runs import small

ROOT = Path(__file__).parents[2]
#: What is counted: calls of the store that change it, or bytes that are put.
METHODS = {
    "request": ("reshard.storage.stores", "Bucket", ("put", "upload", "delete")),
    "put": ("reshard.transfer.remote", "RemoteFolder", ("put",)),
    "commit": ("reshard.transfer.remote", "RemoteFolder", ("_check_still_ours",)),
}


@contextmanager
def tiny() -> Iterator[None]:
    """Within it, pieces are small, files are sent in parts, and lines are written at once."""
    from reshard.transfer import notes, upload

    with small(), mock.patch.object(upload, "_SMALL", 3000), mock.patch.object(notes, "_STEP", 1):
        yield


class Killer:
    """Has conversions done elsewhere, and killed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            cwd=ROOT, text=True, env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        )  # fmt: skip

    def killed(self, after: int, source: Path, target: str, *, what: str = "put",
               **options: Any) -> bool:  # fmt: skip
        """Whether a conversion was killed, before call number `after` of what is counted."""
        environment = {n: v for n, v in os.environ.items() if n.startswith("AWS_")}
        asked = [after, str(source), target, what, options, environment]
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(asked, default=str) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        assert code in (0, -signal.SIGKILL)
        return code != 0

    def close(self) -> None:
        self._process.communicate()


def _convert(
    after: int, source: str, target: str, what: str, options: dict[str, Any],
    environment: dict[str, str],
) -> None:  # fmt: skip
    """One conversion, in a process of its own."""
    import importlib
    import threading

    import reshard

    os.environ.update(environment)
    module, owner, names = METHODS[what]
    cls = getattr(importlib.import_module(module), owner)
    calls, counting = 0, threading.Lock()

    def counted(original: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal calls
            with counting:
                calls += 1
                if calls > after:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **more)

        return call

    for name in names:
        setattr(cls, name, counted(getattr(cls, name)))
    if what == "put":  # each file is there before the next is begun: what is left is the same
        from reshard.transfer.sending import Sending

        seal = Sending.seal

        def settled(self: Sending, number: int) -> None:
            seal(self, number)
            self.settle()

        Sending.seal = settled  # type: ignore[method-assign]
    with tiny():
        reshard.convert(source, target, **options)


def main() -> None:
    import reshard.conversion.convert
    import reshard.formats.huggingface
    import reshard.transfer.remote  # noqa: F401 (once, and not in every fork)

    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _convert(*asked)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
