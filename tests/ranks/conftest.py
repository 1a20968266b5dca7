"""Rank files that real ranks saved, made once and kept until what makes them changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import child
from tests.oracle.cache import digest_of, kept

# What decides what is made, besides torch.
_SOURCES = (
    "tests/ranks/save.py",
    "tests/fsdp/oracle/models.py",
    "tests/fsdp/oracle/shardings.py",
)


class Ranks:
    """The saves of `tests.ranks.save`, by name."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __getitem__(self, name: str) -> Path:
        """The folder that a user would name."""
        return self._root / name / "checkpoint"

    def truth(self, name: str) -> Path:
        """A safetensors file: the full state dict, gathered from the running ranks."""
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
    key = digest_of((child.ROOT / source for source in _SOURCES), ("torch",))
    cache = pytestconfig.cache.mkdir("rank-files")
    return Ranks(kept(cache, key, lambda folder: child.run("tests.ranks.save", str(folder))))
