"""Several checkpoints of a run, each compared with the one before."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from reshard import formats
from reshard.comparison.compare import diff
from reshard.comparison.result import Comparison
from reshard.comparison.sums import natural
from reshard.core.options import PathLike
from reshard.errors import OptionError
from reshard.formats import locate
from reshard.progress import Progress
from reshard.storage.paths import exists, is_folder


def diff_steps(
    checkpoints: Sequence[PathLike],
    *,
    base: PathLike | None = None,
    spectrum: bool = False,
    optimizer: bool = False,
    progress: Progress | None = None,
) -> tuple[Comparison, ...]:
    """Compare each of several checkpoints with the one before it, in the order given.

    The options are those of `reshard.diff`, and so is what is raised; `OptionError` also for fewer
    than two checkpoints.
    """
    paths = [*checkpoints]
    if len(paths) < 2:
        raise OptionError("name two or more checkpoints.", option="checkpoints")
    return tuple(
        diff(first, second, base=base, spectrum=spectrum, optimizer=optimizer, progress=progress)
        for first, second in pairwise(paths)
    )


def of_run(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Of what a shell makes of `RUN/*`: the checkpoints, by their steps, and what is none.

    Only paths of one folder in the order in which a shell lists them are put in order: others were
    named in the order that is meant.
    """
    found = [path for path in paths if _is_checkpoint(path)]
    left = [path for path in paths if path not in found]
    listed = [*map(str, paths)] == sorted(map(str, paths))
    if listed and len({path.parent for path in paths}) == 1:
        found.sort(key=lambda path: natural(path.name))
    return found, left


def _is_checkpoint(path: Path) -> bool:
    """Whether a checkpoint is there, or below; a path that is not there is left for the error."""
    if not exists(path):
        return True
    return bool(formats.claims(path) or (is_folder(path) and locate.saves(path)))
