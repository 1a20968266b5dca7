"""What a transfer did, and the digests of the tensors that it wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from msgspec import Struct, field

from reshard.core.digests import joined
from reshard.core.findings import Finding
from reshard.transfer.checksums import Checked
from reshard.transfer.finite import NotFinite
from reshard.transfer.reading import Known


class Outcome(Struct, frozen=True):
    """What a transfer did.

    `digests` are those of each tensor (`core.digests`), by table and name. `checked` counts the
    checksums of the source that were compared, and the stretches without. `not_finite` are tensors
    that hold NaN or infinity, by table and name. `changed` counts the slots whose values differ
    from their reference, of `compared`. `findings` say what happened on the way: to what earlier
    runs left, to the output that was replaced, to workers. `read_back` are digests of bytes of the
    written files, read from them again. `reused` are the bytes that an interrupted run had made, of
    which `damaged` pieces were not as it noted them.
    """

    digests: Mapping[tuple[str, str], str]
    bytes_read: int
    checked: Checked
    compared: int
    changed: int
    not_finite: Mapping[tuple[str, str], NotFinite] = {}
    findings: tuple[Finding, ...] = ()
    read_back: Known = field(default_factory=dict)
    reused: int = 0
    damaged: int = 0


class Digests(Mapping[tuple[str, str], str]):
    """The digests of tensors, by table and name, in the order of the output.

    Each is put together from those of its leaves. Most tensors have one, which is kept as its 16
    bytes: an output may have 200,000 tensors.
    """

    def __init__(self) -> None:
        self._tables: dict[str, dict[str, bytes | dict[int, bytes]]] = {}

    def begin(self, table: str, name: str) -> None:
        """Note that the leaves of a tensor will follow."""
        self._tables.setdefault(table, {})[name] = b""

    def put(self, table: str, name: str, leaf: int, digest: bytes) -> None:
        """Note a leaf's digest."""
        names = self._tables[table]
        known = names[name]
        if not known and leaf == 0:
            names[name] = digest
        elif isinstance(known, bytes):
            names[name] = {0: known, leaf: digest}
        else:
            known[leaf] = digest

    def __getitem__(self, key: tuple[str, str]) -> str:
        table, name = key
        found = self._tables[table][name]
        if isinstance(found, bytes):
            return joined([found] if found else [])
        return joined([found[leaf] for leaf in sorted(found)])

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for table, names in self._tables.items():
            for name in names:
                yield table, name

    def __len__(self) -> int:
        return sum(map(len, self._tables.values()))
