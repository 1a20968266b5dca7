"""The fuzz targets: what they once found stays found, and `make test-slow` looks for more."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.run import CASES, mutate
from fuzz.targets import TARGETS

ROOT = Path(__file__).parents[1]
KEPT = [path for path in sorted(CASES.rglob("*")) if path.is_file()]


def _target(path: Path) -> str:
    """The target of a case: its folder, in which blanks are spelt `_`."""
    name = path.parent.name
    return name if name in TARGETS else name.replace("_", " ")


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_once_failed_is_read_or_refused(path: Path, tmp_path: Path) -> None:
    TARGETS[_target(path)].read(path.read_bytes(), tmp_path)


@pytest.mark.heavy
@pytest.mark.parametrize("name", TARGETS)
def test_seeds_and_a_few_mutants(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    seeds = target.seeds()
    rng = random.Random(0)
    mutants = (mutate(rng, seeds, target.atoms) for _ in range(target.mutants))
    for data in (*seeds, *mutants):
        target.read(data, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_fuzzing_finds_nothing(name: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "fuzz.run", name, "--seconds", "60"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
