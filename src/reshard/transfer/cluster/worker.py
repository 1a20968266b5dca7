"""What a worker does with a task: make pieces, or hash leaves. It never imports Ray.

Memory: a maker's (`making`), and the task.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from functools import partial

import xxhash
from msgspec.structs import replace

from reshard._version import __version__
from reshard.core.plan import Slot
from reshard.core.tensors import Extent, Record
from reshard.errors import NotFoundError, ReshardError, UnsupportedError
from reshard.storage.local import Sources
from reshard.transfer.checksums import Ledger
from reshard.transfer.cluster import wire
from reshard.transfer.cluster.outputs import SHARED, Outputs
from reshard.transfer.cluster.wire import (
    Answer,
    Failure,
    HashAnswer,
    HashTask,
    Inputs,
    MakeAnswer,
    MakeTask,
    PieceAnswer,
    Unpacker,
    WirePiece,
    WireRun,
)
from reshard.transfer.making import Maker
from reshard.transfer.pieces import Run
from reshard.transfer.reading import leaf_digest


def work(version: str, task: bytes) -> bytes:
    """Carry out a task of a driver of this version; an answer, or the failure as one."""
    try:
        answer = _answer(version, task)
    except ReshardError as error:
        answer = Failure(type(error).__name__, error.message, error.path, error.tensor, error.hint)
    return wire.encode(answer)


def _answer(version: str, task: bytes) -> Answer:
    if version != __version__:
        raise UnsupportedError(
            f"the worker on {socket.gethostname()} has reshard {__version__}, and this is "
            f"{version}.",
            hint="Install the same version on every node.",
        )
    what = wire.decode_task(task)
    with _opened(what.inputs) as sources:
        try:
            answer = _make(what, sources) if isinstance(what, MakeTask) else _hash(what, sources)
        except NotFoundError as error:  # the driver has seen the file
            host = socket.gethostname()
            raise NotFoundError(
                f"the worker on {host} does not see it: {error.message}",
                path=error.path,
                hint=SHARED,
            ) from None
        sources.check_unchanged()
    return answer


def _opened(inputs: Inputs) -> Sources:
    known = {
        path: (0, int(inode), size, mtime) for path, (inode, size, mtime) in inputs.known.items()
    }
    return Sources(known, elsewhere=True)


def _hash(task: HashTask, sources: Sources) -> HashAnswer:
    unpacker = Unpacker(task.inputs.files)
    digests = [leaf_digest(unpacker.entry(entry), leaf, sources) for entry, leaf in task.leaves]
    return HashAnswer(tuple(digests))


def _make(task: MakeTask, sources: Sources) -> MakeAnswer:
    files = task.inputs.files
    unpacker = Unpacker(files)
    records = [
        Record(Extent(files[one.file], one.start, one.stop - one.start), 0) for one in task.records
    ]
    maker = Maker(sources, Ledger(records))
    slots = tuple(map(unpacker.slot, task.slots))
    numbers = {file: number for number, file in enumerate(files)}
    with Outputs(task.outputs) as outputs:
        pieces = []
        for piece in task.pieces:
            answer = _found(piece, task, slots, maker, outputs)
            if answer is None:
                answer = _made(piece, task, slots, maker, outputs)
            read = tuple(
                (wire.Stretch(numbers[file], start, stop), crc)
                for file, start, stop, crc in maker.read()
            )
            pieces.append(replace(answer, read=read))
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
        made.append(maker.make(slot, _runs(runs, slot), hasher, put))
    return PieceAnswer(hasher.digest(), tuple(made))


def _found(
    piece: WirePiece, task: MakeTask, slots: Sequence[Slot], maker: Maker, outputs: Outputs
) -> PieceAnswer | None:
    """A piece that stands in the output as it was noted; every byte is read and hashed."""
    if piece.noted is None:
        return None
    hasher = xxhash.xxh3_128()
    found = []
    try:
        for number, runs in piece.segments:
            fd = outputs.reading(task.slots[number].output)
            slot = slots[number]
            found.append(maker.find(slot, _runs(runs, slot), hasher, fd))
    except OSError:
        return None
    finally:
        outputs.forget()
    if hasher.digest() != piece.noted:
        return None
    return PieceAnswer(piece.noted, tuple(found), found=True)


def _runs(runs: tuple[WireRun, ...], slot: Slot) -> list[Run]:
    return [wire.unpacked_run(run, slot.spec.shape) for run in runs]
