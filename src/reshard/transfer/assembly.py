"""The output while it is written: its pieces, in output order, and the results of those made.

The makers (threads of this process, workers of a cluster) take pieces here and report the result of
each. The assembly combines their digests and CRC-32s, and seals a file once its last piece is made.
"""

from __future__ import annotations

import os
import threading
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from msgspec import Struct, field
from zlib_ng import zlib_ng

from reshard.core.findings import Finding
from reshard.core.plan import OutputFile, Plan, Slot
from reshard.core.tensors import FileRef
from reshard.transfer import journal
from reshard.transfer.checksums import Checked, PassedRun
from reshard.transfer.finite import NotFinite
from reshard.transfer.making import SegmentResult, block_numel
from reshard.transfer.outcome import Digests, Outcome
from reshard.transfer.output import Output
from reshard.transfer.pieces import Run, runs
from reshard.transfer.readback import ReadBack, Stretch

# CRC-32s that are sorted at a time: each takes 130 bytes then, and they come nearly in order.
_LATE = 1 << 14


class File(Struct):
    """An output file while it is written; `pending` segments are still to come. `late` is written
    before it is sealed: CRC-32s, by their offsets, in two columns.

    Of a lent file `path` is where it lies meanwhile; its `fd` is -1, and that of a sent one.
    """

    output: OutputFile
    fd: int
    pending: int = 1
    path: Path | None = None
    late: tuple[array[int], array[int]] = field(default_factory=lambda: (array("Q"), array("I")))

    @property
    def place(self) -> Path:
        """Where a lent file lies."""
        if self.path is None:
            raise ValueError(f"{self.output.name} is not lent")
        return self.path


class Tensor(Struct):
    """A slot while it is written; `changed` once it differs from its reference.

    `crcs` are the CRC-32 and size of the segments that are written, by their first element;
    `pending` segments are not, and more may come until `complete`.
    """

    slot: Slot
    file: File
    crcs: dict[int, tuple[int, int]] = field(default_factory=dict)
    pending: int = 0
    complete: bool = False
    changed: bool = False


class Segment(Struct, frozen=True):
    """What a piece has of one slot."""

    tensor: Tensor
    runs: list[Run]


class Piece(Struct, frozen=True):
    """A leaf of a tensor's digest, and where its bytes go."""

    leaf: int
    segments: list[Segment] = field(default_factory=list)

    @property
    def name(self) -> tuple[str, str]:
        """The table and the name of its tensor."""
        tensor = self.segments[0].tensor
        return tensor.file.output.table, tensor.slot.spec.name

    @property
    def nbytes(self) -> int:
        return sum(
            run.numel * segment.tensor.slot.spec.dtype.itemsize
            for segment in self.segments
            for run in segment.runs
        )


class Noted(Struct, frozen=True):
    """What an interrupted run noted of a piece: its digest, and what was read of records."""

    digest: bytes
    read: Sequence[PassedRun]


