"""DeepSpeed checkpoints: those of the real DeepSpeed, and a large one laid out by hand."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from reshard.testing import ReaderConformance, Sample
from reshard.testing.truth import Tensors
from tests import zero3
from tests.conformance.arrays import to_torch
from tests.oracle.cache import Oracle


class _Reading(ReaderConformance):
    format = "deepspeed"

    def called(self, missing: Path) -> str:
        """Files have several spellings; errors say which rank's file it is."""
        found = re.fullmatch(r"(?:.*pp_rank_(\d+)_)?mp_rank_\d+_(\w+)\.pt", missing.name)
        if found is None:
            return super().called(missing)
        rank, kind = found.groups()
        return rf"the {kind} file of rank {rank}\b" if rank else f"all {kind} files"


class TestReadingALayoutByHand(_Reading):
    def make(self, folder: Path, tensors: Tensors) -> Path:
        state = {name: to_torch(array) for name, array in tensors.items()}
        zero3.save(folder, state, world=3)
        return folder


class TestReadingZero3(_Reading):
    recipe = "zero3-bf16-w3"

    @pytest.fixture
    def sample(self, oracle: Oracle, tmp_path: Path) -> Sample:
        saved = oracle[self.recipe].last
        path = shutil.copytree(saved.path, tmp_path / "checkpoint")
        return Sample(path, saved.expected(), saved.facts["tied"])


class TestReadingZero2(TestReadingZero3):
    recipe = "zero2-bf16-w2"


class TestReadingTheLegacyContainer(TestReadingZero3):
    recipe = "legacy-zero3"


class TestReadingUniversal(_Reading):
    unread = (
        *("exp_avg.pt", "exp_avg_sq.pt", "step.pt", "optimizer_state.pt"),
        # Buffers and frozen parameters: taken from the model file, here they are cast to float32.
        *(f"zero/{name}/fp32.pt" for name in ("count", "mask", "mean", "nothing", "frozen.*")),
        "zero/head.weight/fp32.pt",  # tied to embed.weight
    )

    @pytest.fixture
    def sample(self, oracle: Oracle, tmp_path: Path) -> Sample:
        case = oracle["universal-zero2"]
        path = shutil.copytree(case.universal, tmp_path / "checkpoint")
        return Sample(path, case.last.expected(), case.last.facts["tied"])
