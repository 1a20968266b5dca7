"""System calls that not every system or file system has, and what replaces a missing one."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

from reshard.storage.source import close_read

# renameat2(2), Linux 3.15: linux/fs.h and linux/fcntl.h.
_RENAME_NOREPLACE, _RENAME_EXCHANGE, _AT_FDCWD = 1, 2, -100
# Errors of a system that does not know a call or its flags. EPERM: a sandbox that forbids calls it
# does not know; where the permission itself is missing, the plain call says so again.
_LACKING = frozenset(
    (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOTTY, errno.EPERM)
)
# Errors of opening or syncing a folder where folders cannot be synced (CIFS, some FUSE), or where
# one may write into a folder but not list it.
_CANNOT_SYNC = frozenset((errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EACCES, errno.EBADF))
# Errors of a full file system, a quota, a limit of the process or of the file system.
_NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))

Identity = tuple[int, int]


def identity(status: os.stat_result) -> Identity:
    """Device and inode: which file or folder it is, whatever its name."""
    return status.st_dev, status.st_ino


def identity_of(path: Path) -> Identity | None:
    """The identity of what stands at `path` itself, a link included; None where nothing does."""
    try:
        return identity(path.lstat())
    except FileNotFoundError:
        return None


def exchange(one: Path, other: Path) -> bool:
    """Let two folders exchange their names in one step; False where the system has no such call."""
    return _renameat2(one, other, _RENAME_EXCHANGE)


def rename_new(source: Path, target: Path) -> None:
    """Give a folder a new name. Raises `FileExistsError` where something has that name."""
    if _renameat2(source, target, _RENAME_NOREPLACE):
        return
    # What appears between the two steps is safe: rename(2) replaces no file, link or full folder
    # by a folder, only an empty folder, which holds nothing to lose.
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target))
    source.rename(target)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    arguments = (_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags)
    if libc.renameat2(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in _LACKING:
        return False
    raise OSError(code, os.strerror(code), os.fspath(target))


def reserve(fd: int, nbytes: int) -> None:
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
            if code in _NO_ROOM:
                raise OSError(code, os.strerror(code))
    os.truncate(fd, nbytes)


def write_fully(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; a plain `pwrite` may write less."""
    done = 0
    while done < len(data):
        wrote = os.pwrite(fd, data[done:], offset + done)
        if wrote == 0:  # otherwise a disk that writes nothing would loop for ever
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done += wrote


def read_fully(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` from `offset` on. Raises `OSError`, where the file ends before, too."""
    done = 0
    while done < len(buffer):
        got = os.preadv(fd, [buffer[done:]], offset + done)
        if got == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done += got


class SharedFile:
    """A file that another process made, opened for writing into it.

    For writing alone: if the descriptor may also read, a network file system fetches a page before
    a part of it is written, and writes the whole page back, over what others wrote there meanwhile.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._reading = -1
        self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        status = os.fstat(self._fd)
        self.inode: int = status.st_ino
        self.nbytes: int = status.st_size

    def put(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        write_fully(self._fd, data, offset)

    def reading(self) -> int:
        """A descriptor to read what stands there."""
        if self._reading < 0:
            self._reading = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        return self._reading

    def forget(self) -> None:
        """Let no page stay cached that was read: others may write a part of it meanwhile."""
        if self._reading >= 0:
            if hasattr(os, "posix_fadvise"):
                with suppress(OSError):
                    os.posix_fadvise(self._reading, 0, 0, os.POSIX_FADV_DONTNEED)
            close_read(self._reading)
            self._reading = -1

    def sync(self) -> None:
        """Make it durable and close it: a network file system may report only now what it lost."""
        os.fsync(self._fd)
        fd, self._fd = self._fd, -1
        os.close(fd)

    def close(self) -> None:
        """Close it, if it is open."""
        self.forget()
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the file system can sync folders."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        close_read(fd)
