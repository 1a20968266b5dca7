"""Whether one rank's file was copied over another's.

Nothing in a `.distcp` file says which rank wrote it, or which tensors it holds: only the metadata
does. Rank files of torch.save name the rank only sometimes. A file in another's place is noticed if
its tensors have other sizes. With even shards the sizes are equal; then only the values show it,
because no two ranks have equal shards of all tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from reshard.core.records import Records
from reshard.core.tensors import Record
from reshard.errors import IncompleteError
from reshard.storage.local import Sources

# Bytes of an item that are read to see whether its elements differ.
_SAMPLE = 1 << 16
# The widest element is complex128.
_ITEMSIZE = 16


def check(records: Mapping[str, Iterable[Record]], sources: Sources) -> None:
    """Refuse two files that hold the same shards of the same tensors.

    `records` are the checksums of each tensor's chunks, all of which are different parts of it.
    Raises `IncompleteError`.
    """
    check_each(((name, record) for name, found in records.items() for record in found), sources)


def check_each(records: Iterable[tuple[str, Record]], sources: Sources) -> None:
    """The same for checksums that are given each with its tensor's name."""
    files: dict[str, tuple[list[str], Records]] = {}
    for name, record in records:
        names, held = files.setdefault(record.extent.file.path, ([], Records()))
        names.append(name)
        held.add(record)
    seen: dict[tuple[tuple[str, ...], bytes], str] = {}
    varies: dict[tuple[int, int], bool] = {}

    def differs(record: Record) -> bool:
        content = (record.extent.nbytes, record.crc32)
        if content not in varies:
            varies[content] = _varies(record, sources)
        return varies[content]

    for path, (names, held) in files.items():
        other = seen.setdefault((tuple(names), held.numbers()), path)
        if other != path and any(map(differs, held)):
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
