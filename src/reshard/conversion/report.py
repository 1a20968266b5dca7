"""What a conversion did, for people and for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import starmap
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from reshard.conversion.adapters import Summary
from reshard.conversion.destination import Replaced
from reshard.core.findings import Finding
from reshard.core.notebook import html_table
from reshard.core.sizes import size
from reshard.core.state import TrainingState
from reshard.errors import brief, listed, printable
from reshard.naming.matching import Matching
from reshard.storage.requests import Requests


class Moments(Struct, frozen=True):
    """The training state that was written: the kinds of moments, of how many parameters, in how
    many groups, after how many steps (the fewest and the most), and their bytes."""

    kinds: tuple[str, ...]
    num_parameters: int
    num_groups: int
    steps: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, state: TrainingState) -> Moments:
        """What a state amounts to."""
        names, groups = len(state.names), len(state.groups)
        return cls(tuple(state.moments), names, groups, state.step_range, state.nbytes)

    def __str__(self) -> str:
        steps = " to ".join(map(str, self.steps))
        at = f", step {steps}" if steps else ""
        return (
            f"{', '.join(self.kinds)} of {self.num_parameters} parameters in {self.num_groups} "
            f"groups{at}, {size(self.nbytes)}"
        )


class Report(Struct, frozen=True):
    """What a conversion did, or with `dry_run` would do.

    `matching` says what of the base and the checkpoint is missing, filled, unexpected, tied and
    resized; each is an attribute as well. `merged` counts low-rank updates. `changed` of `compared`
    tensors differ from the base model's. `records_checked` checksums that the source's files state
    were compared with what was read; of `records_unchecked` stretches of them they state none.
    `copied` are the files that come from the base as they are, `config` the fields of its
    config.json that change, with both values. `memory` is about what the process will hold at most,
    which only a dry run estimates. `requests` are those to stores, where a path was a URL.
    `bytes_reused` are those that an interrupted run had made; None without `resume`. `findings` are
    what a user should know. Sizes are bytes.
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
    matching: Matching = Matching()
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
    state: Moments | None = None
    requests: Requests | None = None
    copied: tuple[str, ...] = ()
    config: Mapping[str, tuple[object, object]] = {}
    memory: int | None = None
    bytes_reused: int | None = None

    def rows(self) -> list[tuple[str, str]]:
        """The report as lines of a label and its words, as `convert` shows it."""
        dry = self.dry_run
        rows = [
            ("source", f"{self.checkpoint} ({self.format}{_tagged(self.tag)})"),
            ("target", f"{self.target}{' (dry run: nothing was written)' * dry}"),
            ("tensors", f"{self.num_tensors} in {_files(self.files)}"),
            ("would read" if dry else "read", size(self.bytes_read)),
            ("would write" if dry else "written", size(self.bytes_written)),
        ]
        if self.bytes_reused is not None:
            reused = f"{size(self.bytes_reused)} of an interrupted run"
            rows.append(("reused", reused if self.bytes_reused else "nothing of an earlier run"))
        if self.state is not None:
            rows.insert(3, ("optimizer", str(self.state)))
        if self.memory is not None:
            rows.append(("memory", f"at most about {size(self.memory)}"))
        if self.copied and dry:
            rows.append(("copied", f"{listed(self.copied)}, from the base"))
        if self.config:
            rows.append(("config", listed([*starmap(_changed, self.config.items())])))
        if self.replaced is not None:
            rows.insert(2, ("would replace" if dry else "replaced", str(self.replaced)))
        if self.rules or self.prefix:
            prefix = [f"prefix {self.prefix!r} stripped"] if self.prefix else []
            rows.append(("names", "; ".join([*prefix, *self.rules])))
        rows += self.matching.rows()
        if self.adapter is not None:
            rows.append(("adapter", str(self.adapter)))
        if self.merged:
            rows.append(("merged", f"{self.merged} low-rank updates"))
        if self.compared:
            rows.append(("changed", f"{self.changed} of {self.compared} differ from the base"))
        if not dry:
            speed = self.bytes_written / max(self.seconds, 1e-3)
            unread = "NOT VERIFIED: the output was not read back"
            rows.append(("checksums", self._checksums()))
            rows.append(("verified", "yes, read back" if self.verified else unread))
            rows.append(("time", f"{self.seconds:.1f} s, {size(int(speed))}/s"))
        if self.requests is not None:
            rows.append(("requests", str(self.requests)))
        return rows

    def _checksums(self) -> str:
        """How many of the source's checksums were compared, and that the rest has none."""
        total = self.records_checked + self.records_unchecked
        told = f"{self.records_checked} of {total} source checksums"
        if not self.records_unchecked:
            return f"{told} compared"
        lacking = "this format has none" if not self.records_checked else "the others have none"
        return f"{told}: {lacking}"

    def __str__(self) -> str:
        lines = [f"{label:<13} {printable(words)}" for label, words in self.rows()]
        return "\n".join([*lines, *(f"{f.severity}: {f.message}" for f in self.findings)])

    def __repr__(self) -> str:
        how = "dry run" if self.dry_run else "verified" if self.verified else "not verified"
        written = f"{self.num_tensors} tensors, {size(self.bytes_written)}, {how}"
        return f"<Report {self.target!r}: {written}, {len(self.findings)} finding(s)>"

    @property
    def missing(self) -> tuple[str, ...]:
        """Tensors of the base that the output lacks."""
        return self.matching.missing

    @property
    def filled(self) -> tuple[str, ...]:
        """Tensors that were copied from the base."""
        return self.matching.filled

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Tensors of the checkpoint that were left out."""
        return self.matching.unexpected

    @property
    def tied(self) -> Mapping[str, str]:
        """A name that is not stored -> the name that its weights are stored under."""
        return self.matching.tied

    def _repr_html_(self) -> str:
        """The report as a notebook shows it."""
        findings = [(f.severity, f.message) for f in self.findings]
        return html_table(f"Report: {self.target}", [*self.rows(), *findings])

    @property
    def warnings(self) -> tuple[str, ...]:
        """The findings' messages."""
        return tuple(finding.message for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values, as `convert --json` prints it."""
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name in self.__struct_fields__
            if name != "matching"
            for value in (getattr(self, name),)
        }
        records = {
            name: None if struct is None else _plain(struct)
            for name, struct in (
                ("replaced", self.replaced),
                ("adapter", self.adapter),
                ("state", self.state),
                ("requests", self.requests),
            )
        }
        findings = [finding.to_json() for finding in self.findings]
        values["config"] = {path: list(pair) for path, pair in self.config.items()}
        return {**values, **self.matching.to_json(), "findings": findings, **records}


def _files(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} files"


def _changed(path: str, values: tuple[object, object]) -> str:
    """A field of config.json that changes, in words."""
    before, after = (brief(value) for value in values)
    if values[1] is None:
        return f"{path} removed"
    return f"{path} {after}" if values[0] is None else f"{path} {before} -> {after}"


def _tagged(tag: str | None) -> str:
    return f", tag {tag}" if tag else ""


def _plain(struct: Struct) -> dict[str, Any]:
    """A struct as JSON values, as they are after a round trip."""
    return {n: list(v) if isinstance(v, tuple) else v for n, v in asdict(struct).items()}
