"""Tasks and answers as bytes: msgpack, arrays without the names of fields, each file named once.

A task holds all that its pieces need: where their bytes lie, in the files and in the tensors, and
where they go. A plan of a trillion parameters is 500 MB in memory, and no worker needs it all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
from msgspec import Struct

from reshard.core import dtypes
from reshard.core.arithmetic import LowRank
from reshard.core.plan import Slot
from reshard.core.scaled import Code, Scaled
from reshard.core.tensors import (
    Box,
    Computed,
    Entry,
    Extent,
    FileRef,
    Fragment,
    Fragments,
    Portion,
    Shape,
    TensorSpec,
)
from reshard.storage.requests import Requests
from reshard.transfer.making import SegmentResult
from reshard.transfer.pieces import Run

# Fragments of an entry that are sent as they are, without asking which of them are needed.
_FEW = 8


class WireRun(Struct, frozen=True, array_like=True):
    """A `Run`; its box is over the slot's shape."""

    offsets: Shape
    sizes: Shape
    start: int
    skip: int
    numel: int


class WireFragment(Struct, frozen=True, array_like=True):
    """A `Fragment`; `file` is -1 where `source` computes it."""

    offsets: Shape
    sizes: Shape
    file: int
    offset: int
    nbytes: int
    dtype: str
    strides: Shape | None = None
    source: WireComputed | None = None


class WireEntry(Struct, frozen=True, array_like=True):
    """An `Entry`; its boxes are over the shape `over`."""

    name: str
    dtype: str
    shape: Shape
    over: Shape
    fragments: tuple[WireFragment, ...]


class WireLowRank(Struct, frozen=True, array_like=True, tag="low-rank"):
    """A `LowRank`."""

    base: WireEntry
    left: WireEntry
    right: WireEntry
    scaling: float
    magnitude: WireEntry | None
    by_column: bool


class WireScaled(Struct, frozen=True, array_like=True, tag="scaled"):
    """A `Scaled`."""

    codes: WireEntry
    scales: WireEntry
    block: Shape
    code: Code


WireComputed = WireLowRank | WireScaled


class WireSlot(Struct, frozen=True, array_like=True):
    """A `Slot` of the output file of that number; `crc`: whether its CRC-32 is asked for."""

    output: int
    offset: int
    name: str
    dtype: str
    shape: Shape
    source: WireEntry
    reference: WireEntry | None
    crc: bool


class Output(Struct, frozen=True, array_like=True):
    """A file that is written into: where it lies, which one it is, and its final name."""

    path: str
    inode: int
    nbytes: int
    name: str


class Stretch(Struct, frozen=True, array_like=True):
    """Bytes `[start, stop)` of the source file of that number."""

    file: int
    start: int
    stop: int


class Inputs(Struct, frozen=True, array_like=True):
    """Files that are read, and what they were when the run began: inode, size, mtime, by path.

    An object in a store has a number of 128 bits for an inode: it is spelt out.
    """

    files: tuple[FileRef, ...]
    known: dict[str, tuple[str, int, int]]


class WirePiece(Struct, frozen=True, array_like=True):
    """A piece: its segments, each the number of a slot and runs.

    `noted` is the digest that an interrupted run noted of it: where its bytes have that, they stay.
    """

    segments: tuple[tuple[int, tuple[WireRun, ...]], ...]
    noted: bytes | None = None


class MakeTask(Struct, frozen=True, array_like=True, tag="make"):
    """Make pieces. `records` are stretches of which the CRC-32 of what is read is wanted."""

    inputs: Inputs
    outputs: tuple[Output, ...]
    slots: tuple[WireSlot, ...]
    pieces: tuple[WirePiece, ...]
    records: tuple[Stretch, ...]


class Stored(Struct, frozen=True, array_like=True):
    """A file that is sent to a store, by its name in the output's folder.

    `literals` are the bytes that are known beforehand, by their offsets. `standing` is the tag of
    the object that an interrupted run completed; empty where there is none.
    """

    name: str
    nbytes: int
    literals: tuple[tuple[int, bytes], ...]
    standing: str = ""


