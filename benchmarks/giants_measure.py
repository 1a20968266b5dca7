"""What the checkpoints of `benchmarks.giants` take: `python -m benchmarks.giants_measure FOLDER`.

FOLDER holds them, and in `many` those of `benchmarks.many`. Writes benchmarks/giants.md, which
docs/performance.md includes. Takes 10 minutes of CPU.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import Run, run
from benchmarks.page import GIANTS

_NAMES = {
    "dcp": "DCP, 570,000 chunks",
    "megatron": "Megatron, with every rank's plan",
    "zero3": "ZeRO-3, 71.6 million pieces",
}
_INTRODUCTION = """## Giants

Simulated checkpoints of a trillion parameters: 70,000 tensors, 1,024 ranks, sparse files
(`python -m benchmarks.giants FOLDER` makes them, `python -m benchmarks.giants_measure FOLDER` these
tables). Seconds are of CPU, user and system together; while other programs run, a second does less.
Memory is the peak of the process.
"""
_NOTES = """Of the time for DCP, three fifths go into reading the tables, of which three quarters
into the places of the chunks; a twelfth goes into comparing the tables, an eighth into placing
the chunks, the rest into names, totals and the start. Records of a run are matched many at a
time, and tensors that are described by the same bytes are read once. Of the time for ZeRO-3, a
third goes into comparing the model files of all ranks, 21 GB, with the first.
"""
_MANY = """200,000 tensors of 32 elements (`python -m benchmarks.many FOLDER/many`), converted and
verified:
"""
_SIDES = (("hf", "hf"), ("hf", "dcp"), ("dcp", "hf"))
_SIDE_NAMES = {"hf": "Hugging Face", "dcp": "DCP"}


def measured(folder: Path) -> str:
    """The section, of the checkpoints that are there."""
    lines = ["| checkpoint | `inspect` | `convert --dry-run` |", "|---|---|---|"]
    for kind, name in _NAMES.items():
        source = folder / kind
        if not source.is_dir():
            continue
        with tempfile.TemporaryDirectory() as scratch:
            planned = ("convert", "--dry-run", os.fspath(source), f"{scratch}/out")
            _run(*planned)  # reads the metadata from the disk
            inspect, dry = _run("inspect", os.fspath(source)), _run(*planned)
        lines.append(f"| {name} | {_cell(inspect)} | {_cell(dry)} |")
    load = f"{os.getloadavg()[1]:.1f} programs running"
    machine = f"{_processor()}, {load}, Python {platform.python_version()}, metadata cached."
    return "\n".join([_INTRODUCTION, *lines, "", _NOTES, *_many(folder / "many"), machine, ""])


def _many(folder: Path) -> list[str]:
    """The table of conversions of very many tensors, if they are there."""
    if not folder.is_dir():
        return []
    lines = [_MANY, "| conversion | CPU, peak memory |", "|---|---|"]
    for source, to in _SIDES:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            given = [os.fspath(folder / source), f"{scratch}/out"]
            took = _run("convert", "--to", to, "--dtype", "keep", *given)
        lines.append(f"| {_SIDE_NAMES[source]} to {_SIDE_NAMES[to]} | {_cell(took)} |")
    return [*lines, ""]


def _run(*words: str) -> Run:
    return run([sys.executable, "-m", "reshard", *words])


def _cell(found: Run) -> str:
    return f"{found.cpu_seconds:.1f} s, {found.peak_nbytes / 2**20:.0f} MiB"


def _processor() -> str:
    names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{len(names)} cores, {names[0] if names else platform.machine()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    section = measured(parser.parse_args().folder)
    GIANTS.write_text(section, encoding="utf-8")
    print(section)


if __name__ == "__main__":
    main()
