"""The engine: fills the slots of a plan from the checkpoint, in small blocks, with a few threads.

Blocks are taken in output order, so files are written front to back. Each thread holds one block
and one scratch buffer; no tensor is ever held whole. Bytes of one tensor are hashed in order: a
thread whose block comes early waits for its turn, which the thread before it is already filling.
A tensor written in several slots, one after another, has one hash over all of them.

Memory: threads * (_BLOCK + _SCRATCH) bytes, four times that for tensors stored in another order.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import xxhash
from msgspec import Struct, field
from zlib_ng import zlib_ng

from reshard.core.findings import Finding
from reshard.core.plan import OutputFile, Plan, Slot
from reshard.core.tensors import Box, blocks, flat
from reshard.errors import VerificationError
from reshard.progress import Progress
from reshard.storage.local import Sources
from reshard.transfer.checksums import Checked, Ledger
from reshard.transfer.commit import OutputFolder
from reshard.transfer.fill import Array, Reader, fill, page_aligned
from reshard.transfer.finite import NotFinite, not_finite
from reshard.transfer.writeback import Writeback

# Bytes of an output block. 4 MiB of source and target stay in a core's cache; twice as much is no
# faster, half as much costs 10% in calls.
_BLOCK = 4 << 20
# A tensor stored in another order is read over and over, once a block: fewer, larger blocks.
_STRIDED_BLOCK = 4 * _BLOCK
_SCRATCH = 2 * _BLOCK

# Elements first compared with the base model's, and at most: each piece that is equal makes the
# next twice as large. More at once would leave the core's cache.
_COMPARED, _MOST_COMPARED = 16 << 10, 128 << 10


class Outcome(Struct, frozen=True):
    """What the engine did.

    `digests` are the xxh3-128 of each tensor's row-major bytes, by part and name. `checked` counts
    the checksums of the source that were compared, and the stretches without. `not_finite` are
    tensors that hold NaN or infinity, by part and name. `changed` counts the slots whose values
    differ from their reference, of `compared`. `findings` say what happened to what earlier runs
    left, and to the output that was replaced.
    """

    digests: Mapping[tuple[str, str], str]
    bytes_read: int
    checked: Checked
    compared: int
    changed: int
    not_finite: Mapping[tuple[str, str], NotFinite] = {}
    findings: tuple[Finding, ...] = ()


# In place of the hasher of a tensor that is done.
_SPENT = xxhash.xxh3_128()


class _Digest(Struct):
    """The hash of a tensor on its way, over all its slots: `hashed` of `taken` blocks are in.

    Once all blocks are taken (`complete`) and in, the hasher, of 600 bytes, makes way for `text`.
    """

    hasher: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)
    taken: int = 0
    hashed: int = 0
    complete: bool = False
    text: str = ""

    def settle(self) -> None:
        """Call with the engine's turn held."""
        if self.complete and self.hashed == self.taken:
            self.text = self.hasher.hexdigest()
            self.hasher = _SPENT


class _Tensor(Struct):
    """A slot on its way; `changed` once it differs from its reference."""

    slot: Slot
    file: _File
    digest: _Digest
    crc: int = 0
    changed: bool = False


class _File(Struct):
    """An output file on its way: sealed by whichever thread finishes its last block."""

    output: OutputFile
    fd: int
    pending: int


class _Task(Struct, frozen=True):
    """A block of a slot: the elements of `box`, from flat element `start` on.

    `turn` is its place in the hash of its tensor.
    """

    tensor: _Tensor
    turn: int
    box: Box
    start: int


class _StoppedError(Exception):
    """Another thread failed; this one ends quietly."""


