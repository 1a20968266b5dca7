"""A transfer and a verification as tasks for the workers of a cluster.

Pieces that follow each other are one task, of up to `TASK_NBYTES`: the answer and the handing out
take a few milliseconds, and what is lost with a worker is made again in seconds. Neither what a
task is nor who made it changes a byte of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from msgspec import Struct

from reshard.core.digests import LEAF_NBYTES, leaf_numel
from reshard.core.findings import Finding
from reshard.core.plan import Plan
from reshard.core.tensors import Entry, Extent, FileRef, Record
from reshard.progress import Progress
from reshard.storage.local import Sources
from reshard.transfer.assembly import Assembly, File, Noted, Piece
from reshard.transfer.checksums import Ledger
from reshard.transfer.cluster import wire
from reshard.transfer.cluster.connection import Workers
from reshard.transfer.cluster.packing import batches, inputs, note_read, pack, usable
from reshard.transfer.cluster.tasks import Tasks
from reshard.transfer.cluster.wire import Output, Packer
from reshard.transfer.executor import LeafDigests
from reshard.transfer.outcome import Outcome
from reshard.transfer.output import Output as Folder
from reshard.transfer.reading import Known
from reshard.transfer.system import identity_of

# Bytes of pieces in a task.
TASK_NBYTES = 256 << 20
# Tasks for each processor, at least, as far as there are pieces: none is idle for long at the end.
_EACH = 8


class OnRay(Struct, frozen=True):
    """The workers of a cluster; `ray` is connected to it.

    `records`, `unprotected` and `progress` are as those of `Threads`; progress is called after each
    task.
    """

    ray: Any
    workers: Workers
    records: Iterable[Record] = ()
    unprotected: Sequence[Extent] = ()
    progress: Progress | None = None

    def run(self, plan: Plan, sources: Sources, folder: Folder) -> Outcome:
        """Write every file of the plan into the folder, synced and named. Raises what fails."""
        ledger = Ledger(self.records, self.unprotected)
        if folder.in_order:  # as a store takes a file, which workers make and send whole
            from reshard.transfer.cluster.stores import StoreTransfer

            return StoreTransfer(self, plan, sources, folder, ledger).run()
        return _Transfer(self, plan, sources, folder, ledger).run()

    def leaf_digests(self, known: Known) -> LeafDigests:
        """The workers read; nothing is known, since who wrote may have it cached."""
        return self._hash

    def _hash(
        self,
        leaves: Iterator[tuple[Entry, int]],
        sources: Sources,
        hashed: Callable[[int, bytes], None],
    ) -> None:
        """Have leaves of tensors read and hashed; `hashed` gets each one's place and digest."""

        def answered(first: int, answer: wire.HashAnswer) -> None:
            for place, digest in enumerate(answer.digests, first):
                hashed(place, digest)

        tasks = Tasks(self.ray, self.workers, wire.HashAnswer)
        tasks.run(_hash_tasks(leaves, sources), answered)


def task_nbytes(cluster: OnRay, total: int) -> int:
    """Bytes of a task, of so many in all: none of the processors is idle for long."""
    processors = int(cluster.ray.cluster_resources().get("CPU", 0))
    return min(TASK_NBYTES, total // (_EACH * max(processors, 1)))


class _Making(Struct, frozen=True):
    """What a task makes, what an interrupted run noted of each piece, and the files that its answer
    counts."""

    pieces: list[Piece]
    noted: list[Noted | None]
    files: tuple[FileRef, ...]


class _Transfer:
    """One transfer."""

    def __init__(
        self,
        cluster: OnRay,
        plan: Plan,
        sources: Sources,
        folder: Folder,
        ledger: Ledger,
    ) -> None:
        self._cluster = cluster
        self._sources = sources
        self._folder = folder
        self._ledger = ledger
        self._assembly = Assembly(plan, folder, lent=True)
        self._read = 0
        self._written = 0

    def run(self) -> Outcome:
        tasks = Tasks(self._cluster.ray, self._cluster.workers, wire.MakeAnswer)
        tasks.run(self._tasks(), self._answered)
        self._folder.settle()
        findings = (made_again(tasks.lost),) if tasks.lost else ()
        return self._assembly.outcome(self._read, self._ledger.check(self._sources), findings)

    def _answered(self, making: _Making, answer: wire.MakeAnswer) -> None:
        """Note what a task made, and what it found made."""
        self._read += answer.bytes_read
        for piece, noted, found in zip(making.pieces, making.noted, answer.pieces, strict=True):
            read = note_read(self._ledger, self._assembly, piece, noted, found, making.files)
            if read is None:
                self._assembly.reused(piece, found.digest, found.segments)
            else:
                self._assembly.made(piece, found.digest, found.segments, read)
            self._written += piece.nbytes
        if self._cluster.progress is not None:
            self._cluster.progress(self._written, self._assembly.total)

    def _tasks(self) -> Iterator[tuple[_Making, bytes]]:
        most = task_nbytes(self._cluster, self._assembly.total)
        for pieces in _together(self._assembly.pieces(), most):
            yield self._task(pieces)

    def _task(self, pieces: list[Piece]) -> tuple[_Making, bytes]:
        packer = Packer()
        outputs: dict[str, int] = {}
        files: list[Output] = []

        def numbered(file: File) -> int:
            if file.output.name not in outputs:
                outputs[file.output.name] = len(files)
                files.append(self._output(file))
            return outputs[file.output.name]

        noted = [usable(self._assembly, self._ledger, piece) for piece in pieces]
        packed = pack(pieces, noted, packer, self._ledger, numbered)
        read = inputs(packer, self._sources)
        task = wire.MakeTask(read, tuple(files), packed.slots, packed.pieces, packed.records)
        return _Making(pieces, noted, read.files), wire.encode(task)

    def _output(self, file: File) -> Output:
        known = identity_of(file.place)
        inode = 0 if known is None else known[1]
        shown = str(self._folder.target / file.output.name)
        return Output(str(file.place), inode, file.output.nbytes, shown)


def _together(pieces: Iterator[Piece], most: int) -> Iterator[list[Piece]]:
    """The pieces of each task: one, or several of `most` bytes."""
    return batches(pieces, lambda piece: (piece.nbytes, len(piece.segments)), most)


def _hash_tasks(
    leaves: Iterator[tuple[Entry, int]], sources: Sources
) -> Iterator[tuple[int, bytes]]:
    """Tasks that hash leaves, with the place of the first of each."""
    first = 0

    def measure(leaf: tuple[Entry, int]) -> tuple[int, int]:
        return min(leaf[0].spec.nbytes, LEAF_NBYTES), 1

    for batch in batches(leaves, measure, TASK_NBYTES):
        yield first, _hash_task(batch, sources)
        first += len(batch)


def _hash_task(batch: list[tuple[Entry, int]], sources: Sources) -> bytes:
    packer = Packer()
    packed = []
    for entry, leaf in batch:
        step = leaf_numel(entry.spec.dtype)
        needed = wire.narrowed(entry, leaf * step, min((leaf + 1) * step, entry.spec.numel))
        packed.append((packer.entry(needed), leaf))
    return wire.encode(wire.HashTask(inputs(packer, sources), tuple(packed)))


def made_again(count: int) -> Finding:
    return Finding(
        "pieces-made-again",
        f"{count} tasks were handed out again, because their workers or nodes were lost.",
        evidence={"tasks": count},
    )
