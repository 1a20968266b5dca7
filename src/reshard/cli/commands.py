"""The commands of `reshard`: flags in, library calls, tables or JSON out. No other logic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reshard.cli import output
from reshard.cli.flags import Argument, Command, FolderOrFile, debug, flags
from reshard.cli.interrupts import writes
from reshard.comparison.declared import DIFF, VERIFY
from reshard.conversion.declared import CONVERT
from reshard.errors import listed
from reshard.inspection import INSPECT

if TYPE_CHECKING:
    from reshard.conversion.report import Report

_PATH = FolderOrFile()
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")

_EXAMPLES = (
    "reshard convert results/run/_actor out --base Qwen2.5-7B       # DeepSpeed (LightRFT)",
    "reshard convert outputs/checkpoint-500 out --base Qwen2.5-7B   # FSDP (HF Trainer)",
    "reshard convert run/_actor out --base Qwen2.5-7B --lora-alpha 32   # LoRA, merged",
    "reshard convert Qwen2.5-7B out --to dcp                        # back to FSDP",
)


@click.command(cls=Command, examples=_EXAMPLES)
@click.argument("source", type=_PATH, metavar="SRC", cls=Argument, words=CONVERT["source"].help)
@click.argument("target", type=_PATH, metavar="DST", cls=Argument, words=CONVERT["target"].help)
@flags(CONVERT.values())
@_json
@debug
@writes("target")
def convert(source: Path, target: Path, as_json: bool, **options: Any) -> None:
    """Convert the checkpoint SRC into the folder DST."""
    from reshard.conversion.convert import convert as run

    with output.progress_bar(quiet=as_json) as progress:
        report = run(source, target, progress=progress, **options)
    show_report(report, as_json=as_json)


def show_report(report: Report, *, as_json: bool = False) -> None:
    """A conversion's report, as JSON or as a table with its warnings."""
    if as_json:
        output.print_json(report.to_json())
        return
    last = [found for found in report.findings if found.code == "no-base"]
    output.say_findings(found for found in report.findings if found not in last)
    speed = report.bytes_written / max(report.seconds, 1e-3)
    rows = [
        ("source", f"{report.checkpoint} ({report.format}{_tagged(report.tag)})"),
        ("target", f"{report.target}{' (dry run: nothing was written)' * report.dry_run}"),
        *([] if report.replaced is None else [_replaced(report)]),
        ("tensors", f"{report.num_tensors} in {len(report.files)} file(s)"),
        ("read", output.size(report.bytes_read)),
        ("written", output.size(report.bytes_written)),
    ]
    if report.rules or report.prefix:
        prefix = [f"prefix {report.prefix!r} stripped"] if report.prefix else []
        rows.append(("names", "; ".join([*prefix, *report.rules])))
    if report.tied:
        rows.append(("tied", listed(f"{a} = {b}" for a, b in report.tied.items())))
    for what in ("filled", "missing", "unexpected"):
        names = getattr(report, what)
        if names:
            rows.append((what, f"{len(names)}: {listed(names, 5)}"))
    if report.adapter is not None:
        rows.append(("adapter", str(report.adapter)))
    if report.merged:
        rows.append(("merged", f"{report.merged} low-rank updates"))
    if report.compared:
        rows.append(("changed", f"{report.changed} of {report.compared} differ from the base"))
    if not report.dry_run:
        rows.append(("checksums", _checksums(report)))
        rows.append(("verified", "yes, read back" if report.verified else "no"))
        rows.append(("time", f"{report.seconds:.1f} s, {output.size(int(speed))}/s"))
    output.print_table(rows)
    for found in last:
        output.tell(f"warning: {found.message} {found.fix}")


def _replaced(report: Report) -> tuple[str, str]:
    return ("would replace" if report.dry_run else "replaced", str(report.replaced))


def _checksums(report: Report) -> str:
    """How many of the source's checksums were compared, and that there are none of the rest."""
    total = report.records_checked + report.records_unchecked
    told = f"{report.records_checked} of {total} source checksums"
    if not report.records_unchecked:
        return f"{told} compared"
    lacking = "this format has none" if not report.records_checked else "the others have none"
    return f"{told}: {lacking}"


def _tagged(tag: str | None) -> str:
    return f", tag {tag}" if tag else ""


