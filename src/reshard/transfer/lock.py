"""The lock on an output's name: one run at a time writes, replaces or removes an output.

    .NAME.lock     beside the output NAME: {"host", "boot", "space", "pid", "started"}

The file is never renamed, so that all runs use the same one. It is locked with flock; if the file
system has no flock, creating the file is the lock, and the file's content tells a later run on the
same machine whether its creator is alive. Whoever holds the lock removes the file at the end; a run
that then locks the removed file finds that it is no longer the one of that name, and begins again.

    .NAME.lock.PID     such a file of a killed run, which the run PID is about to remove
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from reshard.errors import WriteError
from reshard.transfer.system import identity, identity_of

_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW  # O_NOFOLLOW: the name is predictable, a link may be planted
_NO_FLOCK = frozenset(
    (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EBADF)
)
# Times that a lock is looked for which another run makes and removes meanwhile.
_TRIES = 100
# Seconds after which the maker of a lock file that names none counts as dead.
_NAMELESS = 10.0
_MAX_NBYTES = 4096


class Owner(Struct, frozen=True):
    """The process that made a lock file.

    `boot` and `space` tell machines and containers of one name apart; `started` tells a process
    from an earlier one of the same number. They are empty where the system does not say.
    """

    host: str
    boot: str
    space: str
    pid: int
    started: str

    @property
    def here(self) -> bool:
        """Whether it runs, or ran, where this process would see it."""
        mine = this_process()
        return (self.host, self.boot, self.space) == (mine.host, mine.boot, mine.space)

    @property
    def dead(self) -> bool:
        """Whether it is certain that the process is gone."""
        if not self.here:
            return False  # another machine: this one cannot know
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False
        return self.started != _started(self.pid)


def this_process() -> Owner:
    """What a lock file of this process says."""
    pid = os.getpid()
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 (the link names no file)
    boot = _text(Path("/proc/sys/kernel/random/boot_id"))
    return Owner(os.uname().nodename, boot, space, pid, _started(pid))


class TargetLock:
    """The lock at `path`; `take` it, and `release` it when everything is done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def take(self) -> None:
        """Lock, without waiting. Raises `WriteError` where another run holds the lock."""
        for _ in range(_TRIES):
            fd, made = self._open()
            if fd < 0:
                continue
            try:
                locked = self._lock(fd, made=made)
            except BaseException as error:
                if made and isinstance(error, OSError):  # no run's: it could not be locked
                    with suppress(OSError):
                        self.path.unlink()
                os.close(fd)
                raise
            if locked:
                self._fd = fd
                self._sign()
                self._clear()
                return
            os.close(fd)
        raise self._busy(None)

    @property
    def held(self) -> bool:
        """Whether the file of that name still is the one that was locked."""
        return self._fd >= 0 and identity_of(self.path) == identity(os.fstat(self._fd))

    def release(self) -> None:
        """Remove the file and release it; if that fails, the next run does it."""
        if self._fd < 0:
            return
        with suppress(OSError):
            if self.held:
                self.path.unlink()
        with suppress(OSError):
            os.close(self._fd)
        self._fd = -1

    def _open(self) -> tuple[int, bool]:
        """The file, and whether it was made; -1 where it went meanwhile."""
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, 0o666), True
        except FileExistsError:
            pass
        for access in (os.O_RDWR, os.O_RDONLY):
            try:
                return os.open(self.path, access | _FLAGS), False
            except FileNotFoundError:
                break
            except PermissionError:
                if access == os.O_RDONLY:
                    raise
        return -1, False

    def _lock(self, fd: int, *, made: bool) -> bool:
        """Whether the file is locked; False: another file has its name now, look again."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._busy(_owner(fd)) from None
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            return made or self._break(fd)
        return identity_of(self.path) == identity(os.fstat(fd))

    def _break(self, fd: int) -> bool:
        """Remove a file that a killed run made, so that it can be made again; always False.

        Raises `WriteError` unless its maker is certainly gone.
        """
        owner = _owner(fd)
        status = os.fstat(fd)
        if not _is_stale(owner, status):
            raise self._busy(owner)
        # Two runs may come here at once: each takes aside what has the name, and looks what it got.
        aside = self.path.with_name(f"{self._aside}{os.getpid()}")
        with suppress(FileNotFoundError):
            self.path.rename(aside)
            if identity_of(aside) == identity(status):
                aside.unlink()
            else:  # the other run's new file
                with suppress(OSError):
                    os.link(aside, self.path)
                aside.unlink()
        return False

    @property
    def _aside(self) -> str:
        """How the names begin of files that were taken aside."""
        return f"{self.path.name[:200]}."

    def _clear(self) -> None:
        """Remove the files that killed runs took aside."""
        with suppress(OSError), os.scandir(self.path.parent) as found:
            for one in found:
                number = one.name.removeprefix(self._aside)
                if number != one.name and number.isdecimal():
                    _remove_stale(self.path.with_name(one.name))

    def _sign(self) -> None:
        """Write into the file who holds it: for other runs' messages, and for `_break`."""
        with suppress(OSError):  # opened for reading only: another user's, whose run was killed
            os.truncate(self._fd, 0)
            os.pwrite(self._fd, msgspec.json.encode(this_process()), 0)

    def _busy(self, owner: Owner | None) -> WriteError:
        who = "another process" if owner is None else f"process {owner.pid} on {owner.host}"
        return WriteError(
            f"{who} is writing this output.",
            path=self.path,
            hint="Wait for it to end. If no such process runs any more, remove this file.",
        )


def _owner(fd: int) -> Owner | None:
    try:
        return msgspec.json.decode(os.pread(fd, _MAX_NBYTES, 0), type=Owner)
    except (OSError, ValueError, msgspec.MsgspecError):
        return None


def _is_stale(owner: Owner | None, status: os.stat_result) -> bool:
    """Whether the run that made a lock file is certainly gone."""
    if owner is not None:
        return owner.dead
    return time.time() - status.st_mtime > _NAMELESS


def _remove_stale(path: Path) -> None:
    """Remove the lock file of a run that is certainly gone; anything else stays."""
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | _FLAGS)
        try:
            status, owner = os.fstat(fd), _owner(fd)
            is_lock = stat.S_ISREG(status.st_mode) and (owner is not None or status.st_size == 0)
            if is_lock and _is_stale(owner, status):
                path.unlink()
        finally:
            os.close(fd)


def _started(pid: int) -> str:
    """When a process started, in the kernel's ticks since boot; see proc_pid_stat(5)."""
    # The second field is the program's name in brackets, and may hold anything.
    _, _, fields = _text(Path(f"/proc/{pid}/stat")).rpartition(")")
    return fields.split()[19] if fields else ""


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace").strip()
    except OSError:
        return ""
