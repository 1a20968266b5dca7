"""Which file it is, beyond this run: whether what was read of it then can be read of it now."""

from __future__ import annotations

from pathlib import Path

from reshard.errors import IncompleteError
from reshard.storage.local import Sources
from reshard.storage.paths import status

#: Numbers or words that differ once a file is replaced or written to.
Fingerprint = tuple[int | str, ...]


def fingerprint(path: str, sources: Sources) -> Fingerprint:
    """A file's inode, size, and the times of its content and of its inode, in ns.

    Not its device, which has another number after another mount. The time of the inode shows that
    a file was written to, whatever time of content it was given. Raises as `Sources.open` does, and
    `IncompleteError` where it is no longer the file that was opened.
    """
    opened = sources.open(path).identity
    now = status(Path(path))
    if (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns) != opened:
        raise IncompleteError(
            "the file changed while it was read.",
            path=path,
            hint="Convert again once nothing writes to the checkpoint.",
        )
    return (now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