class SendTask(Struct, frozen=True, array_like=True, tag="send"):
    """Make whole files, and send them into the folder at a URL.

    Slots of other files than `outputs` have the number -1: what pieces have of them is hashed and
    not written. `crcs` are the places of each slot's CRC-32.
    """

    inputs: Inputs
    folder: str
    outputs: tuple[Stored, ...]
    slots: tuple[WireSlot, ...]
    crcs: tuple[tuple[int, ...], ...]
    pieces: tuple[WirePiece, ...]
    records: tuple[Stretch, ...]


class HashTask(Struct, frozen=True, array_like=True, tag="hash"):
    """Read leaves of tensors and hash them."""

    inputs: Inputs
    leaves: tuple[tuple[WireEntry, int], ...]


class PieceAnswer(Struct, frozen=True, array_like=True):
    """A piece's digest, what its segments showed, and the CRC-32s of what was read of records.

    `found`: its bytes were there.
    """

    digest: bytes
    segments: tuple[SegmentResult, ...]
    read: tuple[tuple[Stretch, int], ...] = ()
    found: bool = False


class MakeAnswer(Struct, frozen=True, array_like=True, tag="made"):
    """What came of each piece. `asked` counts requests to stores, as in all answers."""

    pieces: tuple[PieceAnswer, ...]
    bytes_read: int
    asked: Requests = Requests()


class SendAnswer(Struct, frozen=True, array_like=True, tag="sent"):
    """What came of each piece, and the tag of each file's object."""

    pieces: tuple[PieceAnswer, ...]
    bytes_read: int
    tags: tuple[str, ...]
    asked: Requests = Requests()


class HashAnswer(Struct, frozen=True, array_like=True, tag="hashed"):
    """The digest of each leaf."""

    digests: tuple[bytes, ...]
    asked: Requests = Requests()


class Failure(Struct, frozen=True, array_like=True, tag="failed"):
    """A `ReshardError` by the name of its class in `reshard.errors`."""

    kind: str
    message: str
    path: str | None
    tensor: str | None
    hint: str | None


Task = MakeTask | SendTask | HashTask
Done = MakeAnswer | SendAnswer | HashAnswer
Answer = Done | Failure
_TASKS: msgspec.msgpack.Decoder[Task] = msgspec.msgpack.Decoder(Task)
_ANSWERS: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
encode: Callable[[object], bytes] = msgspec.msgpack.encode
decode_task: Callable[[bytes], Task] = _TASKS.decode
decode_answer: Callable[[bytes], Answer] = _ANSWERS.decode


class Packer:
    """Makes wire forms of entries and numbers the files that they lie in; one for each task."""

    def __init__(self) -> None:
        self.files: dict[FileRef, int] = {}

    def number(self, file: FileRef) -> int:
        """The number of a file."""
        return self.files.setdefault(file, len(self.files))

    def slot(self, slot: Slot, output: int, source: Entry) -> WireSlot:
        """A slot whose source is cut down to `source`."""
        spec = slot.spec
        reference = None if slot.reference is None else self.entry(slot.reference)
        return WireSlot(
            output,
            slot.offset,
            spec.name,
            spec.dtype.name,
            spec.shape,
            self.entry(source),
            reference,
            bool(slot.crcs),
        )

    def entry(self, entry: Entry) -> WireEntry:
        """An entry, with all its fragments."""
        spec = entry.spec
        fragments = tuple(map(self._fragment, entry.fragments))
        return WireEntry(spec.name, spec.dtype.name, spec.shape, entry.over, fragments)

    def _fragment(self, fragment: Fragment) -> WireFragment:
        extent, box = fragment.extent, fragment.box
        stored = isinstance(extent, Extent)
        return WireFragment(
            box.offsets,
            box.sizes,
            self.number(extent.file) if isinstance(extent, Extent) else -1,
            extent.offset,
            extent.nbytes,
            fragment.dtype.name,
            fragment.strides,
            None if stored or isinstance(extent, Extent) else self._computed(extent.source),
        )

    def _computed(self, source: Computed) -> WireComputed:
        if isinstance(source, LowRank):
            return WireLowRank(
                self.entry(source.base),
                self.entry(source.left),
                self.entry(source.right),
                source.scaling,
                None if source.magnitude is None else self.entry(source.magnitude),
                source.by_column,
            )
        if isinstance(source, Scaled):
            codes, scales = self.entry(source.codes), self.entry(source.scales)
            return WireScaled(codes, scales, source.block, source.code)
        raise TypeError(f"{type(source).__name__} has no wire form")


