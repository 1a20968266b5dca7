"""The start of every console command, before anything that takes long to import.

Importing the commands takes 0.1 s and more, in which Ctrl-C would end in a traceback. Nothing is
written so early, so the process may end at once.
"""

from __future__ import annotations

import os
import signal
from importlib import import_module
from types import FrameType


def end_at_once(signum: int, frame: FrameType | None) -> None:
    """The handler of Ctrl-C and SIGTERM until `app.run` takes over."""
    os.write(2, b"Interrupted. No output was written.\n")
    os._exit(130)


def _start(module: str) -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end_at_once)
    import_module(module).main()


def reshard() -> None:
    """The console command `reshard`."""
    _start("reshard.cli.app")


def ds2hf() -> None:
    """The console command `ds2hf`."""
    _start("reshard.cli.lightrft.ds2hf")


def fsdp2hf() -> None:
    """The console command `fsdp2hf`."""
    _start("reshard.cli.lightrft.fsdp2hf")


def hf2fsdp() -> None:
    """The console command `hf2fsdp`."""
    _start("reshard.cli.lightrft.hf2fsdp")


def test_model() -> None:
    """The console command `test_model`."""
    _start("reshard.cli.lightrft.test_model")
