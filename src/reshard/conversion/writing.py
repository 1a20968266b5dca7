"""How a plan is carried out, for those who state it and those who do it."""

from __future__ import annotations

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
