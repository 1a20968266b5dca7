"""A transfer into a store as tasks for the workers of a cluster.

A store has no file that several could write into, so a task is one file of the output, or several
small ones: a worker makes it, sends it, and answers with the tag of the object. Where a piece lies
in two files, both workers make it, and each sends its part. The driver writes the files that hold
no tensor, notes what is finished, and puts the last object.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from msgspec import Struct

from reshard.core.findings import Finding
from reshard.core.plan import OutputFile, Plan
from reshard.core.tensors import FileRef
from reshard.storage.local import Sources
from reshard.storage.stores import Object
from reshard.transfer.assembly import Assembly, File, Noted, Piece, without_crcs
from reshard.transfer.checksums import Ledger
from reshard.transfer.cluster import executor, wire
from reshard.transfer.cluster.packing import batches, inputs, note_read, pack, usable
from reshard.transfer.cluster.tasks import Tasks
from reshard.transfer.cluster.wire import Packer
from reshard.transfer.outcome import Outcome
from reshard.transfer.output import Output
from reshard.transfer.remote import RemoteFolder

if TYPE_CHECKING:
    from reshard.transfer.cluster.executor import OnRay


class _ToSend(Struct, frozen=True):
    """A file, the pieces that lie in it, and whether an interrupted run completed it."""

    file: OutputFile
    pieces: list[Piece]
    stands: bool


class _Sending(Struct, frozen=True):
    """The files of a task, its pieces, what was noted of each, and the files that it reads."""

    files: tuple[OutputFile, ...]
    pieces: list[Piece]
    noted: list[Noted | None]
    read: tuple[FileRef, ...]

    def own(self, piece: Piece) -> list[int]:
        """Which segments of a piece lie in these files."""
        names = {file.name for file in self.files}
        return [
            place
            for place, segment in enumerate(piece.segments)
            if segment.tensor.file.output.name in names
        ]


class StoreTransfer:
    """One transfer into a store."""

    def __init__(
        self, cluster: OnRay, plan: Plan, sources: Sources, folder: Output, ledger: Ledger
    ) -> None:
        if not isinstance(folder, RemoteFolder):
            raise TypeError("the output is not in a store")
        self._cluster = cluster
        self._plan = plan
        self._sources = sources
        self._folder = folder
        self._ledger = ledger
        self._assembly = Assembly(plan, folder, sent=True)
        self._given: set[str] = set()
        self._read = self._written = 0

    def run(self) -> Outcome:
        tasks = Tasks(self._cluster.ray, self._cluster.workers, wire.SendAnswer)
        self._folder.abandoned = True  # until it is known that no worker was lost
        tasks.run(self._tasks(), self._answered)
        self._folder.abandoned = tasks.lost > 0
        for output in self._plan.files:
            if output.name not in self._given:
                self._write(output)
        self._folder.settle()
        findings: tuple[Finding, ...] = (executor.made_again(tasks.lost),) if tasks.lost else ()
        return self._assembly.outcome(self._read, self._ledger.check(self._sources), findings)

    def _write(self, output: OutputFile) -> None:
        """Write a file without elements."""
        number = self._folder.create(output.name, output.nbytes)
        for offset, literal in _literals(output):
            self._folder.put(output.name, number, memoryview(literal), offset, known=True)
        self._folder.seal(output.name, number)

    def _answered(self, sending: _Sending, answer: wire.SendAnswer) -> None:
        """Note what a task sent, or found."""
        self._read += answer.bytes_read
        for piece, noted, found in zip(sending.pieces, sending.noted, answer.pieces, strict=True):
            own = sending.own(piece)
            nbytes = piece.nbytes if len(own) == len(piece.segments) else _nbytes(piece, own)
            read = note_read(self._ledger, self._assembly, piece, noted, found, sending.read)
            if read is None:
                self._assembly.count_reused(nbytes)
            else:
                self._assembly.note(piece, found.digest, read)
            self._assembly.hashed(piece, found.digest)
            for place in own:
                self._assembly.segment_made(piece.segments[place], found.segments[place])
            self._written += nbytes
        for file, tag in zip(sending.files, answer.tags, strict=True):
            self._folder.took(file.name, Object(file.nbytes, tag))
        if self._cluster.progress is not None:
            self._cluster.progress(self._written, self._assembly.total)

    def _tasks(self) -> Iterator[tuple[_Sending, bytes]]:
        """A task for each large file, and for several small ones."""
        most = executor.task_nbytes(self._cluster, self._assembly.total)
        files = (
            _ToSend(file.output, pieces, self._stands(file, pieces))
            for file, pieces in self._by_file()
        )

        def measure(one: _ToSend) -> tuple[int, int]:
            return one.file.nbytes, sum(len(piece.segments) for piece in one.pieces)

        for batch in batches(files, measure, most, lambda one: one.stands):
            yield self._task(batch, standing=batch[0].stands)

    def _by_file(self) -> Iterator[tuple[File, list[Piece]]]:
        """Each file that holds elements, with every piece that lies in it, in output order."""
        waiting: dict[str, tuple[File, list[Piece]]] = {}
        for piece in self._assembly.pieces():
            here = {s.tensor.file.output.name: s.tensor.file for s in piece.segments}
            for name in [name for name in waiting if name not in here]:
                yield waiting.pop(name)
            for name, file in here.items():
                waiting.setdefault(name, (file, []))[1].append(piece)
        yield from waiting.values()

    def _stands(self, file: File, pieces: Iterable[Piece]) -> bool:
        """Whether an interrupted run completed a file, and noted each of its pieces."""
        if self._folder.kept(file.output.name, file.output.nbytes) is None:
            return False
        return all(self._noted(piece) is not None for piece in pieces)

    def _noted(self, piece: Piece) -> Noted | None:
        return usable(self._assembly, self._ledger, piece)

    def _task(self, batch: list[_ToSend], *, standing: bool) -> tuple[_Sending, bytes]:
        files = [one.file for one in batch]
        numbers = {file.name: number for number, file in enumerate(files)}
        pieces = list({id(piece): piece for one in batch for piece in one.pieces}.values())
        noted = [self._noted(piece) if standing else None for piece in pieces]
        packer = Packer()
        packed = pack(pieces, noted, packer, self._ledger,
                      lambda file: numbers.get(file.output.name, -1))  # fmt: skip
        read = inputs(packer, self._sources)
        self._folder.displace()
        self._folder.sending.begun |= {*numbers}
        self._given |= {*numbers}
        task = wire.SendTask(
            read,
            str(self._folder.target),
            tuple(self._stored(file, standing=standing) for file in files),
            packed.slots,
            packed.crcs,
            packed.pieces,
            packed.records,
        )
        return _Sending(tuple(files), pieces, noted, read.files), wire.encode(task)

    def _stored(self, file: OutputFile, *, standing: bool) -> wire.Stored:
        kept = self._folder.kept(file.name, file.nbytes) if standing else None
        tag = "" if kept is None else kept.tag
        return wire.Stored(file.name, file.nbytes, tuple(_literals(file)), tag)


def _literals(output: OutputFile) -> Iterator[tuple[int, bytes]]:
    """The bytes of a file that are known beforehand; the CRC-32 of no bytes is 0."""
    yield from without_crcs(output)
    for slot in output.slots:
        if not slot.spec.numel:
            yield from ((offset, bytes(4)) for offset in slot.crc_offsets)


def _nbytes(piece: Piece, own: Iterable[int]) -> int:
    """The bytes of some segments of a piece."""
    segments = [piece.segments[place] for place in own]
    return sum(run.numel * s.tensor.slot.spec.dtype.itemsize for s in segments for run in s.runs)
