"""A process that has imported every framework and forks ranks for the jobs that it is sent.

    python -m tests.state.launch        a line of JSON in (jobs of one world size), a line out

Importing takes seconds and is done once. The answer is `null`, or what went wrong. Each line has
ranks of its own: on a CPU, bfloat16 sums depend on what a process did before.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tests.forking import run_ranks
from tests.state import engines
from tests.state.jobs import Job

PRELOADED = (
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "tests.oracle.worker",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "transformers.models.llama",
    "transformers.models.qwen2",
    "accelerate.utils.fsdp_utils",
    "peft",
)


def main() -> None:
    # What libraries print goes to stderr; the answers have stdout for themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()
    for line in sys.stdin:
        failed = run(msgspec.json.decode(line, type=list[Job]))
        answers.write(msgspec.json.encode(failed).decode() + "\n")
        answers.flush()


def run(jobs: Sequence[Job]) -> str | None:
    """Do jobs of one world size, one after the other, in new ranks; what went wrong, if anything.

    All ranks are ended as soon as one of them fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        errors = Path(scratch, "errors")

        def work(rank: int, meeting: Path) -> None:
            _rank(jobs, rank, str(meeting), str(errors))

        if any(run_ranks(jobs[0].world, work)):
            return errors.read_text("utf-8") if errors.exists() else "a rank ended without a word"
    return None


def _rank(jobs: Sequence[Job], rank: int, meeting: str, errors: str) -> None:
    engines.join(rank, jobs[0].world, meeting)
    for job in jobs:
        start = time.perf_counter()
        try:
            engines.work(job)
        except Exception:
            with open(errors, "a", encoding="utf-8") as file:
                file.write(f"{job}, rank {rank}:\n{traceback.format_exc()}\n")
            with contextlib.suppress(OSError):
                sys.stderr.flush()
            os._exit(1)
        if rank == 0:
            print(f"{time.perf_counter() - start:6.2f} s  {job.out}", file=sys.stderr, flush=True)
    os._exit(0)  # without the minutes that some libraries take to say goodbye


if __name__ == "__main__":
    main()
