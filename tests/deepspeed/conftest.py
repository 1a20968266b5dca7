"""Runs with tensor parallelism and with experts, made once and kept until their makers change."""

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
from safetensors.torch import load_file

from tests.oracle.cache import Array, to_numpy

_ROOT = Path(__file__).parents[2]
_SOURCES = (
    "tests/deepspeed/parallel_oracle.py",
    "tests/oracle/launch.py",
    "tests/oracle/models.py",
    "tests/oracle/worker.py",
)


@dataclass(frozen=True)
class ParallelRun:
    """A run of `parallel_oracle`, and its truth."""

    folder: Path

    @property
    def root(self) -> Path:
        """The folder given to `save_checkpoint`."""
        return self.folder / "checkpoint"

    @property
    def base(self) -> Path:
        """The untrained model (those that transformers loads)."""
        return self.folder / "base"

    def module(self) -> dict[str, Array]:
        """What the module computes with, by every name of its state dict."""
        return _load(self.folder / "truth_module.safetensors")

    def expected(self) -> dict[str, Array]:
        """By every name the best value: the master, else what the module has."""
        return self.module() | _load(self.folder / "truth_fp32.safetensors")

    def copy(self, folder: Path) -> Path:
        """A copy of the checkpoint, for a test that changes it: its tag folder."""
        target = folder / "run"
        shutil.copytree(self.root, target)
        (tag,) = (path for path in target.iterdir() if path.is_dir())
        return tag


class ParallelRuns:
    """All runs, by the recipe's name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> ParallelRun:
        return ParallelRun(self._folder / name)


@pytest.fixture(scope="session")
def parallel_runs(pytestconfig: pytest.Config) -> ParallelRuns:
    """The runs of `parallel_oracle`; made by the real DeepSpeed, about 40 s, once."""
    assert pytestconfig.cache is not None
    cache = pytestconfig.cache.mkdir("parallel-oracle")
    folder = cache / _key()
    if not folder.is_dir():
        for old in cache.iterdir():
            shutil.rmtree(old)
        making = cache / f"making-{os.getpid()}"
        done = subprocess.run(
            [sys.executable, "-m", "tests.deepspeed.parallel_oracle", str(making)],
            cwd=_ROOT,
            env=os.environ
            | {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        making.rename(folder)
    return ParallelRuns(folder)


def _key() -> str:
    """Changes with the sources and with the packages that write."""
    digest = hashlib.sha256()
    for source in _SOURCES:
        digest.update((_ROOT / source).read_bytes())
    for package in ("torch", "deepspeed", "transformers"):
        digest.update(f"{package}=={version(package)}".encode())
    return digest.hexdigest()[:16]


def _load(path: Path) -> dict[str, Array]:
    return {name: to_numpy(tensor) for name, tensor in load_file(path).items()}
