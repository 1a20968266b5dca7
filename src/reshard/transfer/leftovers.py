"""What runs leave beside an output, how reshard recognises it as its own, and how it is removed.

    .NAME.partial-DIGEST/    a run's own folder
        run.json             {"reshard": version, "target": NAME}: marks it as such
        journal              which pieces are finished (`journal`); locked while the run lives
        new/                 the output, as it will stand under NAME
        tmp/                 files that are being written, by digests of their names
        old/                 what stood under NAME, where old and new cannot exchange in one step

Only the holder of the lock on NAME calls these functions, so no other run of NAME is alive.
"""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from pathlib import Path

import msgspec
import xxhash
from msgspec import Struct

from reshard._version import __version__
from reshard.core.findings import Finding
from reshard.core.sizes import span
from reshard.storage.local import MAX_NAME
from reshard.storage.paths import real
from reshard.storage.source import close_read
from reshard.transfer import journal
from reshard.transfer.system import Identity, identity, sync_folder, write_fully

MARK = "run.json"
JOURNAL = "journal"
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_MARK = 4096
# The unit of `st_blocks`, whatever the file system's own.
_BLOCK_NBYTES = 512


class _Mark(Struct, frozen=True):
    reshard: str
    target: str


def beside(target: Path, suffix: str) -> Path:
    """The path of `.NAME` with a suffix, beside the output; a name that is too long is cut."""
    name = f".{target.name}{suffix}"
    if len(os.fsencode(name)) > MAX_NAME:
        digest = xxhash.xxh3_64_hexdigest(os.fsencode(target.name))
        kept = os.fsencode(target.name)[: MAX_NAME - len(suffix) - len(digest) - 2]
        name = f".{os.fsdecode(kept)}~{digest}{suffix}"
    return target.with_name(name)


