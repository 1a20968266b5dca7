"""Run a function in several ranks, forked from this process, which has imported torch once.

Ranks meet at a file: no port is needed.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

# fully_shard imports it when it is first called: 1.3 s here once, instead of in every rank.
import torch
import torch._dynamo
from torch import distributed

TIMEOUT_SECONDS = 240
# Where the ranks train: cpu, or cuda with one rank a GPU.
DEVICE = os.environ.get("ORACLE_DEVICE", "cpu")
_BACKEND = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}[DEVICE]


def run(world: int, work: Callable[[], None]) -> None:
    """Call `work` in `world` ranks of one group; exits where one of them fails."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder, "meeting")
        ranks = [
            context.Process(target=_rank, args=(work, rank, world, meeting))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + TIMEOUT_SECONDS
        try:
            while any(process.is_alive() for process in ranks):
                if any(process.exitcode for process in ranks) or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        finally:
            for process in ranks:
                process.kill()
                process.join()
    if any(process.exitcode != 0 for process in ranks):
        sys.exit(f"world {world}: exit codes {[process.exitcode for process in ranks]}")


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
