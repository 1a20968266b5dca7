"""Rank files that real ranks saved, made once and kept until what makes them changes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]


class Ranks:
    """The saves of `tests.ranks.save`, by name."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __getitem__(self, name: str) -> Path:
        """The folder that a user would name."""
        return self._root / name / "checkpoint"

    def truth(self, name: str) -> Path:
        """A safetensors file: the full state dict, gathered from the live ranks."""
        return self._root / name / "truth.safetensors"

    def copy(self, name: str, folder: Path) -> Path:
        """A copy of a save under `folder`, for a test that damages it: the folder of its files."""
        target = folder / name
        shutil.copytree(self[name], target)
        inner = target / "run" / "global_step_3" / "actor"
        return inner if inner.is_dir() else target


@pytest.fixture(scope="session")
def ranks(pytestconfig: pytest.Config) -> Ranks:
    """Made by real torch processes, about 20 s, once."""
    assert pytestconfig.cache is not None
    cache = pytestconfig.cache.mkdir("rank-files")
    folder = cache / _key()
    if not folder.is_dir():
        for old in cache.iterdir():
            shutil.rmtree(old)
        making = cache / f"making-{os.getpid()}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT / "src")}
        done = subprocess.run(
            [sys.executable, "-m", "tests.ranks.save", str(making)],
            cwd=_ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        making.rename(folder)
    return Ranks(folder)


def _key() -> str:
    """Changes with the oracle's sources and with torch."""
    digest = hashlib.sha256(version("torch").encode())
    oracle = _HERE.parent / "fsdp" / "oracle"
    for source in (_HERE / "save.py", *(oracle / f"{n}.py" for n in ("models", "shardings"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