def mark(own: Path, target: Path) -> None:
    """Mark a folder as a run's own."""
    text = msgspec.json.encode(_Mark(__version__, _named(target)))
    fd = os.open(own / MARK, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        write_fully(fd, memoryview(text), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def put_back(target: Path) -> list[Finding]:
    """If a killed run had moved the old output aside and nothing took its place, put it back."""
    if os.path.lexists(target):
        return []
    for own in _partials(target):
        if (own / "old").is_dir() and is_ours(own, target):
            (own / "old").rename(target)
            sync_folder(target.parent)
            return [
                Finding(
                    "old-output-restored",
                    "a run that was killed had moved the old output aside; it is back in its "
                    "place.",
                    subject=os.fspath(target),
                )
            ]
    return []


def clear(target: Path, resumed: Path | None = None) -> list[Finding]:
    """Remove what killed runs of this output left; if that is not certain, only name it.

    With `resumed`, the folder of a run that may be continued, that folder stays, and what runs of
    other plans left is named and stays, too.
    """
    return [_cleared(own, target, resumed) for own in _partials(target) if own != resumed]


def _cleared(own: Path, target: Path, resumed: Path | None) -> Finding:
    what, fix = described(own), ""
    code, reason = "partial-output", "it was removed"
    if not is_ours(own, target):
        code, reason = "partial-output-kept", "no run of this user made it, so it was not removed"
    elif journal.is_held(own / JOURNAL):
        code, reason = "partial-output-kept", "a process writes into it, so it was not removed"
        fix = "Wait for that process to end, or end it."
    elif resumed is not None:
        code, reason = "partial-output-kept", "it is of other options or inputs, and was kept"
        fix = "To continue it, run that command again with --resume. Without, it is removed."
    elif (error := remove_tree(own, identity(own.lstat()))) is not None:
        code, reason = "partial-output-kept", f"it cannot be removed: {error.strerror or error}"
    message = f"an interrupted run of this output left {what}; {reason}."
    return Finding(code, message, subject=os.fspath(own), fix=fix)


def described(own: Path) -> str:
    """The name of a run's own folder, how long ago the run made something, and its size."""
    return f"{own.name}, {age(own)} old, {_nbytes(own):,} bytes"


def reclaimable(target: Path) -> int:
    """Bytes on the disk of what killed runs of this output left: a run removes or reuses it."""
    try:
        return sum(_nbytes(o, allocated=True) for o in _partials(target) if is_ours(o, target))
    except OSError:  # the folder above the output is not there yet
        return 0


def is_there(target: Path) -> bool:
    """Whether a run of this user left something of this output that can be continued."""
    try:
        return any(is_ours(own, target) for own in _partials(real(target)))
    except OSError:
        return False


def temporary(name: str) -> str:
    """What a file of the output is called while it is written: it fits where its name fits."""
    return xxhash.xxh3_128_hexdigest(os.fsencode(name))


def gather(own: Path) -> bool:
    """Give the finished files of an interrupted run their temporary names again.

    Of what else is there, nothing stays that is not a regular file of this user with one name.
    False where the folder is not as a run of reshard makes it. Raises `OSError`.
    """
    new, tmp = own / "new", own / "tmp"
    for folder in (new, tmp):
        with suppress(FileExistsError):  # or a run was killed right here
            folder.mkdir()
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return False
    for place, _, names in os.walk(new):  # it follows no links
        for name in names:
            path = Path(place) / name
            path.rename(tmp / temporary(path.relative_to(new).as_posix()))
    for rest in (new, own / "old"):
        if os.path.lexists(rest) and (error := remove_tree(rest, identity(rest.lstat()))):
            raise error
    new.mkdir()
    with os.scandir(tmp) as listed:
        entries = list(listed)
    for entry in entries:
        status = entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            return False
        if not _is_own_file(status):
            (tmp / entry.name).unlink()
    return True


def _is_own_file(status: os.stat_result) -> bool:
    """Whether it is a regular file of this user that no other name leads to."""
    regular = stat.S_ISREG(status.st_mode)
    return regular and status.st_uid == os.geteuid() and status.st_nlink == 1


def is_ours(own: Path, target: Path) -> bool:
    """Whether it is certain that a run of this user made the folder for this output."""
    try:
        fd = os.open(own, _OPEN)
    except OSError:
        return False
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            return False
        names = os.listdir(fd)  # noqa: PTH208 (a descriptor is not a path)
        if not names:
            return True  # killed before it could say what it is; there is nothing to lose
        found = os.open(MARK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=fd)
        try:
            if not stat.S_ISREG(os.fstat(found).st_mode):
                return False
            text = os.read(found, _MAX_MARK)
        finally:
            close_read(found)
        if not text and names == [MARK]:
            return True
        return msgspec.json.decode(text, type=_Mark).target == _named(target)
    except (OSError, ValueError, msgspec.MsgspecError):
        return False
    finally:
        close_read(fd)


def remove_tree(folder: Path, known: Identity) -> OSError | None:
    """Delete a folder if it still is the one of that identity; the first error, if any.

    What can be deleted is deleted, whatever cannot. No link is followed, and no other file system
    that is mounted inside is entered.
    """
    try:
        fd = os.open(folder, _OPEN)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    try:
        status = os.fstat(fd)
        if identity(status) != known:
            return None
        failed = _empty(fd, status.st_dev)
    except OSError as error:
        failed = error
    finally:
        close_read(fd)
    if failed is None:
        try:
            folder.rmdir()
        except OSError as error:
            failed = error
    return failed


def _empty(fd: int, device: int) -> OSError | None:
    """Delete what is in an open folder; the first error."""
    first: OSError | None = None
    with os.scandir(fd) as listed:
        entries = list(listed)
    # The mark last: the rest of a folder must stay recognisable.
    for entry in sorted(entries, key=lambda entry: entry.name == MARK):
        try:
            if first is not None and entry.name == MARK:
                continue
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=fd)
                continue
            inner = os.open(entry.name, _OPEN, dir_fd=fd)
            try:
                status = os.fstat(inner)
                failed = _empty(inner, device) if status.st_dev == device else None
            finally:
                close_read(inner)
            if failed is not None:
                raise failed
            os.rmdir(entry.name, dir_fd=fd)
        except FileNotFoundError:
            continue
        except OSError as error:
            first = first or error
    return first


def _partials(target: Path) -> list[Path]:
    """What has the name of a run's own folder for this output."""
    prefix = beside(target, ".partial-" + "0" * 16).name[:-16]
    try:
        with os.scandir(target.parent) as entries:
            named = [entry for entry in entries if entry.name.startswith(prefix)]
            return sorted(Path(e.path) for e in named if e.is_dir(follow_symlinks=False))
    except PermissionError:  # one may write into the folder and not list it
        return []


def _named(target: Path) -> str:
    return os.fsencode(target.name).decode("utf-8", "backslashreplace")


def _nbytes(folder: Path, *, allocated: bool = False) -> int:
    """Bytes of the files in a folder, or those that they take on the disk, as far as they can be
    seen."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                status = (Path(place) / name).lstat()
                total += status.st_blocks * _BLOCK_NBYTES if allocated else status.st_size
    return total


def age(own: Path) -> str:
    """How long ago a run noted something in its own folder, in words."""
    last = own.lstat().st_mtime
    with suppress(OSError):
        last = max(last, (own / JOURNAL).lstat().st_mtime)
    return span(time.time() - last)
