"""What a worker does with a task: make pieces, or hash leaves. It never imports Ray.

Memory: a maker's (`making`), and the task.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from functools import partial

import xxhash
from msgspec.structs import replace

from reshard import errors
from reshard._version import __version__
from reshard.core.plan import Slot
from reshard.core.tensors import Extent, Record
from reshard.errors import NotFoundError, ReshardError, UnsupportedError
from reshard.storage import requests
from reshard.storage.local import Sources
from reshard.transfer.checksums import Ledger
from reshard.transfer.cluster import wire
from reshard.transfer.cluster.outputs import SHARED, Outputs
from reshard.transfer.cluster.wire import (
    Answer,
    Done,
    Failure,
    HashAnswer,
    HashTask,
    Inputs,
    MakeAnswer,
    MakeTask,
    PieceAnswer,
    SendTask,
    Stretch,
    Task,
    Unpacker,
    WirePiece,
    WireRun,
    WireSlot,
)
from reshard.transfer.making import Maker
from reshard.transfer.pieces import Run
from reshard.transfer.reading import leaf_digest
from reshard.transfer.system import read_fully


def work(version: str, task: bytes) -> bytes:
    """Carry out a task of a driver of this version; an answer, or the failure as one."""
    before = requests.total()
    try:
        answer: Answer = replace(_answer(version, task), asked=requests.total() - before)
    except ReshardError as error:
        kind = _kind(type(error))
        answer = Failure(kind, error.message, error.path, error.tensor, error.hint)
    return wire.encode(answer)


def _kind(kind: type[ReshardError]) -> str:
    """The name by which the driver finds an error's class: its own, or the nearest above it."""
    return next(one.__name__ for one in kind.__mro__ if one.__module__ == errors.__name__)


def _answer(version: str, task: bytes) -> Done:
    if version != __version__:
        raise UnsupportedError(
            f"the worker on {socket.gethostname()} has reshard {__version__}, and this is "
            f"{version}.",
            hint="Install the same version on every node.",
        )
    what = wire.decode_task(task)
    with _opened(what.inputs) as sources:
        try:
            answer = _done(what, sources)
        except NotFoundError as error:  # the driver has seen the file
            host = socket.gethostname()
            raise NotFoundError(
                f"the worker on {host} does not see it: {error.message}",
                path=error.path,
                hint=SHARED,
            ) from None
        sources.check_unchanged()
    return answer


def _done(task: Task, sources: Sources) -> Done:
    if isinstance(task, MakeTask):
        return _make(task, sources)
    if isinstance(task, SendTask):
        from reshard.transfer.cluster.sender import send

        return send(task, sources)
    return _hash(task, sources)


def _opened(inputs: Inputs) -> Sources:
    known = {
        path: (0, int(inode), size, mtime) for path, (inode, size, mtime) in inputs.known.items()
    }
    return Sources(known, elsewhere=True)


def _hash(task: HashTask, sources: Sources) -> HashAnswer:
    unpacker = Unpacker(task.inputs.files)
    digests = [leaf_digest(unpacker.entry(entry), leaf, sources) for entry, leaf in task.leaves]
    return HashAnswer(tuple(digests))


class Work:
    """What making the pieces of a task takes."""

    def __init__(
        self,
        inputs: Inputs,
        slots: Sequence[WireSlot],
        records: Sequence[Stretch],
        sources: Sources,
    ) -> None:
        files = inputs.files
        unpacker = Unpacker(files)
        stated = (Record(Extent(files[r.file], r.start, r.stop - r.start), 0) for r in records)
        self.maker = Maker(sources, Ledger(stated))
        self.slots = tuple(map(unpacker.slot, slots))
        self._numbers = {file: number for number, file in enumerate(files)}

    def read(self) -> tuple[tuple[Stretch, int], ...]:
        """What was read of records since this was last called, and its CRC-32s."""
        return tuple(
            (Stretch(self._numbers[file], start, stop), crc)
            for file, start, stop, crc in self.maker.read()
        )


def _make(task: MakeTask, sources: Sources) -> MakeAnswer:
    work = Work(task.inputs, task.slots, task.records, sources)
    maker, slots = work.maker, work.slots
    with Outputs(task.outputs) as outputs:
        pieces = []
        for piece in task.pieces:
            answer = _found(piece, task, slots, maker, outputs)
            if answer is None:
                answer = _made(piece, task, slots, maker, outputs)
            pieces.append(replace(answer, read=work.read()))
        outputs.sync()
    return MakeAnswer(tuple(pieces), maker.bytes_read)


def _made(
    piece: WirePiece, task: MakeTask, slots: Sequence[Slot], maker: Maker, outputs: Outputs
) -> PieceAnswer:
    """Make a piece."""
    hasher = xxhash.xxh3_128()
    made = []
    for number, runs in piece.segments:
        put = partial(outputs.put, task.slots[number].output)
        slot = slots[number]
        made.append(maker.make(slot, unpacked(runs, slot), hasher, put))
    return PieceAnswer(hasher.digest(), tuple(made))


def _found(
    piece: WirePiece, task: MakeTask, slots: Sequence[Slot], maker: Maker, outputs: Outputs
) -> PieceAnswer | None:
    """A piece that stands in the output as it was noted; every byte is read and hashed."""
    if piece.noted is None:
        return None
    hasher = xxhash.xxh3_128()
    results = []
    try:
        for number, runs in piece.segments:
            read = partial(read_fully, outputs.reading(task.slots[number].output))
            slot = slots[number]
            results.append(maker.find(slot, unpacked(runs, slot), hasher, read))
    except OSError:
        return None
    finally:
        outputs.forget()
    if hasher.digest() != piece.noted:
        return None
    return PieceAnswer(piece.noted, tuple(results), found=True)


def unpacked(runs: tuple[WireRun, ...], slot: Slot) -> list[Run]:
    """The runs of a slot."""
    return [wire.unpacked_run(run, slot.spec.shape) for run in runs]
