"""Makes every case: `python -m tests.fsdp.oracle.launch FOLDER [CASE ...]`.

torch is imported once, here; the ranks of each world size are forked from this process and make
all cases of that size in one process group. Ranks meet at a file: no port is needed.
"""

from __future__ import annotations

import gc
import multiprocessing
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed

from tests.fsdp.oracle import layouts, models, shardings, writers
from tests.fsdp.oracle.cases import BY_NAME, CASES, Case

TIMEOUT_SECONDS = 240


def main(folder: Path, names: list[str]) -> None:
    cases = [BY_NAME[name] for name in names] or list(CASES)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as rendezvous:
        # The largest world first: "stale" is saved over a folder that more ranks wrote.
        for world in sorted({case.world for case in cases}, reverse=True):
            mine = [case for case in cases if case.world == world]
            _run(mine, world, folder, Path(rendezvous, str(world)))


def _run(cases: list[Case], world: int, folder: Path, rendezvous: Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(cases, rank, world, folder, rendezvous))
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


def _rank(cases: list[Case], rank: int, world: int, folder: Path, rendezvous: Path) -> None:
    warnings.simplefilter("ignore")
    distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world
    )
    for case in cases:
        start = time.perf_counter()
        try:
            _make(case, folder)
        except Exception:  # the process ends here: say which case it was
            sys.exit(f"{case.name}, rank {rank}:\n{traceback.format_exc()}")
        if rank == 0:
            print(f"{time.perf_counter() - start:6.2f} s  {case.name}", flush=True)
    distributed.destroy_process_group()


def _make(case: Case, folder: Path) -> None:
    torch.manual_seed(7)
    checkpoint = folder / (case.onto or case.name) / "checkpoint"
    if case.model == "dtypes":
        state, truth = shardings.every_dtype(case.world)
        writers.save(state, checkpoint, case.writer)
    else:
        model = shardings.build(case)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if case.model != "odd":
            rank = distributed.get_rank()
            # The two ranks of a tensor-parallel group work on the same data.
            models.train(model, optimizer, rank // 2 if case.sharding == "fsdp-tp" else rank)
        layouts.save(layouts.Run(case, model, optimizer, checkpoint))
        truth = shardings.gather(model)
    if distributed.get_rank() == 0:
        (folder / case.name).mkdir(exist_ok=True)
        save_file(
            {name: value.contiguous() for name, value in truth.items()},
            folder / case.name / "truth.safetensors",
        )
    gc.collect()
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
