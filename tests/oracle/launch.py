"""Makes every recipe: `python -m tests.oracle.launch FOLDER [RECIPE ...]`.

Those that need a GPU are made only where they are named, with DS_ACCELERATOR=cuda.

torch and DeepSpeed are imported once, here; the ranks are forked from this process, which saves
each of them the seconds of importing.
"""

from __future__ import annotations

import gc
import importlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from tests.forking import run_ranks
from tests.oracle import parallel, worker
from tests.oracle.recipes import BY_NAME, PARALLEL, RECIPES, Recipe
from tests.oracle.worker import Rank

# Imported by torch, DeepSpeed and the recipes on first use; here once, before the ranks fork.
PRELOADED = (
    "torch._dynamo",
    "transformers.models.llama",
    "peft",
)

Job = tuple[str, Callable[[Rank, Path], None]]


def main(folder: Path, names: Sequence[str]) -> None:
    for module in PRELOADED:
        importlib.import_module(module)
    # DeepSpeed collects garbage all the time; frozen, the objects of the imports are passed over.
    gc.freeze()
    expected = set(names)
    recipes = [BY_NAME[name] for name in names if name not in PARALLEL] if expected else RECIPES
    for world, jobs in _runs(recipes):
        chosen = [job for job in jobs if not expected or job[0] in expected]
        if chosen:
            _run(chosen, world, folder)


def _runs(recipes: Sequence[Recipe]) -> Iterator[tuple[int, list[Job]]]:
    """World sizes and what is made in one set of ranks: recipes share one, of each world size.

    The parallel ones get ranks of their own: they leave process groups behind in DeepSpeed.
    """
    for world in sorted({recipe.world for recipe in recipes}):
        mine = [recipe for recipe in recipes if recipe.world == world]
        yield world, [(recipe.name, partial(worker.make, recipe)) for recipe in mine]
    for name in PARALLEL:
        yield 2, [(name, partial(_parallel, name))]


def _parallel(name: str, rank: Rank, folder: Path) -> None:
    parallel.MAKERS[name](folder)


def _run(jobs: list[Job], world: int, folder: Path) -> None:
    """Does `jobs` in `world` new ranks, and ends them all as soon as one of them fails."""

    def work(rank: int, meeting: Path) -> None:
        _rank(jobs, Rank(rank, world), folder, meeting)

    codes = run_ranks(world, work)
    if any(codes):
        sys.exit(f"{world} ranks doing {', '.join(name for name, _ in jobs)}: exit codes {codes}")


def _rank(jobs: list[Job], rank: Rank, folder: Path, meeting: Path) -> None:
    worker.join(rank, meeting)
    for name, make in jobs:
        start = time.perf_counter()
        try:
            make(rank, folder / name)
        except Exception:  # the process ends here: say which recipe it was
            sys.exit(f"{name}, rank {rank.rank}:\n{traceback.format_exc()}")
        if rank.rank == 0:
            print(f"{time.perf_counter() - start:6.2f} s  {name}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
