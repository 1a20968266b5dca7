"""An output in an object store: streamed as it is made, and complete with its last object.

    OUT/reshard.partial.json     the first: which run writes, and which files (`claims`)
    OUT/reshard.partial.00001    which pieces and files are finished (`notes`)
    OUT/model-00001-of-...       an upload in parts, which nobody sees until it is whole
    OUT/reshard.json             the last: with it the output is complete

A store has no rename. Readers take a folder with the first of these and without the last for an
output that is not complete (`storage.remote`). The first is written on the condition that there is
none, or none but that of a run that is gone: so of two runs one is refused. A run that fails ends
its uploads and deletes what it wrote. What one that was killed left is reused with `resume`, as far
as it is whole and proves to be what was noted, and deleted otherwise.

With `overwrite` the old output goes when the first file of the new one is whole: a store cannot
exchange the two in one step. Its `reshard.json` goes first, so that what is left of it is never
taken for an output.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from msgspec.structs import replace

from reshard.core.findings import Finding
from reshard.core.locations import CLAIM, MANIFEST, MARKS, RemotePath, leads_down
from reshard.errors import ReshardError, WriteError
from reshard.storage import remote, strict_json, uploads
from reshard.storage.fingerprints import Fingerprint
from reshard.storage.stores import Object
from reshard.transfer import claims, takeover
from reshard.transfer.claims import Claim
from reshard.transfer.journal import Basis
from reshard.transfer.making import ReadAt
from reshard.transfer.notes import Notes
from reshard.transfer.resuming import can_be_continued
from reshard.transfer.sending import DiffersError, Sending
from reshard.transfer.signals import held_signals


class RemoteFolder:
    """A folder of a store being written. Use as a context manager; call `commit` last.

    `digest` names the plan, `names` are those of all files that will be written, `sources` say
    which files the plan's are. `partial` is where verification finds the files before the end: in
    their place. `resumed` is the age in words of the interrupted run that is continued. Raises
    `WriteError`.
    """

    in_order = True

    def __init__(
        self,
        target: RemotePath,
        digest: str,
        names: Iterable[str],
        *,
        overwrite: bool = False,
        resume: bool = False,
        sources: Mapping[str, Fingerprint] | None = None,
    ) -> None:
        self.target = target
        self.partial: Path = target
        self.overwrite = overwrite
        self.resumed = ""
        self.findings: list[Finding] = []
        self.committed: bool = False
        #: Whether uploads may be left that nobody here can end: of workers that were lost.
        self.abandoned: bool = False
        self.sending: Sending = Sending(target, self._made)
        self.journal: Notes | None = None
        self._resume = resume
        self._basis = Basis(digest, sources or {})
        self._claim = Claim.made(digest, [*names, MANIFEST])
        self._object: Object | None = None
        self._manifest = b""
        self._noted: set[str] = set()
        self._kept: dict[str, Object] = {}
        self._old: list[str] = []
        self._displaced = False
        self._beating = threading.Lock()
        self._end = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="reshard-claim", daemon=True)

    def __enter__(self) -> RemoteFolder:
        try:
            with held_signals():
                self._begin()
        except BaseException:
            if self._object is not None:  # the next run finds by it what is left
                with suppress(ReshardError):
                    self._sign_again(replace(self._claim, stopped=True))
            raise
        remote.being_written.add(str(self.target))
        self._beats.start()
        return self

    def create(self, name: str, nbytes: int) -> int:
        """Begin a file of `nbytes` bytes; returns its number."""
        return self.sending.create(name, nbytes, self.kept(name, nbytes))

    def kept(self, name: str, nbytes: int) -> Object | None:
        """The object of a file that an interrupted run completed, to be reused."""
        there = self._kept.get(name)
        return there if there is not None and there.nbytes == nbytes else None

    def put(
        self, name: str, fd: int, data: memoryview, offset: int, *, known: bool = False
    ) -> None:
        """Take `data` at `offset` of a file made by `create`; `known`: it is no tensor's."""
        try:
            self.sending.put(fd, data, offset, known=known)
        except DiffersError:
            self._forget(name)
            raise

    def found(self, name: str, fd: int) -> ReadAt | None:
        """How to read a file that an interrupted run completed."""
        standing = self.sending.standing(fd)
        return None if standing is None else standing.read

    def lend(self, name: str, fd: int) -> Path:
        """Never called: workers send their files themselves (`cluster.stores`)."""
        raise NotImplementedError

    def take_back(self, name: str, path: Path) -> int:
        """Never called: nothing was lent."""
        raise NotImplementedError

    def seal(self, name: str, fd: int) -> None:
        """Let a file become an object once all of it is there; `settle` waits for it."""
        if self.sending.standing(fd) is None:
            self.displace()
        self.sending.seal(fd)

    def halt(self) -> None:
        """Let everyone who waits end: the run failed."""
        self.sending.halt()

    def settle(self) -> None:
        """Wait until every file that was sealed is in the store."""
        self.sending.settle()
        remote.forget(self.target)  # verification asks what is there

    def took(self, name: str, object_: Object) -> None:
        """Note that a worker has sent a file."""
        self.sending.note(name, object_)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file; `reshard.json` is kept until `commit`."""
        if name == MANIFEST:
            self._manifest = data
            return
        number = self.create(name, len(data))
        self.put(name, number, memoryview(data), 0, known=True)
        self.seal(name, number)

    def displace(self) -> None:
        """Delete the output that this one replaces, its `reshard.json` first."""
        with self.sending.changed:
            old, self._old = self._old, []
        if old:
            self._displaced = True
            self._delete([MANIFEST])
            self._delete(old)

    def commit(self) -> None:
        """Complete the output by its last object, if all others are still what was written."""
        self.settle()
        self.displace()
        self._stop_beating()
        if self.abandoned:
            self._end_uploads()
        self._check_still_ours()
        try:
            self.sending.bucket.put(self.sending.key(MANIFEST), self._manifest, new=True)
        except FileExistsError:
            raise self._not_alone() from None
        self.committed = True
        try:
            self._delete([*self._noted, CLAIM])
        except WriteError as error:
            self.findings.append(
                Finding(
                    "partial-output-kept",
                    f"the output is complete; {CLAIM} beside it cannot be deleted: {error.message}",
                    subject=str(self.target / CLAIM),
                )
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with held_signals():
                keep = self._resume and not self.committed and can_be_continued(error)
                self.sending.close(finish=keep)
                self._stop_beating()
                kept = not self.committed and self._give_up(keep=keep)
            if kept and isinstance(error, ReshardError) and "--resume" not in str(error):
                error.message += " What is finished is kept; pass --resume to continue."
        except ReshardError as left:
            if not isinstance(error, ReshardError):
                raise
            error.message += f" What was written cannot be deleted: {left.message}"
        finally:
            if isinstance(error, ReshardError) and self._displaced and not self.committed:
                error.message += " The old output is deleted: a store cannot exchange the two."
            remote.being_written.discard(str(self.target))
            remote.forget(self.target)

    def _begin(self) -> None:
        old = remote.contents(self.target)
        if MANIFEST in old:
            if not self.overwrite:
                raise WriteError(
                    "the output exists.", path=self.target, hint="Name another output."
                )
            text = strict_json.read_file(self.target / MANIFEST, max_nbytes=strict_json.MAX_INDEX)
            self._old = [MANIFEST, *_listed(text)]
            self._claim = replace(self._claim, old=tuple(self._old))
        left = claims.left_at(self.target)
        if left is not None:
            left.check_gone(force=self.overwrite)
            self._claim = takeover.over(self._claim, left, complete=MANIFEST in old)
        self._sign(left)
        if left is not None:
            taken = takeover.take(
                self.sending,
                left,
                self._basis,
                self._put_mark,
                resume=self._resume,
                complete=MANIFEST in old,
            )
            self.findings += taken.findings
            self.journal, self._kept, self.resumed = taken.journal, taken.kept, taken.age
            self._noted |= taken.marks
        if self.journal is None:
            self.journal = Notes(self._put_mark, self._basis)
        remote.forget(self.target)

    def _sign(self, left: claims.Remains | None) -> None:
        """Write the first object, in the place of the one that is left. Raises `WriteError`."""
        key, text = self.sending.key(CLAIM), self._claim.encoded()
        try:
            if left is None:
                self._object = self.sending.bucket.put(key, text, new=True)
            else:
                self._object = self.sending.bucket.put(key, text, instead_of=left.object)
        except FileExistsError:
            raise self._not_alone() from None

    def _put_mark(self, name: str, text: bytes) -> None:
        self.sending.bucket.put(self.sending.key(name), text)
        self._noted.add(name)

    def _made(self, name: str, object_: Object) -> None:
        """Note in the journal that a file is an object by now."""
        if self.journal is not None:
            self.journal.seal(name, object_)

    def _forget(self, name: str) -> None:
        """Delete a file that an interrupted run left and that is not what it should be."""
        self._kept.pop(name, None)
        with suppress(WriteError):
            self._delete([name])

    def _delete(self, names: Iterable[str]) -> None:
        self.sending.bucket.delete([self.sending.key(name) for name in names])

    def _beat(self) -> None:
        """Give a sign of life once a minute; what is finished is noted, too."""
        while not self._end.wait(claims.BEAT):
            if self.journal is not None:
                self.journal.flush()
            with self._beating:
                if self._end.is_set() or self._sign_again(self._claim):
                    continue
            self.sending.halt(self._not_alone())
            return

    def _sign_again(self, claim: Claim) -> bool:
        """Write the first object again; whether it was still ours."""
        key = self.sending.key(CLAIM)
        try:
            self._object = self.sending.bucket.put(key, claim.encoded(), instead_of=self._object)
        except FileExistsError:
            return False
        except WriteError:  # a store without the condition, or one that does not answer now
            with suppress(ReshardError):
                if self._is_ours():
                    self._object = self.sending.bucket.put(key, claim.encoded())
        return True

    def _stop_beating(self) -> None:
        self._end.set()
        if self._beats.is_alive():
            self._beats.join()

    def _check_still_ours(self) -> None:
        """Raise where another run took this output over, or an object is no longer ours."""
        if not self._is_ours():
            raise self._not_alone()
        made = self.sending.made
        there = {name: found for name, found in remote.below(self.target).items()
                 if not name.startswith(MARKS)}  # fmt: skip
        for name in sorted({*there, *made}):
            mine = made.get(name)
            if mine is None or self.sending.still(name, there.get(name), mine) is None:
                raise WriteError(
                    f"something else wrote or deleted {name!r} while this run wrote.",
                    path=self.target,
                    hint="Name another output.",
                )

    def _is_ours(self) -> bool:
        """Whether the first object is still that of this run."""
        if self._object is None:
            return False
        there = self.sending.bucket.head(self.sending.key(CLAIM))
        return there is not None and there.tag == self._object.tag

    def _not_alone(self) -> WriteError:
        return WriteError(
            "another run writes this output.",
            path=self.target,
            hint="Wait for it, or name another output.",
        )

    def _give_up(self, *, keep: bool) -> bool:
        """Delete what this run wrote, if the output is still this run's; or keep it, noted.

        Whether it was kept.
        """
        if not self._is_ours():
            return False
        if self.abandoned:
            self._end_uploads()
        if keep and (self.sending.made or self._kept) and self.journal is not None:
            self.journal.flush()
            self._sign_again(replace(self._claim, stopped=True))
            return True
        self._delete([*{*self.sending.made, *self.sending.begun, *self._kept, *self._noted}, CLAIM])
        return False

    def _end_uploads(self) -> None:
        left = uploads.begun(self.target, self._claim.files)
        if left:
            uploads.end(self.target, left)


def _listed(stated: Mapping[str, Any]) -> list[str]:
    """The files that a `reshard.json` lists."""
    files = stated.get("files")
    return [*filter(leads_down, files if isinstance(files, dict) else ())]
