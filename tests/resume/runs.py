"""Conversions that are killed after so many writes, and what they leave."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial as partial_
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from safetensors.numpy import save_file

import reshard
from reshard.core import digests
from reshard.transfer import journal, leftovers, making
from reshard.transfer.commit import OutputFolder

# Small enough that the small models of these tests have many pieces, of several blocks.
SMALL = [(digests, "LEAF_NBYTES", 2048), (making, "_BLOCK", 1024), (journal, "_STEP", 1)]


def model(at: Path) -> Path:
    """A model folder of tensors with several pieces each, and a trained one of other values."""
    random = np.random.default_rng(0)
    for name, factor in (("base", 1), ("trained", 2)):
        folder = at / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
        (folder / "notes").mkdir()
        (folder / "notes" / "long.txt").write_text("x" * 5000, encoding="utf-8")
        tensors = {
            f"layers.{i}.weight": (random.standard_normal((30, 50)) * factor).astype(np.float32)
            for i in range(6)
        }
        tensors["bad"] = np.array([1.0, np.nan, np.inf], np.float32)
        tensors["none"] = np.zeros((0, 3), np.float32)
        save_file(tensors, folder / "model.safetensors")
    return at


def converter(source: Path, **options: Any) -> Callable[..., reshard.Report]:
    """Converts `source` in one thread; takes the output and further options."""
    return partial_(reshard.convert, source, threads=1, **options)


@contextmanager
def small() -> Iterator[None]:
    """Within it, pieces and blocks are small."""
    with ExitStack() as patches:
        for owner, name, value in SMALL:
            patches.enter_context(mock.patch.object(owner, name, value))
        yield


def killed(work: Callable[[], object], after: int, method: str = "put") -> bool:
    """Whether a fork that does `work` was killed, before call number `after` of that method."""
    pid = os.fork()
    if pid == 0:
        calls = 0
        original = getattr(OutputFolder, method)

        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(OutputFolder, method, call)
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return os.WIFSIGNALED(status)


def beside(target: Path) -> list[str]:
    """What lies beside an output."""
    return sorted(path.name for path in target.parent.iterdir() if path.name != target.name)


def partial(target: Path) -> Path:
    """The folder of the run that was killed."""
    (own,) = target.parent.glob(f".{target.name}.partial-*")
    return own


def facts(report: reshard.Report) -> dict[str, object]:
    """What of a report must not depend on how often the run was interrupted."""
    found = report.to_json()
    for name in ("bytes_read", "bytes_reused", "seconds", "findings", "target", "replaced",
                 "requests"):  # fmt: skip
        del found[name]
    about = {"resumed", "partial-output", "partial-output-kept", "not-resumed"}
    told = [str(f) for f in report.findings if f.code not in about]
    found["findings"] = [message.replace(report.target, "OUT") for message in told]
    return found


def codes(report: reshard.Report) -> list[str]:
    return [f.code for f in report.findings]


def journal_of(target: Path) -> Path:
    return partial(target) / leftovers.JOURNAL
