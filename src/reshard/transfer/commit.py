"""The output folder: it appears complete, under its final name, or not at all.

Everything is written into a folder of this run beside the output, on the same file system
(`leftovers` draws it), each file under a temporary name, synced, and renamed into its place there
(`seals`). What is finished is noted in a journal, so that a run that is killed can be resumed
(`resuming`). `commit` syncs the folders and renames the folder once, in a way that refuses to
replace; with `overwrite`, old and new exchange places in one step and the old is deleted
afterwards. A failure before that removes what this run made, and nothing else. A lock beside the
output is held from the beginning until the last deletion (`lock`).
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType

from reshard.core.findings import Finding
from reshard.errors import WriteError
from reshard.storage.fingerprints import Fingerprint
from reshard.storage.paths import exists, real
from reshard.transfer import leftovers, resuming
from reshard.transfer.journal import Basis, Journal
from reshard.transfer.lock import TargetLock
from reshard.transfer.making import ReadAt
from reshard.transfer.seals import Seals
from reshard.transfer.signals import held_signals
from reshard.transfer.system import (
    Identity,
    exchange,
    identity_of,
    read_fully,
    rename_new,
    reserve,
    sync_folder,
    write_fully,
)

# Times that the folders above the output are made, where other runs remove theirs.
_TRIES = 100


class OutputFolder:
    """A folder being written. Use as a context manager; call `commit` last.

    `digest` names the plan: a run finds what an earlier one of the same plan left. Where `target`
    is a symbolic link, the folder that it names is written. `partial` is where the output lies
    until then. `findings` say what this run found from earlier runs, and what it could not delete.

    With `resume`, a run of the same plan that was killed is continued: `create` opens the files
    that it left, `journal.noted` is what it noted, and `resumed` its age in words. If this run is
    interrupted in turn, what is finished stays. `sources` say which files the plan's are.

    Raises `WriteError`.
    """

    in_order = False

    def __init__(
        self,
        target: Path,
        digest: str,
        *,
        overwrite: bool = False,
        resume: bool = False,
        sources: Mapping[str, Fingerprint] | None = None,
    ) -> None:
        self.target: Path = real(target)
        self.overwrite = overwrite
        self.resumed: str = ""
        self._resume = resume
        self._basis = Basis(digest, sources or {})
        self.findings: list[Finding] = []
        self.committed = False
        self._own = leftovers.beside(self.target, f".partial-{digest[:16]}")
        self.partial: Path = self._own / "new"
        self._lock = TargetLock(leftovers.beside(self.target, ".lock"))
        self._own_identity: Identity | None = None
        self._replaced: Identity | None = None
        self._moved: Path | None = None  # to where `_replace` moved what it replaces
        self._parents: list[tuple[Path, Identity]] = []
        self._open: dict[int, Path] = {}
        self.journal: Journal | None = None
        self._creating = threading.Lock()
        self._created: set[str] = set()
        self._writing = threading.Lock()
        self._seals = Seals()

    def __enter__(self) -> OutputFolder:
        try:
            with held_signals():
                self._begin()
        except OSError as error:
            self._finish()
            raise _cannot_write(self._own, error) from None
        except BaseException:
            self._finish()
            raise
        return self

    def create(self, name: str, nbytes: int) -> int:
        """Open a file of `nbytes` bytes for writing; returns its descriptor.

        It is a new one, or that of the interrupted run which is continued, with its bytes.
        """
        path = self._own / "tmp" / leftovers.temporary(name)
        try:
            with self._creating:
                if name in self._created:
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
                self._created.add(name)
            new = 0 if self.resumed else os.O_EXCL
            fd = os.open(path, os.O_RDWR | os.O_CREAT | new | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            self._open[fd] = path
            if self.resumed and os.fstat(fd).st_size > nbytes:
                os.truncate(fd, nbytes)
            reserve(fd, nbytes)
        except OSError as error:
            raise _cannot_write(self.target / name, error) from None
        return fd

    def put(
        self, name: str, fd: int, data: memoryview, offset: int, *, known: bool = False
    ) -> None:
        """Write `data` at `offset` of a file made by `create`."""
        try:
            # The kernel admits one writer per file, and waiting threads spin: two threads of a
            # conversion wasted up to 0.8 s of processor time per gigabyte.
            with self._writing:
                write_fully(fd, data, offset)
        except OSError as error:
            raise _cannot_write(self.target / name, error) from None

    def found(self, name: str, fd: int) -> ReadAt:
        """How to read what stands in a file: an interrupted run may have written it."""
        return partial(read_fully, fd)

    def lend(self, name: str, fd: int) -> Path:
        """Close a file made by `create`, so that others can write into it; where it lies.

        Closing shows other machines what was written so far.
        """
        try:
            path = self._open.pop(fd)
            os.close(fd)
        except OSError as error:
            raise _cannot_write(self.target / name, error) from None
        return path

    def take_back(self, name: str, path: Path) -> int:
        """Open a file again that was lent; returns its descriptor.

        For writing alone: a network file system that may read, too, reads a page before a part of
        it is written, and then writes the whole page, over what others wrote there.
        """
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            self._open[fd] = path
        except OSError as error:
            raise _cannot_write(self.target / name, error) from None
        return fd

    def seal(self, name: str, fd: int) -> None:
        """Have a file made by `create` synced, closed and given its name; `settle` waits for it."""
        self._seals.add(lambda: self._seal(name, fd))

    def halt(self) -> None:
        """Nobody waits here."""

    def settle(self) -> None:
        """Wait until every file that was sealed is synced and has its name."""
        self._seals.settle()

    def _seal(self, name: str, fd: int) -> None:
        final = self.partial / name
        try:
            os.fsync(fd)
            nbytes = os.fstat(fd).st_size
            path = self._open.pop(fd)
            os.close(fd)
            final.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(final):  # on a disk that does not distinguish README from readme
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            path.rename(final)  # `commit` makes the names durable
            if self.journal is not None:
                self.journal.seal(name, nbytes)
        except OSError as error:
            raise _cannot_write(self.target / name, error) from None

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        fd = self.create(name, 0)
        self.put(name, fd, memoryview(data), 0)
        self.seal(name, fd)

    def commit(self) -> None:
        """Give the folder its final name, in one step, and delete what it replaces.

        Signals wait meanwhile. Where this raises, the output is as it was before the run.
        """
        self.settle()
        with held_signals():
            try:
                folders = [path for path in self.partial.rglob("*") if path.is_dir()]
                for folder in [*folders, self.partial]:
                    sync_folder(folder)
                self._check_still_ours()
                if self._replaced is not None and self.overwrite:
                    self._replace(self._replaced)
                else:
                    self._place()
            except OSError as error:
                raise self._not_committed(error) from None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        keep = self._resume and not self.committed and resuming.can_be_continued(error)
        self._finish(keep=keep)

    def _begin(self) -> None:
        for _ in range(_TRIES):
            try:
                resuming.make_parents(self.target, self._parents)
                self._lock.take()
                break
            except FileNotFoundError:  # another run failed, and removed the folders that it made
                self._parents.clear()
        restored = leftovers.put_back(self.target)
        self.findings += restored
        resuming.refuse_existing(self.target, overwrite=self.overwrite, restored=bool(restored))
        self._replaced = identity_of(self.target)
        self.findings += leftovers.clear(self.target, self._own if self._resume else None)
        if not (self._resume and self._take_up()):
            self._own_identity, self.journal = resuming.begin(self._own, self.target, self._basis)

    def _take_up(self) -> bool:
        """Whether this run continues an interrupted run of the same plan."""
        found = resuming.take_up(self._own, self.target, self._basis)
        if isinstance(found, Finding):
            self.findings.append(found)
        elif found is not None:
            self._own_identity, self.journal, self.resumed = found
        return self.resumed != ""

    def _check_still_ours(self) -> None:
        """Raise where the lock, or what has the output's name, is no longer what it was at
        first."""
        if not self._lock.held:
            raise WriteError(
                "the lock file was removed while this run wrote; another run may have begun.",
                path=self._lock.path,
                hint="Convert again.",
            )
        there = identity_of(self.target)
        if there not in (None, self._replaced):
            raise WriteError(
                "something else appeared under the output's name while this run wrote.",
                path=self.target,
                hint="Name another output, or remove what is there.",
            )
        if there is None:
            self._replaced = None

    def _place(self) -> None:
        """One rename, onto nothing or an empty folder; undone if it cannot be made durable."""
        if self._replaced is None:
            rename_new(self.partial, self.target)
        else:
            # An empty folder, which holds nothing to lose, may be replaced: rename(2) does.
            self.partial.rename(self.target)
        self.committed = True
        try:
            sync_folder(self.target.parent)
        except OSError:
            self.target.rename(self.partial)
            if self._replaced is not None:
                self.target.mkdir()
            self.committed = False
            raise

    def _replace(self, known: Identity) -> None:
        """Exchange old and new, make it durable, and delete the old, which is `known`."""
        old = self.partial
        if not exchange(self.partial, self.target):
            old = self._own / "old"
            self.target.rename(old)
            self._moved = old
            try:
                self.partial.rename(self.target)
            except BaseException:
                old.rename(self.target)
                self._moved = None
                raise
        self.committed, self._moved = True, old
        try:
            if identity_of(old) != known:  # replaced after it was looked at
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            sync_folder(self.target.parent)
            sync_folder(self._own)
        except OSError:
            self._undo(old)
            raise
        failed = leftovers.remove_tree(old, known)
        if failed is None:
            self._replaced = self._moved = None
        else:
            self.findings.append(
                Finding(
                    "old-output-kept",
                    f"the new output is in its place; the old one cannot be deleted "
                    f"({failed.strerror or failed}): what is left of it lies at {old}.",
                    subject=os.fspath(old),
                )
            )

    def _undo(self, old: Path) -> None:
        """Put the old output back in its place."""
        if old != self.partial:
            self.target.rename(self.partial)
            old.rename(self.target)
        elif not exchange(self.partial, self.target):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self.committed, self._moved = False, None

    def _aside(self) -> Path | None:
        """Where the old output lies, if it is neither in its place nor deleted.

        A network file system may report that a rename failed which it made, so it is looked for.
        """
        if self._replaced is not None:
            for place in (self.partial, self._own / "old"):
                with suppress(OSError):
                    if identity_of(place) == self._replaced:
                        return place
        return self._moved

    def _not_committed(self, error: OSError) -> WriteError:
        """The error of a commit, with what stands where it could not be undone."""
        reason = f"it cannot be written: {error.strerror or error}."
        aside = self._aside()
        if self.committed:
            reason = (
                f"the new output is in its place, but cannot be made durable "
                f"({error.strerror or error}): it may not outlast a power cut."
            )
        if aside is not None:
            reason += f" The old output lies at {aside}."
        return WriteError(reason, path=self.target)

    def _finish(self, *, keep: bool = False) -> None:
        """Remove what this run made and did not commit, unless `keep`, and release the lock."""
        with held_signals():
            self._seals.close()
            for fd in self._open:
                with suppress(OSError):
                    os.close(fd)
            self._open.clear()
            if self.journal is not None:
                self.journal.close()
            # An old output that could not be put back or deleted stays, whatever happened.
            if self._own_identity is not None and self._aside() is None and not keep:
                leftovers.remove_tree(self._own, self._own_identity)
            self._lock.release()
            for folder, known in [] if self.committed else reversed(self._parents):
                with suppress(OSError):
                    if identity_of(folder) == known:
                        folder.rmdir()


def lacking_space(target: Path, nbytes: int) -> WriteError | None:
    """The error that the disk lacks room for `nbytes` bytes; None if they fit."""
    folder = real(target).parent
    while not exists(folder):
        folder = folder.parent
    try:
        free = shutil.disk_usage(folder).free + leftovers.reclaimable(real(target))
    except OSError:  # a file system that does not say; it may still have room
        return None
    if free >= nbytes:
        return None
    return WriteError(
        f"{nbytes:,} bytes are needed, but only {free:,} are free.",
        path=folder,
        hint="Free some space, or name an output on another disk.",
    )


def _cannot_write(path: Path, error: OSError) -> WriteError:
    return WriteError(f"it cannot be written: {error.strerror or error}.", path=path)