class Engine:
    """One transfer. `progress` is called with (bytes written, bytes to write) after each block."""

    def __init__(
        self,
        plan: Plan,
        sources: Sources,
        ledger: Ledger,
        folder: OutputFolder,
        *,
        threads: int,
        progress: Progress | None = None,
    ) -> None:
        self._plan = plan
        self._sources = sources
        self._ledger = ledger
        self._folder = folder
        self._threads = threads
        self._progress = progress
        self._total = sum(slot.spec.nbytes for slot in plan.slots())
        self._written = 0
        self._compared: list[_Tensor] = []
        self._digests: dict[tuple[str, str], _Digest] = {}
        self._not_finite: dict[tuple[str, str], NotFinite] = {}
        self._tasks = self._make_tasks()
        self._taking = threading.Lock()
        self._counting = threading.Lock()
        self._turn = threading.Condition()
        self._stop = threading.Event()
        self._writeback = Writeback()

    def run(self) -> Outcome:
        """Write every file of the plan into the folder, synced and named."""
        with (
            self._writeback,
            ThreadPoolExecutor(self._threads, thread_name_prefix="reshard") as pool,
        ):
            try:
                futures = [pool.submit(self._work) for _ in range(self._threads)]
                wait(futures)
            except BaseException:
                # Ctrl-C: the pool waits for its threads, so they must end first.
                self._halt()
                raise
        failures = [failure for future in futures if (failure := future.exception())]
        for failure in sorted(failures, key=lambda failure: isinstance(failure, _StoppedError)):
            raise failure
        return Outcome(
            digests={name: digest.text for name, digest in self._digests.items()},
            bytes_read=sum(future.result() for future in futures),
            checked=self._ledger.check(self._sources),
            compared=len(self._compared),
            changed=sum(tensor.changed for tensor in self._compared),
            not_finite={
                key: self._not_finite[key] for key in self._digests if key in self._not_finite
            },
        )

    def _work(self) -> int:
        """Take blocks until there are none; returns the bytes read."""
        scratch = page_aligned(_SCRATCH).data
        reader = Reader(self._sources, self._ledger, scratch)
        # The base model's bytes have no checksums and are not counted.
        references = Reader(self._sources, Ledger(()), scratch)
        buffer = page_aligned(_BLOCK)
        try:
            while (task := self._take()) is not None:
                nbytes = task.box.numel * task.tensor.slot.spec.dtype.itemsize
                if nbytes > len(buffer):
                    buffer = page_aligned(_STRIDED_BLOCK)
                self._move(task, buffer[:nbytes], reader, references)
        except BaseException:
            self._halt()
            raise
        return reader.bytes_read

    def _take(self) -> _Task | None:
        if self._stop.is_set():
            raise _StoppedError
        with self._taking:
            return next(self._tasks, None)

    def _make_tasks(self) -> Iterator[_Task]:
        """Every block of every slot, in output order; each file is made as its turn comes."""
        digest = _Digest()
        for output in self._plan.files:
            file = _File(output, self._folder.create(output.name, output.nbytes), 1)
            for offset, literal in output.literals:
                self._put(file, memoryview(literal), offset)
            for slot in output.slots:
                key = (output.part, slot.spec.name)
                if key not in self._digests:
                    self._complete(digest)
                    digest = self._digests[key] = _Digest()
                tensor = _Tensor(slot, file, digest)
                if slot.reference is not None:
                    self._compared.append(tensor)
                if not slot.spec.numel:
                    self._write_crc(tensor)
                yield from self._blocks(tensor)
            self._release(file)
        self._complete(digest)

    def _complete(self, digest: _Digest) -> None:
        """Note that a tensor has no more slots; those that it has follow each other."""
        with self._turn:
            digest.complete = True
            digest.settle()

    def _blocks(self, tensor: _Tensor) -> Iterator[_Task]:
        spec = tensor.slot.spec
        strided = any(fragment.strides for fragment in tensor.slot.source.fragments)
        limit = (_STRIDED_BLOCK if strided else _BLOCK) // spec.dtype.itemsize
        start = 0
        for box in blocks(spec.shape, limit):
            with self._counting:
                tensor.file.pending += 1
            yield _Task(tensor, tensor.digest.taken, box, start)
            tensor.digest.taken += 1
            start += box.numel

    def _move(self, task: _Task, raw: Array, reader: Reader, references: Reader) -> None:
        """One block: read and cast, compare, write, and hash when its turn comes."""
        tensor = task.tensor
        slot = tensor.slot
        fill(slot.source, task.box, raw.view(slot.spec.dtype.numpy), reader)
        special = not_finite(raw, slot.spec.dtype)
        if special:
            key = (tensor.file.output.part, slot.spec.name)
            with self._counting:
                self._not_finite[key] = self._not_finite.get(key, NotFinite()) + special
        if slot.reference is not None and not tensor.changed:
            tensor.changed = differs(slot, task.start, raw, references)
        start = task.start * slot.spec.dtype.itemsize
        self._put(tensor.file, raw.data, slot.offset + start)
        with self._turn:
            self._turn.wait_for(lambda: tensor.digest.hashed == task.turn or self._stop.is_set())
            if self._stop.is_set():
                raise _StoppedError
        # Only the thread whose turn it is comes here; the others may go on meanwhile.
        tensor.digest.hasher.update(raw.data)
        if slot.crc_offsets:
            tensor.crc = zlib_ng.crc32(raw.data, tensor.crc)
            if start + len(raw) == slot.spec.nbytes:
                self._write_crc(tensor)
        with self._turn:
            tensor.digest.hashed += 1
            tensor.digest.settle()
            self._turn.notify_all()
        self._count(len(raw))
        self._release(tensor.file)

    def _write_crc(self, tensor: _Tensor) -> None:
        for offset in tensor.slot.crc_offsets:
            self._put(tensor.file, memoryview(tensor.crc.to_bytes(4, "little")), offset)

    def _put(self, file: _File, data: memoryview, offset: int) -> None:
        self._folder.put(file.output.name, file.fd, data, offset)
        self._writeback.wrote(file.fd, len(data))

    def _count(self, nbytes: int) -> None:
        with self._counting:
            self._written += nbytes
            if self._progress is not None:
                self._progress(self._written, self._total)

    def _release(self, file: _File) -> None:
        """Let go of a file; whoever is last syncs it and gives it its name."""
        with self._counting:
            file.pending -= 1
            last = file.pending == 0
        if last:
            self._folder.seal(file.output.name, file.fd)

    def _halt(self) -> None:
        self._stop.set()
        with self._turn:
            self._turn.notify_all()


def differs(slot: Slot, start: int, raw: Array, reader: Reader) -> bool:
    """Whether a block differs from the same elements of the slot's reference.

    The reference has flat boxes. Compares piece by piece and stops at the first difference, so
    that a trained tensor costs one small read of the base model, and a frozen one few.
    """
    if slot.reference is None:
        return False
    target = slot.spec.dtype.numpy
    values = raw.view(target)
    numel = slot.spec.numel
    buffer = np.empty(min(len(values), _MOST_COMPARED), target)
    at, count = 0, _COMPARED
    while at < len(values):
        part = values[at : at + count]
        other = buffer[: len(part)]
        try:
            fill(slot.reference, flat(numel, start + at, len(part)), other, reader)
        except VerificationError:
            # The reference has a value beyond the range of `target`; the block has none.
            return True
        if part.tobytes() != other.tobytes():
            return True
        at, count = at + count, min(2 * count, _MOST_COMPARED)
    return False
