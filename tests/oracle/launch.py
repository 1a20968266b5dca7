"""Makes every recipe: `python -m tests.oracle.launch FOLDER [RECIPE ...]`.

torch and DeepSpeed are imported once, here; the ranks are forked from this process, which saves
each of them the seconds of importing. Ranks meet at a file: no port is needed.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.oracle import worker
from tests.oracle.recipes import BY_NAME, RECIPES, Recipe

TIMEOUT_SECONDS = 300
# Imported by torch, DeepSpeed and the recipes on first use; here once, before the ranks fork.
PRELOADED = ("torch._dynamo", "torch._inductor", "torch.export", "transformers.models.llama")


def main(folder: Path, names: list[str]) -> None:
    for module in PRELOADED:
        importlib.import_module(module)
    recipes = [BY_NAME[name] for name in names] or list(RECIPES)
    with tempfile.TemporaryDirectory() as rendezvous:
        for world in sorted({recipe.world for recipe in recipes}):
            mine = [recipe for recipe in recipes if recipe.world == world]
            _run(mine, world, folder, Path(rendezvous, str(world)))


def _run(recipes: list[Recipe], world: int, folder: Path, rendezvous: Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(recipes, worker.Rank(i, world), folder, rendezvous))
        for i in range(world)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while any(rank.is_alive() for rank in ranks):
            if any(rank.exitcode for rank in ranks) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    if any(rank.exitcode != 0 for rank in ranks):
        sys.exit(f"world {world}: exit codes {[rank.exitcode for rank in ranks]}")


def _rank(recipes: list[Recipe], rank: worker.Rank, folder: Path, rendezvous: Path) -> None:
    worker.join(rank, rendezvous)
    for recipe in recipes:
        start = time.perf_counter()
        try:
            worker.make(recipe, rank, folder / recipe.name)
        except Exception:  # the process ends here: say which recipe it was
            sys.exit(f"{recipe.name}, rank {rank.rank}:\n{traceback.format_exc()}")
        if rank.rank == 0:
            print(f"{time.perf_counter() - start:6.2f} s  {recipe.name}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
