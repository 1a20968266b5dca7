"""The engine: fills the slots of a plan from the checkpoint, piece by piece, in a few threads.

Pieces (`pieces`) are taken in output order, so files are written front to back. One thread makes a
piece, in small blocks: reads, casts, writes, hashes. A thread waits for another only while both
write into one file; no tensor is ever held as a whole.

Memory: threads * (_BLOCK + _SCRATCH) bytes, four times that for tensors stored in another order.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait

import xxhash
from msgspec import Struct, field
from zlib_ng import zlib_ng

from reshard.core.digests import joined
from reshard.core.findings import Finding
from reshard.core.plan import OutputFile, Plan, Slot
from reshard.progress import Progress
from reshard.storage.local import Sources
from reshard.transfer.changes import differs
from reshard.transfer.checksums import Checked, Ledger
from reshard.transfer.commit import OutputFolder
from reshard.transfer.fill import Array, Reader, fill, page_aligned
from reshard.transfer.finite import NotFinite, not_finite
from reshard.transfer.pieces import Run, runs
from reshard.transfer.readback import ReadBack, ReadJob, Stretch
from reshard.transfer.reading import Known
from reshard.transfer.writeback import Writeback

# Bytes of an output block. 4 MiB of source and output stay in a core's cache; twice as much is no
# faster, half as much costs 10% in calls.
_BLOCK = 4 << 20
# A tensor stored in another order is read over and over, once a block: fewer, larger blocks.
_STRIDED_BLOCK = 4 * _BLOCK
_SCRATCH = 2 * _BLOCK


class Outcome(Struct, frozen=True):
    """What the engine did.

    `digests` are those of each tensor (`core.digests`), by part and name. `checked` counts the
    checksums of the source that were compared, and the stretches without. `not_finite` are tensors
    that hold NaN or infinity, by part and name. `changed` counts the slots whose values differ from
    their reference, of `compared`. `findings` say what happened to what earlier runs left, and to
    the output that was replaced. `read_back` are digests of bytes of the written files, read from
    them again.
    """

    digests: Mapping[tuple[str, str], str]
    bytes_read: int
    checked: Checked
    compared: int
    changed: int
    not_finite: Mapping[tuple[str, str], NotFinite] = {}
    findings: tuple[Finding, ...] = ()
    read_back: Known = field(default_factory=dict)


class _Digest(Struct):
    """A tensor's digest on its way: those of its leaves. Most tensors have one leaf."""

    first: bytes = b""
    others: dict[int, bytes] | None = None

    def put(self, leaf: int, digest: bytes) -> None:
        """Note a leaf's digest; call with the engine's lock held."""
        if leaf == 0:
            self.first = digest
        elif self.others is None:
            self.others = {leaf: digest}
        else:
            self.others[leaf] = digest

    def text(self) -> str:
        """The digest, once all leaves are in."""
        others = self.others or {}
        first = [self.first] if self.first else []
        return joined([*first, *(others[leaf] for leaf in sorted(others))])


class _File(Struct):
    """An output file on its way: sealed by whichever thread finishes its last part."""

    output: OutputFile
    fd: int
    pending: int


class _Tensor(Struct):
    """A slot on its way; `changed` once it differs from its reference.

    `crcs` are the CRC-32 and size of the parts that are written, by their first element; `pending`
    parts are not, and more may come until `complete`.
    """

    slot: Slot
    file: _File
    crcs: dict[int, tuple[int, int]] = field(default_factory=dict)
    pending: int = 0
    complete: bool = False
    changed: bool = False


class _Part(Struct, frozen=True):
    """What a piece has of one slot."""

    tensor: _Tensor
    runs: list[Run]


