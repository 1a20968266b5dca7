"""The commands of `reshard`: flags in, library calls, tables or JSON out. No other logic."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reshard.cli import output
from reshard.cli.flags import Command, argument, debug, flags, html, json_flag
from reshard.cli.interrupts import writes
from reshard.cli.next_steps import at_least, conversion_of, next_commands
from reshard.cli.progress import Shown, how_shown, shown_progress
from reshard.comparison.declared import VERIFY
from reshard.conversion.declared import CONVERT
from reshard.errors import ReshardError
from reshard.inspection import INSPECT
from reshard.progress import stage

if TYPE_CHECKING:
    from reshard.conversion.report import Report

_EXAMPLES = (
    "reshard convert results/run/_actor out --base Qwen2.5-7B       # DeepSpeed (LightRFT)",
    "reshard convert outputs/checkpoint-500 out --base Qwen2.5-7B   # FSDP (HF Trainer)",
    "reshard convert run/_actor out --base Qwen2.5-7B --lora-alpha 32   # LoRA, merged",
    "reshard convert Qwen2.5-7B out --to dcp                        # back to FSDP",
)


@click.command(
    cls=Command,
    examples=_EXAMPLES,
    usage="SRC DST --base MODEL [OPTIONS]",
    short_help="Convert the checkpoint SRC into the folder DST.",
)
@argument("source", CONVERT["source"], metavar="SRC")
@argument("target", CONVERT["target"], metavar="DST")
@flags(CONVERT.values())
@how_shown
@json_flag
@debug
@writes("target")
def convert(
    source: Path, target: Path, as_json: bool, shown: Shown | None, quiet: bool, **options: Any
) -> None:
    """Convert the checkpoint SRC into the folder DST."""
    from reshard.conversion.convert import convert as run

    # Ray prints what happens to its nodes, on standard output.
    aside = redirect_stdout(sys.stderr) if options["engine"] == "ray" else nullcontext()
    with shown_progress(shown, quiet=as_json or quiet) as progress, aside:
        report = run(source, target, progress=progress, **options)
    if as_json:
        output.print_json(report.to_json())
    elif not quiet:
        show_report(report, options["base"])


def show_report(report: Report, base: Path | None = None) -> None:
    """A conversion's report as a table with its warnings and, on a terminal, what to do next."""
    last = [found for found in report.findings if found.code == "no-base"]
    output.print_findings(found for found in report.findings if found not in last)
    checked = "green" if report.verified else "yellow"
    rows = report.rows()
    if report.dry_run:
        with suppress(OSError, ReshardError):  # a file system that does not say
            place = at_least(report.target)
            rows.append(("free", f"{output.size(shutil.disk_usage(place).free)} at {place}"))
    output.print_table(rows, colours={"verified": checked})
    for found in last:
        output.print_result(f"{found.message} {found.fix}", "warning")
    if sys.stdout.isatty():
        for words, command in next_commands(report, base):
            output.print_result(f"next   {words:<9} {command}")


@click.command(cls=Command, short_help="Show what a checkpoint contains.")
@argument("src", INSPECT["path"])
@flags(INSPECT.values())
@click.option("--tensors", is_flag=True, help="List every tensor.")
@html
@json_flag
@debug
def inspect(
    src: Path,
    tag: str | None,
    prefix: str | None,
    role: str | None,
    base: Path | None,
    optimizer: bool,
    tensors: bool,
    html: Path | None,
    as_json: bool,
) -> int:
    """Show what the checkpoint SRC contains, from its metadata alone.

    With --base, the exit code is 1 if the names do not fit.
    """
    from reshard.inspection import inspect as run

    if html is not None:
        from reshard.pages.page import check_place

        check_place(html)
    inspection = run(src, tag=tag, prefix=prefix, role=role, base=base, optimizer=optimizer)
    if html is not None:
        from reshard.pages.contents import contents_page
        from reshard.storage.texts import write_text

        write_text(html, contents_page(inspection))
    shown = inspection.to_json(tensors=tensors)
    fits = inspection.fitting is None or inspection.fitting.fits
    if as_json:
        output.print_json(output.with_requests(shown))
        return 0 if fits else 1
    output.print_table(inspection.rows(), colours={"fits": "green" if fits else "red"})
    if inspection.fitting is not None and not fits:
        output.print_result(inspection.fitting.message, lines=True)
    output.print_findings(inspection.findings)
    output.print_requests()
    if tensors:
        _print_tensors(shown["tensors"])
    if html is not None:
        output.print_result(f"page       {html}")
    if fits and sys.stdout.isatty():
        output.print_result(f"next   {conversion_of(src, base, tag, prefix, role)}")
    return 0 if fits else 1


def _print_tensors(tensors: Sequence[Mapping[str, Any]]) -> None:
    """Every tensor in a line. On a terminal, what is the same for all is said once, below."""
    columns = {
        "name": [t["name"] for t in tensors],
        "dtype": [t["dtype"] for t in tensors],
        "shape": [str(t["shape"]) for t in tensors],
        "size": [output.size(t["nbytes"]) for t in tensors],
        "kind": [t["kind"] for t in tensors],
    }
    alike = []
    for name in ("dtype", "kind"):
        if sys.stdout.isatty() and len(set(columns[name])) == 1:
            alike.append(columns.pop(name)[0])
    header = tuple(columns)
    rows = [*zip(*columns.values(), strict=True)]
    output.print_table(rows, header=header, right={header.index("size")})
    if alike:
        output.print_result(f"All of them: {', '.join(alike)}.")


@click.command(cls=Command, short_help="Read an output again and compare it, bit for bit.")
@argument("dst", VERIFY["folder"])
@flags(VERIFY.values())
@how_shown
@json_flag
@debug
def verify(
    dst: Path,
    against: Path | None,
    as_json: bool,
    shown: Shown | None,
    quiet: bool,
    **options: Any,
) -> int:
    """Read the converted folder DST again and compare every tensor, bit for bit."""
    from reshard.comparison.compare import verify as run
    from reshard.errors import VerificationError

    try:
        with shown_progress(shown, quiet=as_json or quiet) as progress:
            verified = run(dst, against, progress=stage(progress, "verify"), **options)
    except VerificationError as error:
        if not as_json:
            raise
        failed = {"verified": False, "tensor": error.tensor, "message": str(error)}
        output.print_json(output.with_requests(failed))
        return 1
    if as_json:
        output.print_json(output.with_requests(verified.to_json()))
    if as_json or quiet:
        return 0
    output.print_findings(verified.findings)
    amount = output.size(verified.bytes_read)
    what = "as written" if against is None else f"as in {against}"
    apart = f"; {verified.num_filled} are the base's" if verified.num_filled else ""
    output.print_result(f"{dst}: {verified.num_tensors} tensors, {amount}, all {what}{apart}.")
    output.print_requests()
    return 0
