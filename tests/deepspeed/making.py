"""The main program of the oracles of this folder: make each recipe in ranks of its own."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from tests.oracle import launch
from tests.oracle.worker import Rank


class Recipe(Protocol):
    """What every recipe states."""

    @property
    def name(self) -> str: ...

    @property
    def world(self) -> int: ...


R = TypeVar("R", bound=Recipe)


def main(
    recipes: Mapping[str, R],
    make: Callable[[R, Rank, Path], None],
    folder: Path,
    names: list[str],
) -> None:
    """Make the recipes of these names, or all of them, in `folder`."""
    for module in launch.PRELOADED:
        importlib.import_module(module)
    gc.freeze()
    for recipe in recipes.values():
        if not names or recipe.name in names:
            job: Callable[[Rank, Path], None] = partial(make, recipe)
            launch._run([(recipe.name, job)], recipe.world, folder)
