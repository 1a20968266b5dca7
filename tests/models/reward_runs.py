"""Runs of LightRFT's reward models and critics, saved by the real DeepSpeed.

python -m tests.models.reward_runs FOLDER

FOLDER/<name>/checkpoint/    given to save_checkpoint: latest, global_step1/
              truth.pt       the wrapper's state dict at that moment
"""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")

import functools
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from tests.models import released
from tests.naming.lightrft_models import Critic, ScalarRewardModel, Wrapper
from tests.oracle import launch
from tests.oracle.worker import Rank

WIDTH = 32


@dataclass(frozen=True)
class Run:
    """One run: the base it starts from, the class of its backbone, and what stands beside it.

    `heads` are the arguments of a scalar reward model, `critic` is the name of a critic's head;
    with neither it is a generative reward model. `stage` is ZeRO's.
    """

    name: str
    base: str
    backbone: str
    stage: int
    heads: Mapping[str, Any] | None = None
    critic: str | None = None

    def build(self, folder: Path) -> nn.Module:
        """The wrapper with random weights; `folder` gets the base's files."""
        base = released.write(folder, self.base, released.values(self.base, seed=0))
        backbone = released.loaded(base, self.backbone)
        torch.manual_seed(5)
        if self.heads is not None:
            return ScalarRewardModel(backbone, -1, WIDTH, **self.heads)
        if self.critic is not None:
            return Critic(backbone, WIDTH, self.critic)
        return Wrapper(backbone)


_VL = "Qwen2_5_VLForConditionalGeneration"
_AL = "Qwen2AudioForConditionalGeneration"
RUNS = {
    run.name: run
    for run in (
        Run("grm", "qwen2_5_vl_tied", _VL, 3),
        Run("srm-vl", "qwen2_5_vl", "AutoModel", 2,
            {"types": ("preference", "alignment"), "pooling": "attn", "scaled": True}),
        Run("srm-al", "qwen2_audio", _AL, 3,
            {"types": ("preference",), "pooling": "last", "scaled": False}),
        Run("critic", "llama", "AutoModel", 2, critic="score"),
        Run("critic-vl", "qwen2_5_vl", _VL, 3, critic="value_head"),
    )
}  # fmt: skip


def main(folder: Path) -> None:
    jobs: list[launch.Job] = []
    for run in RUNS.values():
        with tempfile.TemporaryDirectory() as base:
            module = run.build(Path(base)).to(torch.bfloat16)
        (folder / run.name).mkdir(parents=True)
        torch.save(module.state_dict(), folder / run.name / "truth.pt")
        jobs.append((run.name, functools.partial(_save, run, module)))
    launch._run(jobs, 2, folder)


def _save(run: Run, module: nn.Module, rank: Rank, folder: Path) -> None:
    """What is saved before the first step is exactly what was built."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": run.stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    engine.save_checkpoint(str(folder / "checkpoint"), tag="global_step1")
    engine.destroy()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
