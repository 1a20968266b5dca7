"""What people see: results on standard output, talk and progress on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

from reshard.core.findings import Finding
from reshard.core.sizes import size
from reshard.errors import printable, shortened
from reshard.progress import StagedProgress

__all__ = ["print_json", "print_table", "progress_bar", "say", "say_findings", "size", "tell"]

# Characters of a cell of a table: a file's names may be of any length. --json has them whole.
_MAX_CELL = 500
_VERBS = {"write": "writing", "verify": "verifying", "compare": "comparing"}


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on standard output."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    # A path may hold bytes that are no text, which Python spells as half a surrogate pair.
    click.echo(text if printable(text, lines=True) == text else json.dumps(value, indent=2))


def tell(text: str) -> None:
    """A result in words on standard output."""
    click.echo(printable(text))


def say(text: str) -> None:
    """A remark on standard error."""
    click.echo(printable(text), err=True)


def print_table(
    rows: Sequence[Sequence[str]], *, header: Sequence[str] = (), title: str | None = None
) -> None:
    """A table on standard output; plain columns where that is no terminal."""
    rows = [[printable(shortened(cell, _MAX_CELL)) for cell in row] for row in rows]
    title = None if title is None else printable(title)
    if not sys.stdout.isatty():
        _print_columns([header, *rows] if header else rows, title)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD if header else None,
        show_header=bool(header),
        title=Text(title) if title else None,
    )
    width = max((len(row) for row in rows), default=len(header))
    for column in range(width):
        name = header[column] if header else ""
        table.add_column(name, style="bold" if column == 0 and not header else None)
    for row in rows:
        table.add_row(*map(Text, row))  # a name may look like rich's markup
    Console(highlight=False).print(table)


def _print_columns(rows: Sequence[Sequence[str]], title: str | None) -> None:
    """Rows whose columns line up, without rich: it takes 0.1 s to import."""
    if title:
        click.echo(title)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


@contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[StagedProgress | None]:
    """A bar with bytes, speed and time left on standard error; None where that is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(_VERBS.get(what, what), total=total)
            bar.update(tasks[what], completed=done)

        yield show


def say_findings(findings: Iterable[Finding]) -> None:
    """Each finding as a line on standard error: a note, or a warning."""
    for finding in findings:
        say(f"{'note' if finding.severity == 'info' else finding.severity}: {finding.message}")
