"""The oracle's checkpoints, made once and kept until what makes them changes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.fsdp.oracle.cases import BY_NAME, Case

_SOURCES = Path(__file__).parent / "oracle"
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Made:
    """A case as the oracle made it."""

    case: Case
    root: Path

    @property
    def checkpoint(self) -> Path:
        """The folder that a user would name."""
        return self.root / (self.case.onto or self.case.name) / "checkpoint" / self.case.where

    @property
    def truth(self) -> Path:
        """A safetensors file: the full state dict, gathered from the live ranks."""
        return self.root / self.case.name / "truth.safetensors"


class Oracle:
    """All cases, by name."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __getitem__(self, name: str) -> Made:
        return Made(BY_NAME[name], self._root)

    def copy(self, name: str, folder: Path) -> Path:
        """A copy of the case's checkpoint under `folder`, for a test that damages it."""
        target = folder / name
        shutil.copytree(self[name].checkpoint, target)
        return target


@pytest.fixture(scope="session")
def oracle(pytestconfig: pytest.Config) -> Oracle:
    """The cases of `tests.fsdp.oracle`; made by real torch processes, about 50 s, once."""
    assert pytestconfig.cache is not None
    cache = pytestconfig.cache.mkdir("fsdp-oracle")
    folder = cache / _key()
    if not folder.is_dir():
        for old in cache.iterdir():
            shutil.rmtree(old)
        making = cache / f"making-{os.getpid()}"
        run_oracle("launch", str(making))
        making.rename(folder)
    return Oracle(folder)


def run_oracle(module: str, *arguments: str, device: str = "cpu") -> None:
    """Run a module of the oracle (`launch`, `load`) whose ranks train on `device`."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.fsdp.oracle.{module}", *arguments],
        cwd=_ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ORACLE_DEVICE": device,
            "PYTHONPATH": str(_ROOT / "src"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def _key() -> str:
    """Changes with the oracle's sources and with the packages that write."""
    digest = hashlib.sha256()
    for source in sorted(_SOURCES.glob("*.py")):
        digest.update(source.read_bytes())
    for package in ("torch", "accelerate", "safetensors"):
        digest.update(f"{package}=={version(package)}".encode())
    return digest.hexdigest()[:16]
