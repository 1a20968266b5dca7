"""Small files that a run keeps beside its save: a schedule, counters, the user's state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reshard.containers.torch import read as read_torch
from reshard.errors import FormatError, IncompleteError
from reshard.storage.local import Sources


def read_run_file(path: Path, sources: Sources) -> object:
    """What such a file of torch.save holds. Raises as `undamaged` does."""
    with undamaged(path):
        return read_torch(sources.open(path)).value


@contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Raise `FormatError`, whose hint says what to do, where a file of the run is damaged.

    To go on without it would begin the schedule, or the data, anew and in silence.
    """
    try:
        yield
    except (FormatError, IncompleteError) as error:
        raise FormatError(
            f"it is damaged: {error.message}",
            path=path,
            hint="Copy the file again. If the run may begin this part of its state anew, move the "
            "file away.",
        ) from None
