"""What a worker does with a task whose output is in a store: make whole files, and send them.

A file is made front to back, as an upload takes it (`transfer.sending`). One that an interrupted
run completed is read and compared instead; where it is not what was noted, the task's files are
made anew. A worker that is lost leaves an upload that nobody sees, and the driver has it ended.

Memory: a maker's (`making`), and that of one upload and of those that are not yet whole.
"""

from __future__ import annotations

from functools import partial

import xxhash
from msgspec.structs import replace
from zlib_ng import zlib_ng

from reshard.core.locations import RemotePath, located
from reshard.core.plan import Slot
from reshard.storage.local import Sources
from reshard.storage.stores import Object
from reshard.transfer.cluster.wire import PieceAnswer, SendAnswer, SendTask, WirePiece, WireRun
from reshard.transfer.cluster.worker import Work, unpacked
from reshard.transfer.making import SegmentResult
from reshard.transfer.sending import DiffersError, Sending


def send(task: SendTask, sources: Sources) -> SendAnswer:
    """Carry out a task. Raises what making and writing raise."""
    try:
        return _Attempt(task, sources).run()
    except DiffersError:
        anew = tuple(replace(output, standing="") for output in task.outputs)
        return _Attempt(replace(task, outputs=anew), sources).run()


class _Attempt:
    """One way through the files of a task, in their order."""

    def __init__(self, task: SendTask, sources: Sources) -> None:
        folder = located(task.folder)
        if not isinstance(folder, RemotePath):
            raise TypeError(f"{task.folder} is not a URL")
        self._task = task
        self._work = Work(task.inputs, task.slots, task.records, sources)
        self._sending = Sending(folder)
        self._output = -1
        self._number = -1
        # The slot that is being made, and the CRC-32 of what is made of it.
        self._slot = -1
        self._crc = 0

    def run(self) -> SendAnswer:
        try:
            pieces = [self._piece(piece) for piece in self._task.pieces]
            self._turn(len(self._task.outputs))
            self._sending.settle()
        finally:
            self._sending.close()
        tags = tuple(self._sending.made[output.name].tag for output in self._task.outputs)
        return SendAnswer(tuple(pieces), self._work.maker.bytes_read, tags)

    def _piece(self, piece: WirePiece) -> PieceAnswer:
        hasher = xxhash.xxh3_128()
        made = [self._segment(number, runs, hasher) for number, runs in piece.segments]
        standing = [
            self._task.outputs[output].standing
            for number, _ in piece.segments
            if (output := self._task.slots[number].output) >= 0
        ]
        found = piece.noted is not None and all(standing)
        if found and hasher.digest() != piece.noted:
            raise DiffersError("what an interrupted run left is not what it noted.")
        return PieceAnswer(hasher.digest(), tuple(made), self._work.read(), found)

    def _segment(
        self, number: int, runs: tuple[WireRun, ...], hasher: xxhash.xxh3_128
    ) -> SegmentResult:
        """Make what a piece has of a slot, or find it in a file that stands."""
        slot, output = self._work.slots[number], self._task.slots[number].output
        maker = self._work.maker
        if output < 0:  # another task's
            return maker.make(slot, unpacked(runs, slot), hasher, lambda data, offset: None)
        self._turn(output)
        if self._slot < 0 or self._at(self._slot) != self._at(number):
            self._end_slot()
            self._slot = number
        standing = self._sending.standing(self._number)
        if standing is not None:
            made = maker.find(slot, unpacked(runs, slot), hasher, standing.read_all)
        else:
            put = partial(self._sending.put, self._number)
            made = maker.make(slot, unpacked(runs, slot), hasher, put)
        self._crc = zlib_ng.crc32_combine(self._crc, made.crc, made.nbytes)
        return made

    def _at(self, number: int) -> tuple[int, int]:
        """Which slot it is: its file, and its place there."""
        slot: Slot = self._work.slots[number]
        return self._task.slots[number].output, slot.offset

    def _end_slot(self) -> None:
        """Write the CRC-32 of the slot that is complete."""
        if self._slot >= 0:
            data = memoryview(self._crc.to_bytes(4, "little"))
            for offset in self._task.crcs[self._slot]:
                self._sending.put(self._number, data, offset, known=True)
        self._slot, self._crc = -1, 0

    def _turn(self, output: int) -> None:
        """Complete the files before this one, and begin it."""
        while self._output < output:
            if self._output >= 0:
                self._end_slot()
                self._sending.seal(self._number)
            self._output += 1
            if self._output == len(self._task.outputs):
                return
            file = self._task.outputs[self._output]
            known = Object(file.nbytes, file.standing) if file.standing else None
            self._number = self._sending.create(file.name, file.nbytes, known)
            for offset, literal in file.literals:
                self._sending.put(self._number, memoryview(literal), offset, known=True)
