"""Ranks that are forked from this process, which has imported what they need once.

They meet at a file: no port is needed.
"""

from __future__ import annotations

import gc
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TIMEOUT_SECONDS = 300


def run_ranks(world: int, work: Callable[[int, Path], None]) -> list[int | None]:
    """Call `work(rank, meeting)` in `world` new processes; their exit codes, all 0 if all is well.

    `meeting` is a path for `init_process_group`. All are ended as soon as one of them fails, or
    after `TIMEOUT_SECONDS`.
    """
    # Frameworks collect garbage after each step: what was imported, millions of objects, is passed
    # over there, and its pages stay shared.
    gc.freeze()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as scratch:
        meeting = Path(scratch, "meeting")
        ranks = [context.Process(target=work, args=(rank, meeting)) for rank in range(world)]
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + TIMEOUT_SECONDS
        try:
            while any(rank.is_alive() for rank in ranks):
                if any(rank.exitcode for rank in ranks) or time.monotonic() > deadline:
                    break
                time.sleep(0.02)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
    return [rank.exitcode for rank in ranks]