class Assembly:
    """A plan's output while it is written into a folder. Take `pieces` from one thread at a time.

    `back` is told what can be read again. With `lent`, a file is closed once its literals are
    written, so that others can write into it, and opened again when all of them are done. With
    `sent`, others make and send whole files: nothing is written here.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Output,
        back: ReadBack | None = None,
        *,
        lent: bool = False,
        sent: bool = False,
    ) -> None:
        self.total: int = sum(slot.spec.nbytes for slot in plan.slots())
        self._plan = plan
        self._folder = folder
        self._back = back
        self._lent = lent
        self._sent = sent
        self._compared = self._changed = 0
        self._digests = Digests()
        self._not_finite: dict[tuple[str, str], NotFinite] = {}
        self._reused = self._damaged = 0
        sources = [] if folder.journal is None else folder.journal.sources
        self._numbers = {path: number for number, path in enumerate(sources)}
        self._counting = threading.Lock()

    def pieces(self) -> Iterator[Piece]:
        """Every piece, in output order; each file is made as its turn comes."""
        piece: Piece | None = None
        before = 0
        key: tuple[str, str] | None = None
        for output in self._plan.files:
            file = self._begin(output)
            for slot in output.slots:
                first = (output.table, slot.spec.name) != key
                if first:  # the slots of one tensor follow each other
                    key = output.table, slot.spec.name
                    before = 0
                    self._digests.begin(*key)
                tensor = Tensor(slot, file)
                self._compared += slot.reference is not None
                for leaf, run in runs(slot, before, block_numel(slot)):
                    if piece is None or first or piece.leaf != leaf:
                        if piece is not None:
                            yield piece
                        piece = Piece(leaf)
                    first = False
                    self._add(piece, tensor, run)
                before += slot.spec.numel
                self._complete(tensor)
            self._release(file)
        if piece is not None:
            yield piece

    def noted(self, piece: Piece) -> Noted | None:
        """What an interrupted run noted of a piece: it counts if the piece's bytes have that
        digest."""
        own = self._folder.journal
        if own is None or own.noted is None:
            return None
        found, sources = own.noted.piece(*piece.name, piece.leaf), own.sources
        if found is None:
            return None
        read = [(FileRef(sources[n]), start, stop, crc) for n, start, stop, crc in found.read]
        return Noted(found.digest, read)

    def differs(self, piece: Piece) -> None:
        """Note that a piece's bytes are not those that the journal notes: it is made again."""
        with self._counting:
            self._damaged += 1

    def made(
        self,
        piece: Piece,
        digest: bytes,
        results: Sequence[SegmentResult],
        read: Sequence[PassedRun] | None,
    ) -> None:
        """Note that a piece is written, the results of its segments, and what was read of records.
        The journal gets a line, unless what was read is not known or came from compressed frames.
        """
        if self._back is not None and (stretch := self._stretch(piece)) is not None:
            self._back.note(piece.segments[0].tensor.file.fd, stretch)
        self._done(piece, digest, results)
        self.note(piece, digest, read)

    def note(self, piece: Piece, digest: bytes, read: Sequence[PassedRun] | None) -> None:
        """Note a piece in the journal, as `made` says."""
        own = self._folder.journal
        if own is None or read is None:
            return
        if all(file.codec is None and file.path in self._numbers for file, *_ in read):
            numbered = tuple((self._numbers[f.path], start, stop, c) for f, start, stop, c in read)
            line = journal.Piece(*piece.name, piece.leaf, digest, numbered)
            own.note(line, piece.nbytes)

    def reused(self, piece: Piece, digest: bytes, results: Sequence[SegmentResult]) -> None:
        """Note that a piece is in the output as an interrupted run noted it."""
        if self._back is not None and (stretch := self._stretch(piece)) is not None:
            self._back.known(stretch, digest)
        self.count_reused(piece.nbytes)
        self._done(piece, digest, results)

    def count_reused(self, nbytes: int) -> None:
        """Count bytes that were in the output as the journal notes them."""
        with self._counting:
            self._reused += nbytes

    def _done(self, piece: Piece, digest: bytes, results: Sequence[SegmentResult]) -> None:
        self.hashed(piece, digest)
        for segment, made in zip(piece.segments, results, strict=True):
            self.segment_made(segment, made)

    def hashed(self, piece: Piece, digest: bytes) -> None:
        """Note the digest of a piece whose segments are all noted, or will be."""
        with self._counting:
            self._digests.put(*piece.name, piece.leaf, digest)

    def segment_made(self, segment: Segment, result: SegmentResult) -> None:
        """Note that a segment is written, and its result.

        Where bytes are taken in order, the next segment of the same piece may wait for this one:
        for the CRC-32 between two chunks.
        """
        tensor = segment.tensor
        with self._counting:
            if result.changed and not tensor.changed:
                tensor.changed = True
                self._changed += 1
            if result.special:
                key = (tensor.file.output.table, tensor.slot.spec.name)
                self._not_finite[key] = self._not_finite.get(key, NotFinite()) + result.special
            if tensor.slot.crcs:
                tensor.crcs[segment.runs[0].start] = result.crc, result.nbytes
            tensor.pending -= 1
            if tensor.complete and not tensor.pending:
                self._put_crc(tensor)
        self._release(tensor.file)

    def outcome(
        self, bytes_read: int, checked: Checked, findings: tuple[Finding, ...] = ()
    ) -> Outcome:
        """The result, once every piece is made."""
        return Outcome(
            digests=self._digests,
            bytes_read=bytes_read,
            checked=checked,
            compared=self._compared,
            changed=self._changed,
            not_finite={
                key: self._not_finite[key] for key in self._digests if key in self._not_finite
            },
            findings=findings,
            read_back={} if self._back is None else self._back.found,
            reused=self._reused,
            damaged=self._damaged,
        )

    def _begin(self, output: OutputFile) -> File:
        """Make a file, with the bytes that are known beforehand."""
        if self._sent:
            return File(output, -1)
        fd = self._folder.create(output.name, output.nbytes)
        literals = without_crcs(output) if self._folder.in_order else output.literals
        for offset, literal in literals:
            self._folder.put(output.name, fd, memoryview(literal), offset, known=True)
        if self._lent:
            return File(output, -1, path=self._folder.lend(output.name, fd))
        return File(output, fd)

    def _stretch(self, piece: Piece) -> Stretch | None:
        """Where a piece lies, if it is one stretch of a file."""
        if len(piece.segments) != 1:
            return None
        (segment,) = piece.segments
        file, slot = segment.tensor.file, segment.tensor.slot
        first, last = segment.runs[0], segment.runs[-1]
        itemsize = slot.spec.dtype.itemsize
        path = os.fspath(self._folder.partial / file.output.name)
        offset = slot.offset + first.start * itemsize
        nbytes = (last.start + last.numel - first.start) * itemsize
        return Stretch(path, offset, nbytes)

    def _add(self, piece: Piece, tensor: Tensor, run: Run) -> None:
        """Note a run in its piece; segments are counted before anyone can finish them."""
        if not piece.segments or piece.segments[-1].tensor is not tensor:
            piece.segments.append(Segment(tensor, []))
            with self._counting:
                tensor.pending += 1
                tensor.file.pending += 1
        piece.segments[-1].runs.append(run)

    def _complete(self, tensor: Tensor) -> None:
        """Note that no more segments of a slot will come."""
        with self._counting:
            tensor.complete = True
            if not tensor.pending:
                self._put_crc(tensor)

    def _release(self, file: File) -> None:
        """Release a file; the last one seals it."""
        with self._counting:
            file.pending -= 1
            last = file.pending == 0
        if last and not self._sent:
            self._seal(file)

    def _seal(self, file: File) -> None:
        """Write what could not be known before, sync the file and give it its name."""
        name = file.output.name
        fd = file.fd if file.path is None else self._folder.take_back(name, file.path)
        offsets, crcs = file.late
        file.late = array("Q"), array("I")
        for at in range(0, len(offsets), _LATE):
            some = slice(at, at + _LATE)
            self._put_late(name, fd, sorted(zip(offsets[some], crcs[some], strict=True)))
        if self._back is not None:
            self._back.written(fd)
        self._folder.seal(name, fd)

    def _put_crc(self, tensor: Tensor) -> None:
        """Have the CRC-32 of a slot written, of which every segment is made."""
        crc = 0
        for _, (following, nbytes) in sorted(tensor.crcs.items()):
            crc = zlib_ng.crc32_combine(crc, following, nbytes)
        tensor.crcs.clear()
        if self._sent:  # who sends the file writes it
            return
        late = [(offset, crc) for offset in tensor.slot.crc_offsets]
        if self._folder.in_order:  # what comes after it waits for it
            self._put_late(tensor.file.output.name, tensor.file.fd, late)
        else:
            offsets, crcs = tensor.file.late
            offsets.extend(offset for offset, _ in late)
            crcs.extend(crc for _, crc in late)

    def _put_late(self, name: str, fd: int, late: Iterable[tuple[int, int]]) -> None:
        for offset, crc in late:
            data = memoryview(crc.to_bytes(4, "little"))
            self._folder.put(name, fd, data, offset, known=True)


def without_crcs(output: OutputFile) -> Iterator[tuple[int, bytes]]:
    """The literals of a file, without the four bytes where each CRC-32 will be."""
    places = sorted(offset for slot in output.slots for offset in slot.crc_offsets)
    for offset, literal in output.literals:
        at, end = offset, offset + len(literal)
        for place in places[bisect_left(places, offset) : bisect_left(places, end)]:
            yield at, literal[at - offset : place - offset]
            at = place + 4
        yield at, literal[at - offset :]
