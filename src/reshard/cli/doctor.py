"""The command `reshard doctor`: flags in, `reshard.doctor`, a table or JSON out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reshard.cli import output
from reshard.cli.flags import Command, argument, debug, flags, json_flag
from reshard.cli.interrupts import writes
from reshard.cli.progress import Shown, how_shown, shown_progress
from reshard.core.findings import CODES
from reshard.diagnosis.declared import DOCTOR

if TYPE_CHECKING:
    from reshard.diagnosis.diagnosis import Diagnosis


@click.command(cls=Command, short_help="Find what is wrong with an exported model.")
@argument("folder", DOCTOR["folder"], metavar="DIR")
@flags(DOCTOR.values())
@how_shown
@json_flag
@debug
@writes("repair")
def doctor(folder: Path, as_json: bool, shown: Shown | None, quiet: bool, **options: Any) -> int:
    """Find what is wrong with the exported model in DIR, and repair it; or with the training
    checkpoint there, which is not repaired.

    The exit code is 1 if an error remains unrepaired; with --strict, also for a warning.
    """
    from reshard.diagnosis.diagnosis import doctor as run

    with shown_progress(shown, quiet=as_json or quiet) as progress:
        diagnosis = run(folder, progress=progress, **options)
    if as_json:
        output.print_json(output.with_requests(diagnosis.to_json()))
    elif not quiet:
        _show(diagnosis, asked=options["repair"] is not None)
        output.print_requests()
    return 1 if diagnosis.errors else 0


def _show(diagnosis: Diagnosis, *, asked: bool) -> None:
    for finding in diagnosis.findings:
        # Names are not broken over lines as a table would: people search for them.
        output.print_result(f"{finding.code}: {CODES[finding.code].meaning}")
        output.print_result(f"  {finding.message}")
    if diagnosis.findings:
        header = ("finding", "severity", "repair")
        output.print_table(list(_rows(diagnosis)), header=header)
    amount = output.size(diagnosis.total_bytes)
    output.print_result(
        f"{diagnosis.folder}: {diagnosis.num_tensors} tensors, {amount}: {_sum(diagnosis)}"
    )
    if diagnosis.repaired is not None:
        output.print_result(f"Repaired in {diagnosis.repaired}, read back and examined again.")
        return
    hopeless = [
        f.code
        for f in diagnosis.remaining
        if f.severity == "error" and f.code not in diagnosis.repairable
    ]
    if asked and hopeless:
        output.print_message(
            f"Nothing was written: {', '.join(hopeless)} cannot be repaired from what is here."
        )
    elif diagnosis.repairable and not hopeless:
        base = f" --base {diagnosis.base}" if diagnosis.base else ""
        output.print_message(f"To repair it: reshard doctor {diagnosis.folder}{base} --repair OUT")


def _rows(diagnosis: Diagnosis) -> Iterator[tuple[str, str, str]]:
    for finding in diagnosis.findings:
        words = finding.fix if finding.code in diagnosis.repairable else f"none. {finding.fix}"
        yield finding.code, finding.severity, words


def _sum(diagnosis: Diagnosis) -> str:
    errors = sum(finding.severity == "error" for finding in diagnosis.findings)
    warnings = len(diagnosis.findings) - errors
    if not diagnosis.findings:
        return "nothing is wrong with it." if diagnosis.base else _UNCOMPARED
    return f"{errors} error(s), {warnings} warning(s)."


_UNCOMPARED = "nothing is wrong with it by itself; --base compares it with the base model."
