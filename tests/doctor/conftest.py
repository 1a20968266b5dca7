"""Pairs of base and healthy model, made once; and looking at a folder and mending it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import reshard
from tests.doctor import models
from tests.doctor.models import Pair

Pairs = Callable[[str], Pair]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """The pair of a model by name; tests copy the healthy folder before they spoil it."""
    folder = tmp_path_factory.mktemp("pairs")
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            made[name] = models.make(folder, name)
        return made[name]

    return get


def names(diagnosis: reshard.Diagnosis) -> list[str]:
    """The names of what was found."""
    return [finding.code for finding in diagnosis.findings]


def evidence(diagnosis: reshard.Diagnosis, name: str) -> str:
    """What tells that something is wrong with a folder."""
    (finding,) = [finding for finding in diagnosis.findings if finding.code == name]
    return finding.message


def repaired(ill: Path, base: Path | None, out: Path, *expected: str) -> reshard.Diagnosis:
    """Repair a folder in which exactly the expected codes must be found; nothing must remain."""
    before = {path: path.stat() for path in ill.rglob("*")}
    diagnosis = reshard.doctor(ill, base=base, repair=out)
    assert names(diagnosis) == list(expected)
    assert diagnosis.repaired == str(out)
    assert diagnosis.remaining == ()
    assert reshard.doctor(out, base=base).findings == ()
    assert reshard.verify(out).num_tensors > 0
    after = {path: path.stat() for path in ill.rglob("*")}
    unread = ("st_mtime_ns", "st_size", "st_ino", "st_nlink")
    assert before.keys() == after.keys()
    for path, status in before.items():
        assert all(getattr(status, field) == getattr(after[path], field) for field in unread)
    return diagnosis


def refused(ill: Path, base: Path | None, out: Path, *expected: str) -> reshard.Diagnosis:
    """Ask for a repair that must not be made: nothing may be written."""
    around = set(out.parent.iterdir())
    diagnosis = reshard.doctor(ill, base=base, repair=out)
    assert names(diagnosis) == list(expected)
    assert diagnosis.repaired is None
    assert diagnosis.errors
    assert set(out.parent.iterdir()) == around
    return diagnosis
