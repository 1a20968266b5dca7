"""How a plan is carried out, for those who state it and those who do it."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from reshard.progress import StagedProgress
from reshard.transfer.cluster.connection import Workers


class Writing(Struct, frozen=True):
    """How a plan is carried out; nothing here changes a byte of the output.

    `workers`: by those of a Ray cluster, instead of threads.
    """

    threads: int
    overwrite: bool = False
    resume: bool = False
    verify: bool = True
    progress: StagedProgress | None = None
    workers: Workers | None = None

    def step(self, what: str) -> Callable[[int, int], None] | None:
        """The progress of one part of the work."""
        progress = self.progress
        return None if progress is None else lambda done, total: progress(what, done, total)
