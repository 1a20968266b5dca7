"""Whether one rank's file was copied over another's.

Nothing in a `.distcp` file says which rank wrote it, or which tensors it holds: only the metadata
does. Rank files of torch.save name the rank only sometimes. A file in another's place is noticed if
its tensors have other sizes. With even shards the sizes are equal; then only the values show it,
because no two ranks have equal shards of all tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from reshard.core.tensors import Record
from reshard.errors import IncompleteError
from reshard.storage.local import Sources

# Bytes of an item that are read to see whether its elements differ.
_SAMPLE = 1 << 16
# The widest element is complex128.
_ITEMSIZE = 16


def check(records: Mapping[str, Sequence[Record]], sources: Sources) -> None:
    """Refuse two files that hold the same shards of the same tensors.

    `records` are the checksums of each tensor's chunks, all of which are different parts of it.
    Raises `IncompleteError`.
    """
    files: dict[str, list[tuple[str, Record]]] = {}
    for name, found in records.items():
        for record in found:
            files.setdefault(record.extent.file.path, []).append((name, record))
    seen: dict[tuple[tuple[str, int, int, int], ...], str] = {}
    varies: dict[tuple[int, int], bool] = {}

    def differs(record: Record) -> bool:
        content = (record.extent.nbytes, record.crc32)
        if content not in varies:
            varies[content] = _varies(record, sources)
        return varies[content]

    for path, held in files.items():
        content = tuple((n, r.extent.offset, r.extent.nbytes, r.crc32) for n, r in held)
        other = seen.setdefault(content, path)
        if other != path and any(differs(record) for _, record in held):
            raise IncompleteError(
                f"it holds the same values as {Path(other).name}, but each file must hold "
                "different shards: one rank's file was copied over another's.",
                path=path,
                hint="Copy the folder again, from where it was saved.",
            )


def _varies(record: Record, sources: Sources) -> bool:
    """Whether the elements differ: two ranks may well hold the same ones and zeros."""
    nbytes = min(record.extent.nbytes, _SAMPLE)
    data = sources.open(record.extent.file).read(record.extent.offset, nbytes)
    return data[_ITEMSIZE:] != data[:-_ITEMSIZE] and len(data) > _ITEMSIZE
