"""What makes the pieces of a plan. There is one executor today: threads of this process.

An executor gets all that the work needs with `run`: the plan, which is data, the sources, and the
folder to write into. A piece (`pieces`) can be made by anyone who has these, and made again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from msgspec import Struct

from reshard.core.plan import Plan
from reshard.core.tensors import Extent, Record
from reshard.progress import Progress
from reshard.storage.local import Sources
from reshard.transfer.assembly import Outcome
from reshard.transfer.checksums import Ledger
from reshard.transfer.engine import Engine
from reshard.transfer.output import Output


class Executor(Protocol):
    """Carries out a plan's transfer."""

    def run(self, plan: Plan, sources: Sources, folder: Output) -> Outcome:
        """Write every file of the plan into the folder, synced and named. Raises what fails."""


class Threads(Struct, frozen=True):
    """A few threads of this process.

    `records` are the sources' own checksums, which are compared as the bytes pass; `unprotected`
    are the stretches without; it counts how many of them were read. With `read_back`, files are
    read again while others are written; the outcome says what was found. `progress` is called with
    (bytes written, bytes to write) after each block.
    """

    count: int
    records: Iterable[Record] = ()
    read_back: bool = False
    progress: Progress | None = None
    unprotected: Sequence[Extent] = ()

    def run(self, plan: Plan, sources: Sources, folder: Output) -> Outcome:
        """Write every file of the plan into the folder, synced and named. Raises what fails."""
        return Engine(
            plan,
            sources,
            Ledger(self.records, self.unprotected),
            folder,
            threads=self.count,
            read_back=self.read_back,
            progress=self.progress,
        ).run()
