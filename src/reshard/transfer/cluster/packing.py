"""What the tasks of pieces are made of, and what their answers say of the source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from msgspec import Struct

from reshard.core.tensors import Extent, FileRef, stored
from reshard.storage.local import Sources
from reshard.transfer.assembly import Assembly, File, Noted, Piece
from reshard.transfer.checksums import Ledger, PassedRun
from reshard.transfer.cluster import wire
from reshard.transfer.cluster.wire import Inputs, Packer

# Tensors of a task: that of very many small ones is long to write down.
TASK_SEGMENTS = 2048

Item = TypeVar("Item")


class Packed(Struct, frozen=True):
    """Pieces, the slots that they have parts of, and the records that are read for them.

    `crcs` are the places of each slot's CRC-32.
    """

    slots: tuple[wire.WireSlot, ...]
    crcs: tuple[tuple[int, ...], ...]
    pieces: tuple[wire.WirePiece, ...]
    records: tuple[wire.Stretch, ...]


def pack(
    pieces: Sequence[Piece],
    noted: Sequence[Noted | None],
    packer: Packer,
    ledger: Ledger,
    numbered: Callable[[File], int],
) -> Packed:
    """Pack pieces; `numbered` gives the number of an output file in the task."""
    slots: list[wire.WireSlot] = []
    crcs: list[tuple[int, ...]] = []
    records: dict[Extent, None] = {}
    made = []
    for piece, known in zip(pieces, noted, strict=True):
        segments = []
        for segment in piece.segments:
            slot = segment.tensor.slot
            source = wire.narrowed(slot.source, *wire.reached(segment.runs))
            for extent in stored(source.fragments):
                if (record := ledger.record_around(extent)) is not None:
                    records[record] = None
            segments.append((len(slots), tuple(map(wire.packed_run, segment.runs))))
            slots.append(packer.slot(slot, numbered(segment.tensor.file), source))
            crcs.append(slot.crc_offsets)
        made.append(wire.WirePiece(tuple(segments), None if known is None else known.digest))
    stretches = tuple(
        wire.Stretch(packer.number(record.file), record.offset, record.offset + record.nbytes)
        for record in records
    )
    return Packed(tuple(slots), tuple(crcs), tuple(made), stretches)


def inputs(packer: Packer, sources: Sources) -> Inputs:
    """The files that a task reads, and what they were when this run first opened them."""
    known = {}
    for file in packer.files:
        _, inode, size, mtime = sources.open(file.path).identity
        known[file.path] = (str(inode), size, mtime)
    return Inputs(tuple(packer.files), known)


def note_read(
    ledger: Ledger,
    assembly: Assembly,
    piece: Piece,
    noted: Noted | None,
    answer: wire.PieceAnswer,
    files: Sequence[FileRef],
) -> list[PassedRun] | None:
    """Note what was read for a piece; what was read of records, None where the piece was found.

    `noted` is what an interrupted run noted of it, `files` are those that the answer counts.
    """
    ledger.add_bare(_read_for(piece))
    if answer.found and noted is not None:
        ledger.add_noted(noted.read)
        return None
    if noted is not None:
        assembly.differs(piece)
    read = [(files[s.file], s.start, s.stop, crc) for s, crc in answer.read]
    ledger.add_read(read)
    return read


def usable(assembly: Assembly, ledger: Ledger, piece: Piece) -> Noted | None:
    """What an interrupted run noted of a piece, as far as it can be used."""
    noted = assembly.noted(piece)
    return noted if noted is not None and ledger.hold(noted.read) else None


def batches(
    items: Iterator[Item],
    measure: Callable[[Item], tuple[int, int]],
    most: int,
    kind: Callable[[Item], object] = lambda item: None,
) -> Iterator[list[Item]]:
    """What each task is of: one item, or several of one `kind` and of `most` bytes.

    `measure` gives an item's bytes and segments.
    """
    batch: list[Item] = []
    nbytes = segments = 0
    for item in items:
        size, count = measure(item)
        full = nbytes + size > most or segments + count > TASK_SEGMENTS
        if batch and (full or kind(item) != kind(batch[0])):
            yield batch
            batch, nbytes, segments = [], 0, 0
        batch.append(item)
        nbytes += size
        segments += count
    if batch:
        yield batch


def _read_for(piece: Piece) -> Iterator[Extent]:
    """What is read to make a piece."""
    for segment in piece.segments:
        source = wire.narrowed(segment.tensor.slot.source, *wire.reached(segment.runs))
        yield from stored(source.fragments)
