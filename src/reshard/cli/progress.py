"""Progress: a bar on a terminal, a line every half minute in a log, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import click

from reshard.cli import output
from reshard.core.sizes import size
from reshard.progress import StagedProgress

Shown = Literal["bar", "plain", "none"]
_SHOWN: tuple[Shown, ...] = ("bar", "plain", "none")
_VERBS = {"write": "writing", "verify": "verifying", "compare": "comparing"}
# Seconds between two lines of a log.
_EACH = 30.0
_F = TypeVar("_F", bound=Callable[..., Any])


def how_shown(function: _F) -> _F:
    """The flags `--progress` and `--quiet`."""
    function = click.option(
        "--quiet",
        "-q",
        is_flag=True,
        help="Print only errors (and the object of --json).",
    )(function)
    return click.option(
        "--progress",
        "shown",
        type=click.Choice(_SHOWN),
        help="How to show progress. bar: a progress bar (default on a terminal); plain: a line "
        "at the start and every half minute (default elsewhere); none (default with --json).",
    )(function)


@contextmanager
def shown_progress(
    shown: Shown | None = None, *, quiet: bool = False
) -> Iterator[StagedProgress | None]:
    """What to call with the progress of the work, shown on standard error; None for nothing.

    `shown` None: a bar on a terminal, lines elsewhere; with `quiet` nothing.
    """
    if shown is None:
        shown = "none" if quiet else "bar" if sys.stderr.isatty() else "plain"
    if shown == "none":
        yield None
    elif shown == "plain":
        yield Lines()
    else:
        with _bar() as show:
            yield show


class Lines:
    """Progress as lines: one at the start, then one every half minute.

    `now` and `each` are for tests: the clock, in seconds, and the seconds between two lines.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic, each: float = _EACH) -> None:
        self._now, self._each = now, each
        self._last: float | None = None
        self._began: dict[str, tuple[float, int]] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        now = self._now()
        verb = _VERBS.get(what, what)
        if self._last is None:
            self._last = now
            output.print_message(f"reshard: {verb} {size(total)}")
        began, first = self._began.setdefault(what, (now, done))
        if now - self._last < self._each:
            return
        self._last = now
        speed = (done - first) / max(now - began, 1e-9)
        left = f", {(total - done) / speed:.0f} s left" if speed > 0 and done < total else ""
        output.print_message(
            f"reshard: {verb} {size(done)} of {size(total)}, {size(int(speed))}/s{left}"
        )


@contextmanager
def _bar() -> Iterator[StagedProgress]:
    """A bar with bytes, speed and time left; without a colour that means an error."""
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
    from rich.theme import Theme

    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    names = ("bar.complete", "bar.finished", "progress.download", "progress.data.speed")
    theme = Theme(dict.fromkeys((*names, "progress.remaining"), "cyan"))
    with Progress(*columns, console=Console(stderr=True, theme=theme)) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(_VERBS.get(what, what), total=total)
            bar.update(tasks[what], completed=done)

        yield show
