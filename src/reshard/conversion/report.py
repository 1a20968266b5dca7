"""What a conversion did, for people and for machines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct, field
from msgspec.structs import asdict

from reshard.conversion.adapters import Summary
from reshard.conversion.destination import Replaced
from reshard.core.findings import Finding


class Report(Struct, frozen=True):
    """What a conversion did, or with `dry_run` would do.

    `missing` are tensors of the base that the output lacks, `unexpected` tensors of the checkpoint
    that were left out, `tied` names whose weights are stored under another name, `filled` tensors
    copied from the base. `merged` counts low-rank updates. `changed` of `compared` tensors differ
    from the base model's. `records_checked` checksums that the source's files state were compared
    with what was read; of `records_unchecked` stretches of them they state none. `findings` are
    what a person should read. Sizes are bytes.
    """

    source: str
    target: str
    format: str
    tag: str | None
    num_tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    verified: bool
    files: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    filled: tuple[str, ...] = ()
    prefix: str = ""
    rules: tuple[str, ...] = ()
    merged: int = 0
    compared: int = 0
    changed: int = 0
    records_checked: int = 0
    records_unchecked: int = 0
    findings: tuple[Finding, ...] = ()
    dry_run: bool = False
    replaced: Replaced | None = None
    checkpoint: str = ""
    adapter: Summary | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """The findings' messages."""
        return tuple(finding.message for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values, as `convert --json` prints it."""
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name in self.__struct_fields__
            for value in (getattr(self, name),)
        }
        records = {
            name: None if record is None else _plain(record)
            for name, record in (("replaced", self.replaced), ("adapter", self.adapter))
        }
        findings = [finding.to_json() for finding in self.findings]
        return {**values, "findings": findings, **records}


def _plain(record: Struct) -> dict[str, Any]:
    """A record as JSON values, as they are after a round trip."""
    return {n: list(v) if isinstance(v, tuple) else v for n, v in asdict(record).items()}
