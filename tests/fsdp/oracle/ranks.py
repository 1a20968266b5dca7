"""Run a function in several ranks, forked from this process, which has imported torch once."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

# fully_shard imports it when it is first called: 1.3 s here once, instead of in every rank.
import torch
import torch._dynamo
from torch import distributed

from tests.forking import run_ranks

# Where the ranks train: cpu, or cuda with one rank a GPU.
DEVICE = os.environ.get("ORACLE_DEVICE", "cpu")
_BACKEND = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}[DEVICE]


def run(world: int, work: Callable[[], None]) -> None:
    """Call `work` in `world` ranks of one group; exits where one of them fails."""
    codes = run_ranks(world, lambda rank, meeting: _rank(work, rank, world, meeting))
    if any(codes):
        sys.exit(f"world {world}: exit codes {codes}")


def _rank(work: Callable[[], None], rank: int, world: int, meeting: Path) -> None:
    warnings.simplefilter("ignore")
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        _BACKEND, init_method=f"file://{meeting}", rank=rank, world_size=world
    )
    try:
        work()
    except Exception:  # the process ends here: say which rank it was
        sys.exit(f"rank {rank}:\n{traceback.format_exc()}")
    distributed.destroy_process_group()
