"""Identify a file across runs: whether it is still the file that an earlier run read."""

from __future__ import annotations

from pathlib import Path

from reshard.core.tensors import FileRef
from reshard.storage.local import Sources
from reshard.storage.paths import status
from reshard.storage.source import RemoteSource, changed, identity_of

#: Numbers or words that differ once a file is replaced or written to.
Fingerprint = tuple[int | str, ...]


def fingerprint(path: str, sources: Sources) -> Fingerprint:
    """A file's inode, size, and the times of its content and of its inode, in ns.

    Not its device, which has another number after another mount. The time of the inode shows that
    a file was written to, whatever time of content it was given. Of an object of a store it is the
    object's identity. Raises as `Sources.open` does, and `IncompleteError` where it is no longer
    the file that was opened.
    """
    source = sources.open(FileRef(path))
    if isinstance(source, RemoteSource):
        return tuple(map(str, source.identity))  # numbers of more than 64 bits
    now = status(Path(path))
    if identity_of(now) != source.identity:
        raise changed(path)
    return (now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
