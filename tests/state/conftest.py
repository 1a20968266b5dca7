"""The ranks of the state tests: one process for the session, which forks them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from tests.deepspeed.conftest import pipeline_runs
from tests.state.jobs import Job

__all__ = ["Ranks", "pipeline_runs", "ranks"]

_ROOT = Path(__file__).parents[2]


class Ranks:
    """Real frameworks on the CPU, at whatever world size a job asks for."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.state.launch"],
            cwd=_ROOT,
            env=os.environ
            | {
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONWARNINGS": "ignore",
                "TORCHDYNAMO_DISABLE": "1",  # Muon's steps would be compiled for minutes
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w", encoding="utf-8"),
            text=True,
        )

    def run(self, *jobs: Job) -> None:
        """Do jobs, those of each world size together; fails with what their ranks said."""
        for world in sorted({job.world for job in jobs}):
            self._run([job for job in jobs if job.world == world])

    def _run(self, jobs: Sequence[Job]) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(jobs).decode() + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self._log.read_text("utf-8")[-4000:]
        failed = msgspec.json.decode(answer, type=str | None)
        assert failed is None, failed

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Real frameworks on the CPU."""
    for package in ("deepspeed", "transformers", "accelerate", "peft"):
        pytest.importorskip(package)
    found = Ranks(tmp_path_factory.mktemp("ranks") / "log")
    try:
        yield found
    finally:
        found.end()
