"""What makes the pieces of a plan: threads of this process; those of a cluster are in `cluster`.

An executor gets all that the work needs with `run`: the plan, which is data, the sources, and the
folder to write into. A piece (`pieces`) can be made by anyone who has these, and made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from msgspec import Struct

from reshard.core.plan import Plan
from reshard.core.tensors import Entry, Extent, Record
from reshard.progress import Progress
from reshard.storage.local import Sources
from reshard.transfer.checksums import Ledger
from reshard.transfer.engine import Engine
from reshard.transfer.outcome import Outcome
from reshard.transfer.output import Output
from reshard.transfer.reading import Known, leaf_digest
from reshard.transfer.threads import in_order


class Executor(Protocol):
    """Carries out a plan's transfer."""

    def run(self, plan: Plan, sources: Sources, folder: Output) -> Outcome:
        """Write every file of the plan into the folder, synced and named. Raises what fails."""

    def leaf_digests(self, known: Known) -> LeafDigests:
        """Reads a folder again, where what was written is not `known` to be there."""


class LeafDigests(Protocol):
    """Reads leaves of tensors and hashes them."""

    def __call__(
        self,
        leaves: Iterator[tuple[Entry, int]],
        sources: Sources,
        found: Callable[[int, bytes], None],
        /,
    ) -> None:
        """Hash each leaf, of the tensor of an entry; `found` is told its place and its digest.

        `found` may be called from several threads, in any order. Raises what reading or `found`
        raises.
        """


def in_threads(threads: int, known: Known | None = None) -> LeafDigests:
    """Leaves are hashed by threads of this process, but for those that are `known`."""

    def hash_leaves(
        leaves: Iterator[tuple[Entry, int]],
        sources: Sources,
        hashed: Callable[[int, bytes], None],
    ) -> None:
        def work(numbered: tuple[int, tuple[Entry, int]]) -> None:
            place, (entry, leaf) = numbered
            hashed(place, leaf_digest(entry, leaf, sources, known))

        in_order(work, enumerate(leaves), threads)

    return hash_leaves


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

    def leaf_digests(self, known: Known) -> LeafDigests:
        """Threads that read what is not `known`."""
        return in_threads(self.count, known)
