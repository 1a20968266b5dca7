"""What pieces need of the plan, in the form in which workers get it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from msgspec import Struct

from reshard.core.tensors import Extent, stored
from reshard.storage.local import Sources
from reshard.transfer.assembly import File, Noted, Piece
from reshard.transfer.checksums import Ledger
from reshard.transfer.cluster import wire
from reshard.transfer.cluster.wire import Inputs, Packer


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


def read_for(piece: Piece) -> Iterator[Extent]:
    """What is read to make a piece."""
    for segment in piece.segments:
        source = wire.narrowed(segment.tensor.slot.source, *wire.reached(segment.runs))
        yield from stored(source.fragments)