class Unpacker:
    """Makes entries of their wire forms."""

    def __init__(self, files: tuple[FileRef, ...]) -> None:
        self._files = files

    def slot(self, slot: WireSlot) -> Slot:
        """A slot; it asks for a CRC-32 by an offset that stands for any."""
        spec = TensorSpec(slot.name, dtypes.parse(slot.dtype), slot.shape)
        reference = None if slot.reference is None else self.entry(slot.reference)
        return Slot(slot.offset, spec, self.entry(slot.source), (0,) * slot.crc, reference)

    def entry(self, entry: WireEntry) -> Entry:
        spec = TensorSpec(entry.name, dtypes.parse(entry.dtype), entry.shape)
        return Entry(spec, tuple(self._fragment(one, entry.over) for one in entry.fragments))

    def _fragment(self, one: WireFragment, over: Shape) -> Fragment:
        extent: Extent | Portion
        if one.source is None:
            extent = Extent(self._files[one.file], one.offset, one.nbytes)
        else:
            extent = Portion(self._computed(one.source), one.offset, one.nbytes)
        box = Box(over, one.offsets, one.sizes)
        return Fragment(box, extent, dtypes.parse(one.dtype), one.strides)

    def _computed(self, source: WireComputed) -> Computed:
        if isinstance(source, WireLowRank):
            return LowRank(
                self.entry(source.base),
                self.entry(source.left),
                self.entry(source.right),
                source.scaling,
                None if source.magnitude is None else self.entry(source.magnitude),
                source.by_column,
            )
        return Scaled(
            self.entry(source.codes), self.entry(source.scales), source.block, source.code
        )


def packed_run(run: Run) -> WireRun:
    """A run's wire form."""
    return WireRun(run.box.offsets, run.box.sizes, run.start, run.skip, run.numel)


def unpacked_run(run: WireRun, shape: Shape) -> Run:
    """The run of a slot of that shape."""
    return Run(Box(shape, run.offsets, run.sizes), run.start, run.skip, run.numel)


def reached(runs: Iterable[Run]) -> tuple[int, int]:
    """The first flat element that runs read, and the one after their last."""
    starts = [(run.start - run.skip, run.box.numel) for run in runs]
    return min(start for start, _ in starts), max(start + numel for start, numel in starts)


def narrowed(entry: Entry, start: int, stop: int) -> Entry:
    """An entry without fragments that surely hold none of the elements `[start, stop)`.

    A stacked tensor of 1,024 ranks has thousands, and a leaf of it meets a few.
    """
    if isinstance(entry.fragments, Fragments):
        return Entry(entry.spec, tuple(entry.fragments.within(start, stop)))
    if len(entry.fragments) <= _FEW:
        return entry
    over, numel = entry.over, entry.spec.numel
    if over not in (entry.spec.shape, (numel,)) or not over:
        return entry
    row = numel // over[0]
    first, last = start // row, -(-stop // row)
    kept = tuple(
        fragment
        for fragment in entry.fragments
        if fragment.box.offsets[0] < last
        and fragment.box.offsets[0] + fragment.box.sizes[0] > first
    )
    return Entry(entry.spec, kept)
