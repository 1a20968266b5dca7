"""What users see: results on standard output, messages on standard error, colours with a meaning.

Red is an error, yellow a warning or an unverified result, green a verified result. Colours and bold
type are for terminals only, and not where NO_COLOR is set.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TextIO

import click
from msgspec.structs import asdict

from reshard.core.findings import Finding
from reshard.core.sizes import size
from reshard.errors import printable, shortened
from reshard.storage import requests
from reshard.storage.requests import Requests

__all__ = ["print_findings", "print_json", "print_message", "print_result", "print_table", "size"]

# Characters of a cell of a table: a file's names may be of any length. --json has them whole.
_MAX_CELL = 500
# A last column that has less room than this on a terminal is not broken into lines.
_LEAST_WIDTH = 24
_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan", "requests": "cyan"}

# What this process had asked stores for when its command began.
_asked = Requests()


def begin_counting() -> None:
    """Count what stores are asked for from here on."""
    global _asked
    _asked = requests.total()


def print_requests() -> None:
    """What stores were asked for, as a line on standard error; nothing where nothing was."""
    asked = requests.since(_asked)
    if asked is not None:
        print_message(str(asked), "requests")


def with_requests(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values, with what stores were asked for; null where nothing was."""
    asked = requests.since(_asked)
    return {**values, "requests": None if asked is None else asdict(asked)}


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on standard output."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    # A path may hold bytes that are not text, which Python spells as half a surrogate pair.
    click.echo(text if printable(text, lines=True) == text else json.dumps(value, indent=2))


def coloured(stream: TextIO) -> bool:
    """Whether colours are shown there: on a terminal that supports them, unless NO_COLOR is set."""
    known = os.environ.get("TERM", "") not in ("", "dumb")
    return stream.isatty() and known and not os.environ.get("NO_COLOR")


def print_result(text: str, label: str = "", *, lines: bool = False) -> None:
    """Print a result on standard output, after a coloured label; `lines`: its line breaks are
    ours."""
    click.echo(_labelled(printable(text, lines=lines), label, sys.stdout))


def print_message(text: str, label: str = "", *, lines: bool = False) -> None:
    """Print a message on standard error, after a coloured label; `lines`: its line breaks are
    ours."""
    click.echo(_labelled(printable(text, lines=lines), label, sys.stderr), err=True)


def _labelled(text: str, label: str, stream: TextIO) -> str:
    if not label:
        return text
    return f"{painted(f'{label}:', _COLOURS.get(label), stream)} {text}"


def painted(text: str, colour: str | None, stream: TextIO, *, bold: bool = False) -> str:
    """Text in a colour, where colours are shown."""
    styled = (colour or bold) and coloured(stream)
    return click.style(text, colour, bold=bold or None) if styled else text


def print_findings(findings: Iterable[Finding]) -> None:
    """Each finding as a line on standard error: a note, or a warning."""
    for finding in findings:
        print_message(finding.message, "note" if finding.severity == "info" else finding.severity)


def print_table(
    rows: Sequence[Sequence[str]],
    *,
    header: Sequence[str] = (),
    right: Collection[int] = (),
    colours: Mapping[str, str] | None = None,
) -> None:
    """A table on standard output, its columns lined up; those of `right` to the right.

    Names and paths are never cut. On a terminal, the last column is broken at spaces where it is
    too long, and without a header the first column is bold. `colours`: first cell of a row -> the
    colour of its last cell.
    """
    rows = [[printable(shortened(cell, _MAX_CELL)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*filter(None, (header, *rows)), strict=True)]
    indent = sum(width + 2 for width in widths[:-1])
    if header:
        title = "  ".join(_aligned(header, widths, right)).rstrip()
        click.echo(painted(title, None, sys.stdout, bold=True))
    for row in rows:
        cells = _aligned(row, widths, right)
        if not header:
            cells[0] = painted(cells[0], None, sys.stdout, bold=True)
        lines = _broken(row[-1], indent) if sys.stdout.isatty() else [cells[-1].rstrip()]
        if len(lines) == 1:
            lines = [cells[-1].rstrip()]
        lines = [painted(line, (colours or {}).get(row[0]), sys.stdout) for line in lines]
        click.echo("  ".join([*cells[:-1], lines[0]]).rstrip())
        for line in lines[1:]:
            click.echo(f"{'':{indent}}{line}")


def _aligned(row: Sequence[str], widths: Sequence[int], right: Collection[int]) -> list[str]:
    """Cells of a row, filled up to the widths of their columns."""
    return [
        cell.rjust(width) if column in right else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _broken(text: str, indent: int) -> list[str]:
    """A cell in lines that fit a terminal; a word that is too long stays whole."""
    room = shutil.get_terminal_size().columns - indent - 1
    if len(text) <= room or room < _LEAST_WIDTH:
        return [text]
    return textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [text]
