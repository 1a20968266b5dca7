"""The command `reshard watch`: flags in, `reshard.watching`, a line for each thing that happens."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reshard.cli import output
from reshard.cli.flags import Command, argument, debug, flags
from reshard.cli.interrupts import Interrupted
from reshard.cli.progress import Shown, how_shown, shown_progress
from reshard.watching.declared import CONVERSION, WATCH

if TYPE_CHECKING:
    from reshard.progress import StagedProgress
    from reshard.watching.watch import Event

_EXAMPLES = (
    "reshard watch results/run/_actor converted --base Qwen2.5-7B",
    "reshard watch outputs converted --base Qwen2.5-7B --keep 3 --then 'python evaluate.py'",
)


@click.command(
    cls=Command,
    examples=_EXAMPLES,
    usage="RUN OUT --base MODEL [OPTIONS]",
    short_help="Follow a run: convert each save once it is complete.",
)
@argument("run", WATCH["run"])
@argument("out", WATCH["out"])
@flags(WATCH.values())
@click.option(
    "--once",
    is_flag=True,
    help="Convert the saves that are complete now, then exit, with code 1 if a save failed.",
)
@flags(CONVERSION.values())
@how_shown
@debug
def watch(
    run: Path, out: Path, once: bool, shown: Shown | None, quiet: bool, **options: Any
) -> int:
    """Convert each save of the run in RUN into OUT/STEP, once it is complete.

    watch runs until it is interrupted (Ctrl-C, SIGTERM), and leaves nothing half done.
    OUT/watch.json records what was done; the same command continues from there.
    """
    from reshard.watching.watch import watch as follow

    bar = ExitStack()
    show: StagedProgress | None = None

    def progress(what: str, done: int, total: int) -> None:
        nonlocal show
        if show is None:
            show = bar.enter_context(shown_progress(shown, quiet=quiet)) or _nothing
        show(what, done, total)

    def listen(event: Event) -> None:
        nonlocal show
        bar.close()  # each conversion has its own
        show = None
        line = f"{time.strftime('%H:%M:%S')} {event.save} {event.message}"
        if event.failed:
            output.print_message(line, "error", lines=True)
        elif not quiet:
            output.print_result(line, lines=True)

    try:
        with bar:
            failed = follow(run, out, once=once, listen=listen, progress=progress, **options)
    except KeyboardInterrupt as error:
        again = "run the command again to go on"
        raise Interrupted(f"{out}/watch.json says what was done; {again}.") from error
    return 1 if failed else 0


def _nothing(what: str, done: int, total: int) -> None:
    """Progress that is not shown."""
