"""What a benchmark found, as JSON: every run of every contender, in every cell."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

#: The files of a conversion of so large a model exceed the memory of a small machine.
LARGE_GB = 4.0


class Sample(Struct, frozen=True, omit_defaults=True):
    """One run. `read`, `written`, `reads`, `writes` are those of `measure.Calls`; None (as
    `cpu_seconds`, too) of a row that is a part of another's run. `temporary_nbytes` were on the
    disk beside the output, at most."""

    round: int
    seconds: float
    peak_nbytes: int
    cpu_seconds: float | None = None
    read: int | None = None
    written: int | None = None
    reads: int | None = None
    writes: int | None = None
    output_nbytes: int = 0
    temporary_nbytes: int = 0


class Row(Struct, frozen=True):
    """A contender's runs in a cell."""

    contender: str
    samples: list[Sample]

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(sample.seconds for sample in self.samples)

    @property
    def least(self) -> float:
        return min(sample.seconds for sample in self.samples)

    @property
    def most(self) -> float:
        return max(sample.seconds for sample in self.samples)

    @property
    def peak_nbytes(self) -> int:
        return max(sample.peak_nbytes for sample in self.samples)

    @property
    def temporary_nbytes(self) -> int:
        return max(sample.temporary_nbytes for sample in self.samples)

    def median(self, field: str) -> float | None:
        """The median of a field of the samples; None where they do not have it."""
        found = [getattr(sample, field) for sample in self.samples]
        known = [value for value in found if value is not None]
        return statistics.median(known) if known else None


class Skipped(Struct, frozen=True):
    """A contender that did not run in a cell, and why."""

    contender: str
    why: str


class Cell(Struct, frozen=True):
    """A direction at a size: `gb` as it was asked for, `nbytes` what the output has."""

    direction: str
    gb: float
    nbytes: int
    rows: list[Row]
    skipped: list[Skipped] = []

    def row(self, contender: str) -> Row | None:
        """A contender's row; None where it did not run."""
        return next((row for row in self.rows if row.contender == contender), None)


class Start(Struct, frozen=True):
    """A command on a tiny model in memory: CPU and wall seconds of its runs."""

    name: str
    cpu_seconds: list[float]
    seconds: list[float]


class Results(Struct, frozen=True):
    """All of a benchmark. `machine` is what it ran on, `options` how it was called."""

    machine: dict[str, Any]
    options: dict[str, Any]
    cells: list[Cell]
    starts: list[Start] = []

    def of(self, direction: str, *, large: bool = False) -> list[Cell]:
        """The cells of a direction, by size: those that fit into memory, or the large ones."""
        own = [cell for cell in self.cells if cell.direction == direction]
        own = [cell for cell in own if (cell.gb >= LARGE_GB) == large]
        return sorted(own, key=lambda cell: cell.gb)

    def filled(self, direction: str, *, large: bool = False) -> list[Cell]:
        """Those of them that have figures."""
        return [cell for cell in self.of(direction, large=large) if cell.rows]

    def with_cells(self, cells: Sequence[Cell]) -> Results:
        """These results, with other cells added to theirs or put in their place."""
        new = {(cell.direction, cell.gb): cell for cell in cells if cell.rows}
        old = {(cell.direction, cell.gb): cell for cell in self.cells}
        return replace(self, cells=list({**old, **new}.values()))

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        text = msgspec.json.format(msgspec.json.encode(self), indent=1)
        path.write_bytes(text + b"\n")


def load(path: Path) -> Results:
    """The results in a file that `Results.save` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=Results)
