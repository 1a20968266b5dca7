"""What a worker does with a task: make pieces, or hash leaves. It never imports Ray.

Files of the output are made by the driver and only written into, for writing alone and at other
bytes than anyone else's: so workers on several machines may share a page of a network file system
that has no locks, and nothing is left behind wherever a worker ends. Making a piece again writes
the same bytes to the same place.

Memory: a maker's (`making`), and the task.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import suppress
from functools import partial

import xxhash

from reshard._version import __version__
from reshard.core.tensors import Extent, FileRef, Record
from reshard.errors import NotFoundError, ReshardError, UnsupportedError, WriteError
from reshard.storage.local import Sources
from reshard.transfer.checksums import Ledger
from reshard.transfer.cluster import wire
from reshard.transfer.cluster.wire import (
    Answer,
    Failure,
    HashAnswer,
    HashTask,
    Inputs,
    MakeAnswer,
    MakeTask,
    Output,
    SegmentAnswer,
    Unpacker,
)
from reshard.transfer.making import Maker, SegmentResult
from reshard.transfer.reading import leaf_digest
from reshard.transfer.system import SharedFile

_SHARED = "Source, base and output must lie on storage that every node has under the same path."


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
                hint=_SHARED,
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
    slots = [unpacker.slot(slot) for slot in task.slots]
    ledger = Ledger(
        [
            Record(Extent(files[one.file], one.start, one.stop - one.start), 0)
            for one in task.records
        ],
        [Extent(files[one.file], one.start, one.stop - one.start) for one in task.bare],
    )
    maker = Maker(sources, ledger)
    pieces = []
    with _Outputs(task.outputs) as outputs:
        for segments in task.pieces:
            hasher = xxhash.xxh3_128()
            answers = []
            for number, runs in segments:
                slot = slots[number]
                made = maker.make(
                    slot,
                    [wire.unpacked_run(run, slot.spec.shape) for run in runs],
                    hasher,
                    partial(outputs.put, task.slots[number].output),
                )
                answers.append(_stated(made))
            pieces.append((hasher.digest(), tuple(answers)))
        outputs.sync()
    return MakeAnswer(tuple(pieces), maker.bytes_read, _read(ledger, files))


def _stated(made: SegmentResult) -> SegmentAnswer:
    nan, infinite = made.special.nan, made.special.infinite
    return SegmentAnswer(made.nbytes, made.crc, made.changed, nan, infinite)


def _read(
    ledger: Ledger, files: tuple[FileRef, ...]
) -> tuple[tuple[wire.Stretch, int | None], ...]:
    """What was read, as the answer says it."""
    numbers: Mapping[FileRef, int] = {file: number for number, file in enumerate(files)}
    return tuple(
        (wire.Stretch(numbers[one.file], one.start, one.stop), one.crc) for one in ledger.passed()
    )


class _Outputs:
    """The files of a task that are written into, each opened when it is needed."""

    def __init__(self, outputs: tuple[Output, ...]) -> None:
        self._outputs = outputs
        self._open: dict[int, SharedFile] = {}

    def put(self, number: int, data: memoryview, offset: int) -> None:
        """Write into a file. Raises `WriteError`."""
        output = self._outputs[number]
        try:
            if number not in self._open:
                self._open[number] = SharedFile(output.path)
                self._check(output, self._open[number])
            self._open[number].put(data, offset)
        except OSError as error:
            raise self._cannot(output, error) from None

    def sync(self) -> None:
        """Make what was written durable, and visible to other nodes. Raises `WriteError`."""
        for number, file in self._open.items():
            try:
                file.sync()
            except OSError as error:
                raise self._cannot(self._outputs[number], error) from None

    def __enter__(self) -> _Outputs:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._open.values():
            with suppress(OSError):
                file.close()

    def _check(self, output: Output, file: SharedFile) -> None:
        """It must be the file that the driver made, and not another of its name."""
        if (file.inode, file.nbytes) != (output.inode, output.nbytes):
            raise WriteError(
                f"on {socket.gethostname()} another file lies there than the one that was made.",
                path=output.name,
                hint=_SHARED,
            )

    def _cannot(self, output: Output, error: OSError) -> WriteError:
        reason = error.strerror or error
        if isinstance(error, FileNotFoundError):
            return WriteError(
                f"the worker on {socket.gethostname()} does not see it: {reason}.",
                path=output.name,
                hint=_SHARED,
            )
        return WriteError(f"it cannot be written: {reason}.", path=output.name)