@click.command(cls=Command)
@click.argument("src", type=_PATH, cls=Argument, words=INSPECT["path"].help)
@flags(INSPECT.values())
@click.option("--tensors", is_flag=True, help="List every tensor.")
@_json
@debug
def inspect(
    src: Path,
    tag: str | None,
    prefix: str | None,
    role: str | None,
    base: Path | None,
    tensors: bool,
    as_json: bool,
) -> int:
    """Show what is in the checkpoint SRC, from its metadata alone.

    With --base, exits with 1 where the names do not fit.
    """
    from reshard.inspection import inspect as run

    inspection = run(src, tag=tag, prefix=prefix, role=role, base=base)
    found = inspection.to_json(tensors=tensors)
    fits = inspection.fitting is None or inspection.fitting.fits
    if as_json:
        output.print_json(found)
        return 0 if fits else 1
    sizes = ("total_bytes", "bytes_to_read", "bytes_on_disk")
    hidden = ("tensors", "findings", "tied", "frozen", "base")
    rows = [
        (name.replace("_", " "), output.size(value) if name in sizes else _shown(value))
        for name, value in found.items()
        if name not in hidden and value not in (None, [], {})
    ]
    for what in ("tied", "frozen"):
        if found[what]:
            rows.append((what, f"{len(found[what])}: {listed(found[what], 5)}"))
    for name, value in found.get("base", {}).items():
        if value not in (None, [], {}, ""):
            rows.append((f"base: {name}", _shown(value)))
    output.print_table(rows)
    output.say_findings(inspection.checkpoint.catalog.findings)
    if tensors:
        listing = [
            (t["name"], t["dtype"], str(tuple(t["shape"])), output.size(t["nbytes"]), t["kind"])
            for t in found["tensors"]
        ]
        output.print_table(listing, header=("name", "dtype", "shape", "size", "kind"))
    return 0 if fits else 1


def _shown(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return listed(f"{name}: {count}" for name, count in value.items())
    if isinstance(value, list):
        return listed(map(str, value))
    return str(value)


@click.command(cls=Command)
@click.argument("dst", type=_PATH, cls=Argument, words=VERIFY["folder"].help)
@flags(VERIFY.values())
@_json
@debug
def verify(dst: Path, against: Path | None, as_json: bool, **options: Any) -> int:
    """Read the converted folder DST again and compare every tensor, bit for bit."""
    from reshard.comparison.compare import verify as run
    from reshard.errors import VerificationError

    try:
        with output.progress_bar(quiet=as_json) as progress:
            step = None if progress is None else lambda done, total: progress("verify", done, total)
            verified = run(dst, against, progress=step, **options)
    except VerificationError as error:
        if not as_json:
            raise
        output.print_json({"verified": False, "tensor": error.tensor, "message": str(error)})
        return 1
    if as_json:
        output.print_json(verified.to_json())
        return 0
    output.say_findings(verified.findings)
    amount = output.size(verified.bytes_read)
    what = "as written" if against is None else f"as in {against}"
    apart = f"; {verified.num_filled} are the base's" if verified.num_filled else ""
    output.tell(f"{dst}: {verified.num_tensors} tensors, {amount}, all {what}{apart}.")
    return 0


@click.command(cls=Command)
@click.argument("a", type=_PATH, cls=Argument, words=DIFF["first"].help)
@click.argument("b", type=_PATH, cls=Argument, words=DIFF["second"].help)
@flags(DIFF.values())
@_json
@debug
def diff(a: Path, b: Path, base: Path | None, as_json: bool) -> int:
    """Compare the checkpoints A and B, of any formats, tensor by tensor.

    Where dtypes differ, the wider is rounded to the narrower. Exits with 1 where they differ.
    """
    from reshard.comparison.compare import diff as run

    with output.progress_bar(quiet=as_json) as progress:
        step = None if progress is None else lambda done, total: progress("compare", done, total)
        found = run(a, b, base=base, progress=step)
    if as_json:
        output.print_json(found.to_json())
    else:
        output.say_findings(found.findings)
        rows = [(difference.name, str(difference)) for difference in found.differences]
        if rows:
            output.print_table(rows, header=("tensor", "difference"))
        output.tell(f"{found.num_equal} tensors are equal, {len(found.differences)} differ.")
    return 0 if found.same else 1
