"""Runs with tensor parallelism and with experts, made once and kept until their makers change."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

import reshard
from tests import child
from tests.oracle.cache import Array, digest_of, kept, to_numpy

# What decides what is made, besides the packages.
_SOURCES = (
    "tests/deepspeed/making.py",
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

    def moments(self) -> dict[str, Array]:
        """`exp_avg.NAME` and `exp_avg_sq.NAME`, as the running optimizers held them."""
        return _load(self.folder / "truth_moments.safetensors")

    def check_moments(self) -> None:
        """The moments that are read are these, bit for bit."""
        state = reshard.open(self.root).optimizer
        assert state is not None
        truth = self.moments()
        held = {f"{kind}.{n}": t for kind, table in state.moments.items() for n, t in table.items()}
        assert held.keys() == truth.keys()
        assert truth
        for name, value in truth.items():
            found = held[name].numpy()
            assert found.shape == value.shape, name
            assert found.tobytes() == value.tobytes(), name

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
    sources = (child.ROOT / source for source in _SOURCES)
    key = digest_of(sources, ("torch", "deepspeed", "transformers"))
    cache = pytestconfig.cache.mkdir("parallel-oracle")
    return ParallelRuns(
        kept(cache, key, lambda folder: child.run("tests.deepspeed.parallel_oracle", str(folder)))
    )


@pytest.fixture(scope="session")
def pipeline_runs(pytestconfig: pytest.Config) -> Path:
    """The runs of `pipeline_oracle`; made by the real DeepSpeed, about 10 s, once."""
    assert pytestconfig.cache is not None
    sources = (*_SOURCES, "tests/deepspeed/pipeline_oracle.py")
    key = digest_of(
        (child.ROOT / source for source in sources), ("torch", "deepspeed", "transformers")
    )
    cache = pytestconfig.cache.mkdir("pipeline-oracle")
    return kept(
        cache, key, lambda folder: child.run("tests.deepspeed.pipeline_oracle", str(folder))
    )


def _load(path: Path) -> dict[str, Array]:
    return {name: to_numpy(tensor) for name, tensor in load_file(path).items()}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"
