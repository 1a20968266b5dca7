"""The output folder: it appears whole, under its final name, or not at all.

Everything is written into a sibling folder `.NAME.partial-DIGEST` on the same file system, each
file under a temporary name, synced, and renamed inside it. `commit` syncs the folder and renames
it once, in a way that refuses to replace; with `overwrite`, old and new exchange places in one
step and the old is deleted afterwards. Anything that goes wrong before removes the sibling.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from reshard.errors import WriteError
from reshard.storage.local import Source, real

# renameat2(2), Linux 3.15: linux/fs.h and linux/fcntl.h.
_RENAME_NOREPLACE, _RENAME_EXCHANGE, _AT_FDCWD = 1, 2, -100
_COPY_PIECE = 4 << 20


class OutputFolder:
    """A folder being written. Use as a context manager; call `commit` last.

    `digest` names the plan: two different conversions to one place do not meet in one partial
    folder. Where `target` is a symbolic link, the folder that it names is written. Raises
    `WriteError`.
    """

    def __init__(self, target: Path, digest: str, *, overwrite: bool = False) -> None:
        self.target = real(target)
        self.overwrite = overwrite
        self.partial = self.target.with_name(f".{self.target.name}.partial-{digest[:16]}")
        self._lock = -1
        self._made: list[Path] = []
        self._open: set[int] = set()
        self._writing = threading.Lock()

    def __enter__(self) -> OutputFolder:
        refuse_existing(self.target, overwrite=self.overwrite)
        try:
            self._make_parents()
            self.partial.mkdir(exist_ok=True)
            # No link: anybody can tell the name, and what it leads to would be emptied.
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            self._lock = os.open(self.partial, flags)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._empty()
        except BlockingIOError:
            os.close(self._lock)
            raise WriteError(
                "another process is writing this very conversion.",
                path=self.partial,
                hint="Wait for it to end.",
            ) from None
        except OSError as error:
            if self._lock >= 0:
                os.close(self._lock)
            self._remove_empty(self.partial)
            raise _cannot_write(self.partial, error) from None
        return self

    def create(self, name: str, nbytes: int) -> int:
        """Open a new file of `nbytes` bytes for writing; returns its descriptor."""
        path = self._temporary(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._open.add(fd)
            _reserve(fd, nbytes)
        except OSError as error:
            raise _cannot_write(path, error) from None
        return fd

    def put(self, name: str, fd: int, data: memoryview, offset: int) -> None:
        """Write `data` at `offset` of a file made by `create`."""
        try:
            # The kernel lets one writer of a file in at a time, and those who wait for it spin:
            # two threads of a conversion burnt up to 0.8 s of processor time a gigabyte so.
            with self._writing:
                write_fully(fd, data, offset)
        except OSError as error:
            raise _cannot_write(self.target / name, error) from None

    def seal(self, name: str, fd: int) -> None:
        """Sync and close a file made by `create`, and give it its name."""
        path = self._temporary(name)
        try:
            os.fsync(fd)
            self._close(fd)
            path.rename(self.partial / name)
            sync_folder((self.partial / name).parent)
        except OSError as error:
            raise _cannot_write(path, error) from None

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        fd = self.create(name, 0)
        self.put(name, fd, memoryview(data), 0)
        self.seal(name, fd)

    def copy(self, name: str, source: Source) -> None:
        """Copy a file of the base model. Raises `IncompleteError` where it becomes shorter."""
        fd = self.create(name, 0)
        for start in range(0, source.size, _COPY_PIECE):
            data = source.read(start, min(_COPY_PIECE, source.size - start))
            self.put(name, fd, memoryview(data), start)
        self.seal(name, fd)

    def commit(self) -> None:
        """Give the folder its final name, in one step."""
        try:
            for folder in [self.partial, *(p for p in self.partial.rglob("*") if p.is_dir())]:
                sync_folder(folder)
            if self.overwrite and self.target.exists():
                _rename(self.partial, self.target, _RENAME_EXCHANGE)
                sync_folder(self.target.parent)
                shutil.rmtree(self.partial)
            else:
                # An empty folder, which holds nothing to lose, may be replaced: rename(2) does.
                empty = self.target.is_dir() and not any(self.target.iterdir())
                _rename(self.partial, self.target, 0 if empty else _RENAME_NOREPLACE)
            sync_folder(self.target.parent)
        except OSError as error:
            raise _cannot_write(self.target, error) from None
        self._made.clear()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for fd in list(self._open):
            self._close(fd)
        if self.partial.is_dir():
            shutil.rmtree(self.partial, ignore_errors=True)
        os.close(self._lock)
        self._remove_empty()

    def _remove_empty(self, *folders: Path) -> None:
        """Remove `folders` and those made above the target, from the inside out."""
        for folder in (*folders, *reversed(self._made)):
            with suppress(OSError):
                folder.rmdir()

    def _close(self, fd: int) -> None:
        self._open.discard(fd)
        os.close(fd)

    def _make_parents(self) -> None:
        """Make the folders above the target, remembering them: a failed run removes them again."""
        missing = []
        folder = self.target.parent
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made.append(folder)
            sync_folder(folder.parent)

    def _empty(self) -> None:
        """Remove what a killed run of the same plan left; none of it is trusted."""
        for path in self.partial.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _temporary(self, name: str) -> Path:
        path = self.partial / name
        return path.with_name(f".{path.name}.tmp")


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Raise `WriteError` where `target` exists and holds anything, unless it may be replaced."""
    if target.is_dir():
        if overwrite or not any(target.iterdir()):
            return
    elif not target.exists():
        return
    kind = "folder exists and is not empty" if target.is_dir() else "is a file, not a folder"
    raise WriteError(f"the output {kind}.", path=target, hint="Name another output.")


def check_space(target: Path, nbytes: int) -> None:
    """Raise `WriteError` where the file system has no room for `nbytes` bytes."""
    folder = real(target).parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise WriteError(
            f"{nbytes:,} bytes are to be written and {free:,} are free.",
            path=folder,
            hint="Make room or name an output on another disk.",
        )


def write_fully(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; a plain `pwrite` may write less."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def _reserve(fd: int, nbytes: int) -> None:
    """Give a new file its size and, where the file system can, its place on the disk.

    The disk cannot fill up halfway then, and writing takes a tenth less time: the kernel looks
    for room once, not for each page.
    """
    if sys.platform == "linux" and nbytes:
        # Not `os.posix_fallocate`, which writes into every block where the file system cannot.
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "fallocate64"):
            if libc.fallocate64(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) == 0:
                return
            code = ctypes.get_errno()
            if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(code, os.strerror(code))
    os.truncate(fd, nbytes)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _rename(source: Path, target: Path, flags: int) -> None:
    """rename with `flags` of renameat2; where the system has no such call, check and rename."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        arguments = (_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags)
        if hasattr(libc, "renameat2"):
            if libc.renameat2(*arguments) == 0:
                return
            code = ctypes.get_errno()
            if code not in (errno.EINVAL, errno.ENOSYS):
                raise OSError(code, os.strerror(code), os.fspath(target))
    if flags == _RENAME_EXCHANGE:
        aside = source.with_name(source.name + ".old")
        target.rename(aside)
        try:
            source.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        aside.rename(source)
        return
    if flags == _RENAME_NOREPLACE and target.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target))
    source.rename(target)


def _cannot_write(path: Path, error: OSError) -> WriteError:
    return WriteError(f"it cannot be written: {error.strerror or error}.", path=path)
