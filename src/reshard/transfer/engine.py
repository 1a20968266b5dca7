"""The engine: fills the slots of a plan from the checkpoint, piece by piece, in a few threads.

Pieces (`pieces`) are taken in output order, so files are written front to back. One thread makes a
piece, in small blocks: reads, casts, writes, hashes. A thread waits for another only while both
write into one file; no tensor is ever held as a whole.

Memory: that of a maker (`making`) for each thread.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress

import xxhash

from reshard.core.plan import Plan
from reshard.core.tensors import stored
from reshard.progress import Progress
from reshard.storage.local import Sources
from reshard.transfer.assembly import Assembly, Piece, Segment
from reshard.transfer.checksums import Ledger
from reshard.transfer.making import Maker, SegmentResult
from reshard.transfer.outcome import Outcome
from reshard.transfer.output import Output, StoppedError
from reshard.transfer.readback import ReadBack, ReadJob
from reshard.transfer.writeback import Writeback


class Engine:
    """One transfer. `progress` is called with (bytes written, bytes to write) after each block."""

    def __init__(
        self,
        plan: Plan,
        sources: Sources,
        ledger: Ledger,
        folder: Output,
        *,
        threads: int,
        read_back: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._sources = sources
        self._ledger = ledger
        self._folder = folder
        self._threads = threads
        self._progress = progress
        self._written = 0
        self._back = ReadBack() if read_back else None
        self._assembly = Assembly(plan, folder, self._back)
        self._pieces = self._assembly.pieces()
        self._taking = threading.Condition()
        self._making = 0
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
        for failure in sorted(failures, key=lambda failure: isinstance(failure, StoppedError)):
            raise failure
        self._folder.settle()
        bytes_read = sum(future.result() for future in futures)
        return self._assembly.outcome(bytes_read, self._ledger.check(self._sources))

    def _work(self) -> int:
        """Take pieces until there are none; returns the bytes read."""
        maker = Maker(self._sources, self._ledger)
        try:
            while (piece := self._take()) is not None:
                if isinstance(piece, ReadJob):
                    piece.read(maker.buffer)
                    continue
                if self._found(piece, maker):
                    pass
                elif self._folder.in_order:
                    self._make_in_order(piece, maker)
                else:
                    hasher = xxhash.xxh3_128()
                    made = [self._make(segment, hasher, maker) for segment in piece.segments]
                    self._assembly.made(piece, hasher.digest(), made, maker.read())
                self._made()
        except BaseException:
            self._halt()
            raise
        return maker.bytes_read

    def _take(self) -> Piece | ReadJob | None:
        """Written bytes are read back first, while they are cached; None where all is done.

        A thread that finds nothing while others still make pieces waits: there will be more to
        read.
        """
        with self._taking:
            while True:
                if self._stop.is_set():
                    raise StoppedError
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

    def _make_in_order(self, piece: Piece, maker: Maker) -> None:
        """Make a piece whose next segment may wait until the one before it is noted.

        The piece is noted before its last segment, which may seal its file.
        """
        hasher = xxhash.xxh3_128()
        *before, last = piece.segments
        for segment in before:
            self._assembly.segment_made(segment, self._make(segment, hasher, maker))
        result = self._make(last, hasher, maker)
        self._assembly.hashed(piece, hasher.digest())
        self._assembly.note(piece, hasher.digest(), maker.read())
        self._assembly.segment_made(last, result)

    def _make(self, segment: Segment, hasher: xxhash.xxh3_128, maker: Maker) -> SegmentResult:
        """Make what a piece has of a slot."""
        file = segment.tensor.file

        def put(data: memoryview, offset: int) -> None:
            if self._stop.is_set():
                raise StoppedError
            self._folder.put(file.output.name, file.fd, data, offset)
            if not self._folder.in_order:
                self._writeback.wrote(file.fd, len(data))
            self._count(len(data))

        tensor = segment.tensor
        return maker.make(tensor.slot, segment.runs, hasher, put, changed=tensor.changed)

    def _found(self, piece: Piece, maker: Maker) -> bool:
        """Whether a piece stands in the output as an interrupted run noted it.

        Every byte is read and hashed; where they are others, the piece is to be made again.
        """
        noted = self._assembly.noted(piece)
        if noted is None:
            return False
        held = (segment.tensor.file for segment in piece.segments)
        files = [read for file in held if (read := self._folder.found(file.output.name, file.fd))]
        if len(files) < len(piece.segments):
            return False
        hasher = xxhash.xxh3_128()
        results = []
        with suppress(OSError):
            for segment, read in zip(piece.segments, files, strict=True):
                tensor = segment.tensor
                known = tensor.changed
                results.append(maker.find(tensor.slot, segment.runs, hasher, read, changed=known))
        whole = len(results) == len(piece.segments) and hasher.digest() == noted.digest
        if not whole or not self._ledger.add_noted(noted.read):
            self._assembly.differs(piece)
            return False
        for segment in piece.segments:
            self._ledger.add_bare(stored(segment.tensor.slot.source.fragments))
        self._assembly.reused(piece, hasher.digest(), results)
        self._count(piece.nbytes)
        return True

    def _made(self) -> None:
        """Note that a piece is done."""
        with self._taking:
            self._making -= 1
            self._taking.notify_all()

    def _halt(self) -> None:
        """Stop all threads."""
        self._stop.set()
        self._folder.halt()
        with self._taking:
            self._taking.notify_all()

    def _count(self, nbytes: int) -> None:
        with self._counting:
            self._written += nbytes
            if self._progress is not None:
                self._progress(self._written, self._assembly.total)
