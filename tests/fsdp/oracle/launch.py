"""Makes every case: `python -m tests.fsdp.oracle.launch FOLDER [CASE ...]`.

Those that need a GPU are made only where they are named, with ORACLE_DEVICE=cuda.
"""

from __future__ import annotations

import functools
import gc
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed

from tests.fsdp.oracle import layouts, models, ranks, shardings, writers
from tests.fsdp.oracle.cases import BY_NAME, CASES, Case


def main(folder: Path, names: list[str]) -> None:
    cases = [BY_NAME[name] for name in names] or list(CASES)
    folder.mkdir(parents=True, exist_ok=True)
    # The largest world first: "stale" is saved over a folder that more ranks wrote.
    for world in sorted({case.world for case in cases}, reverse=True):
        mine = [case for case in cases if case.world == world]
        ranks.run(world, functools.partial(_make_all, mine, folder))


def _make_all(cases: list[Case], folder: Path) -> None:
    for case in cases:
        start = time.perf_counter()
        try:
            _make(case, folder)
        except Exception as error:
            raise RuntimeError(f"case {case.name}") from error
        if distributed.get_rank() == 0:
            print(f"{time.perf_counter() - start:6.2f} s  {case.name}", flush=True)


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
            {name: value.cpu().contiguous() for name, value in truth.items()},
            folder / case.name / "truth.safetensors",
        )
    gc.collect()
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