class _Piece(Struct, frozen=True):
    """A leaf of a tensor's digest, and where its bytes go."""

    digest: _Digest
    leaf: int
    parts: list[_Part] = field(default_factory=list)


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
        read_back: bool = False,
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
        self._pieces = self._cut()
        self._taking = threading.Condition()
        self._making = 0
        self._back = ReadBack() if read_back else None
        self._counting = threading.Lock()
        self._stop = threading.Event()
        self._writeback = Writeback()

    def run(self) -> Outcome:
        """Write every file of the plan into the folder, synced and named."""
        with (
            self._writeback,
            ThreadPoolExecutor(self._threads, thread_name_prefix="reshard") as pool,
        ):
            futures: list[Future[int]] = []
            try:
                for _ in range(self._threads):
                    futures.append(pool.submit(self._work))
                wait(futures)
            except BaseException:
                # Ctrl-C: the pool waits for its threads, so they must end first.
                self._halt()
                raise
            finally:
                if self._back is not None:
                    wait(futures)
                    self._back.close()
        failures = [failure for future in futures if (failure := future.exception())]
        for failure in sorted(failures, key=lambda failure: isinstance(failure, _StoppedError)):
            raise failure
        return Outcome(
            digests={name: digest.text() for name, digest in self._digests.items()},
            bytes_read=sum(future.result() for future in futures),
            checked=self._ledger.check(self._sources),
            compared=len(self._compared),
            changed=sum(tensor.changed for tensor in self._compared),
            not_finite={
                key: self._not_finite[key] for key in self._digests if key in self._not_finite
            },
            read_back={} if self._back is None else self._back.found,
        )

    def _work(self) -> int:
        """Take pieces until there are none; returns the bytes read."""
        scratch = page_aligned(_SCRATCH).data
        reader = Reader(self._sources, self._ledger, scratch)
        # The base model's bytes have no checksums and are not counted.
        references = Reader(self._sources, Ledger(()), scratch)
        buffer = page_aligned(_BLOCK)
        try:
            while (piece := self._take()) is not None:
                if isinstance(piece, ReadJob):
                    piece.read(buffer)
                    continue
                hasher = xxhash.xxh3_128()
                for part in piece.parts:
                    if _strided(part.tensor.slot) and len(buffer) < _STRIDED_BLOCK:
                        buffer = page_aligned(_STRIDED_BLOCK)
                    self._make(part, hasher, buffer, reader, references)
                with self._counting:
                    piece.digest.put(piece.leaf, hasher.digest())
                self._made()
        except BaseException:
            self._halt()
            raise
        return reader.bytes_read

    def _take(self) -> _Piece | ReadJob | None:
        """Written bytes are read back first, while they are cached; None where all is done.

        A thread that finds nothing while others still make pieces waits: there will be more to
        read.
        """
        with self._taking:
            while True:
                if self._stop.is_set():
                    raise _StoppedError
                job = None if self._back is None else self._back.take()
                if job is not None:
                    return job
                piece = next(self._pieces, None)
                if piece is not None:
                    self._making += 1
                    return piece
                if not self._making or self._back is None:
                    return None
                self._taking.wait()

    def _made(self) -> None:
        """That a piece is done."""
        with self._taking:
            self._making -= 1
            self._taking.notify_all()

    def _halt(self) -> None:
        """Let everybody end."""
        self._stop.set()
        with self._taking:
            self._taking.notify_all()

    def _cut(self) -> Iterator[_Piece]:
        """Every piece, in output order; each file is made as its turn comes."""
        piece: _Piece | None = None
        before = 0
        for output in self._plan.files:
            file = _File(output, self._folder.create(output.name, output.nbytes), 1)
            for offset, literal in output.literals:
                self._put(file, memoryview(literal), offset)
            for slot in output.slots:
                key = (output.part, slot.spec.name)
                if key not in self._digests:  # the slots of one tensor follow each other
                    self._digests[key] = _Digest()
                    before = 0
                digest = self._digests[key]
                tensor = _Tensor(slot, file)
                if slot.reference is not None:
                    self._compared.append(tensor)
                for leaf, run in runs(slot, before, _block(slot)):
                    if piece is None or piece.digest is not digest or piece.leaf != leaf:
                        if piece is not None:
                            self._note(piece)
                            yield piece
                        piece = _Piece(digest, leaf)
                    self._add(piece, tensor, run)
                before += slot.spec.numel
                self._complete(tensor)
            self._release(file)
        if piece is not None:
            self._note(piece)
            yield piece

    def _note(self, piece: _Piece) -> None:
        """Have a piece read again later, if it is one stretch of a file."""
        if self._back is None or len(piece.parts) != 1:
            return
        (part,) = piece.parts
        file, slot = part.tensor.file, part.tensor.slot
        first, last = part.runs[0], part.runs[-1]
        itemsize = slot.spec.dtype.itemsize
        path = os.fspath(self._folder.partial / file.output.name)
        offset = slot.offset + first.start * itemsize
        nbytes = (last.start + last.numel - first.start) * itemsize
        self._back.note(file.fd, Stretch(path, offset, nbytes))

    def _add(self, piece: _Piece, tensor: _Tensor, run: Run) -> None:
        """Note a run in its piece; parts are counted before anyone can finish them."""
        if not piece.parts or piece.parts[-1].tensor is not tensor:
            piece.parts.append(_Part(tensor, []))
            with self._counting:
                tensor.pending += 1
                tensor.file.pending += 1
        piece.parts[-1].runs.append(run)

    def _complete(self, tensor: _Tensor) -> None:
        """Note that no more parts of a slot will come."""
        with self._counting:
            tensor.complete = True
            last = not tensor.pending
        if last:
            self._write_crc(tensor)

    def _make(
        self,
        part: _Part,
        hasher: xxhash.xxh3_128,
        buffer: Array,
        reader: Reader,
        references: Reader,
    ) -> None:
        """What a piece has of a slot, run by run: read and cast, compare, write, hash."""
        tensor = part.tensor
        slot = tensor.slot
        itemsize = slot.spec.dtype.itemsize
        crc = nbytes = 0
        for run in part.runs:
            if self._stop.is_set():
                raise _StoppedError
            whole = buffer[: run.box.numel * itemsize]
            fill(slot.source, run.box, whole.view(slot.spec.dtype.numpy), reader)
            raw = whole[run.skip * itemsize : (run.skip + run.numel) * itemsize]
            self._look(tensor, raw)
            if slot.reference is not None and not tensor.changed:
                tensor.changed = differs(slot, run.start, raw, references)
            self._put(tensor.file, raw.data, slot.offset + run.start * itemsize)
            hasher.update(raw.data)
            if slot.crc_offsets:
                crc = zlib_ng.crc32(raw.data, crc)
            nbytes += len(raw)
            self._count(len(raw))
        with self._counting:
            if slot.crc_offsets:
                tensor.crcs[part.runs[0].start] = crc, nbytes
            tensor.pending -= 1
            last = tensor.complete and not tensor.pending
        if last:
            self._write_crc(tensor)
        self._release(tensor.file)

    def _look(self, tensor: _Tensor, raw: Array) -> None:
        """Count what is not finite in the bytes of a run."""
        found = not_finite(raw, tensor.slot.spec.dtype)
        if found:
            key = (tensor.file.output.part, tensor.slot.spec.name)
            with self._counting:
                self._not_finite[key] = self._not_finite.get(key, NotFinite()) + found

    def _write_crc(self, tensor: _Tensor) -> None:
        if not tensor.slot.crc_offsets:
            return
        crc = 0
        for _, (following, nbytes) in sorted(tensor.crcs.items()):
            crc = zlib_ng.crc32_combine(crc, following, nbytes)
        tensor.crcs.clear()
        for offset in tensor.slot.crc_offsets:
            self._put(tensor.file, memoryview(crc.to_bytes(4, "little")), offset)

    def _put(self, file: _File, data: memoryview, offset: int) -> None:
        self._folder.put(file.output.name, file.fd, data, offset)
        self._writeback.wrote(file.fd, len(data))

    def _count(self, nbytes: int) -> None:
        with self._counting:
            self._written += nbytes
            if self._progress is not None:
                self._progress(self._written, self._total)

    def _release(self, file: _File) -> None:
        """Release a file; the last thread syncs it and gives it its name."""
        with self._counting:
            file.pending -= 1
            last = file.pending == 0
        if last:
            if self._back is not None:
                self._back.written(file.fd)
                with self._taking:
                    self._taking.notify_all()
            self._folder.seal(file.output.name, file.fd)


def _strided(slot: Slot) -> bool:
    """Whether a slot's source is stored in another order."""
    return any(fragment.strides for fragment in slot.source.fragments)


def _block(slot: Slot) -> int:
    """Elements of a block of a slot."""
    return (_STRIDED_BLOCK if _strided(slot) else _BLOCK) // slot.spec.dtype.itemsize
