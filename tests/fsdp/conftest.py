"""The oracle's checkpoints, made once and kept until what makes them changes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import child
from tests.fsdp.oracle.cases import BY_NAME, Case
from tests.oracle.cache import digest_of, kept

_SOURCES = Path(__file__).parent / "oracle"


@dataclass(frozen=True, slots=True)
class OracleCase:
    """A case as the oracle made it."""

    case: Case
    root: Path

    @property
    def checkpoint(self) -> Path:
        """The folder that a user would name."""
        return self.root / (self.case.onto or self.case.name) / "checkpoint" / self.case.where

    @property
    def truth(self) -> Path:
        """A safetensors file: the full state dict, gathered from the running ranks."""
        return self.root / self.case.name / "truth.safetensors"


class Oracle:
    """All cases, by name."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __getitem__(self, name: str) -> OracleCase:
        return OracleCase(BY_NAME[name], self._root)

    def copy(self, name: str, folder: Path) -> Path:
        """A copy of the case's checkpoint under `folder`, for a test that damages it."""
        target = folder / name
        shutil.copytree(self[name].checkpoint, target)
        return target


@pytest.fixture(scope="session")
def oracle(pytestconfig: pytest.Config) -> Oracle:
    """The cases of `tests.fsdp.oracle`; made by real torch processes, about 50 s, once."""
    assert pytestconfig.cache is not None
    key = digest_of(_SOURCES.glob("*.py"), ("torch", "accelerate", "safetensors"))
    cache = pytestconfig.cache.mkdir("fsdp-oracle")
    return Oracle(kept(cache, key, lambda folder: run_oracle("launch", str(folder))))


def run_oracle(module: str, *arguments: str, device: str = "cpu") -> None:
    """Run a module of the oracle (`launch`, `load`) whose ranks train on `device`."""
    child.run(f"tests.fsdp.oracle.{module}", *arguments, ORACLE_DEVICE=device)


@pytest.fixture
def folder(oracle: Oracle, tmp_path: Path) -> Path:
    """A good checkpoint of two ranks, to be spoilt."""
    return oracle.copy("fsdp2-w2", tmp_path)
