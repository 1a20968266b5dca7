"""Run the benchmark: `python -m benchmarks.bench FOLDER [--rounds N] [--input NAME ...]`.

Every round runs every contender once on every input, one after the other, so that what else the
machine does falls on all of them alike. Before each run its input is read once, so that the page
cache is warm for everyone, and as much memory as an output needs is touched and freed. Outputs are
removed and the disk is waited for between runs, and some seconds more, outside the time. reshard
and cp wait for their own writes to reach the disk, the other tools do not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import dcp_inputs, fp8_inputs, inputs, measure
from benchmarks.contenders import CONTENDERS, Contender
from benchmarks.inputs import Input

MIB = 1 << 20
# Bytes of the largest output, and some more.
_MEMORY_NBYTES = 4 << 30
# A virtual machine's host takes freed memory back some seconds later, in large pieces: that of the
# last output in the middle of the next run, which then took up to twice as long.
_SETTLE_SECONDS = 4.0
RECIPES = (*inputs.RECIPES, *dcp_inputs.RECIPES, *fp8_inputs.RECIPES)
PACKAGES = ("reshard", "torch", "deepspeed", "transformers", "accelerate", "safetensors", "numpy")


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one contender on one input. Output bytes are those of the output folder;
    `temporary_nbytes` it had on the disk beside these, at most."""

    input: str
    contender: str
    round: int
    seconds: float
    peak_nbytes: int
    output_nbytes: int
    temporary_nbytes: int


@dataclass(frozen=True, slots=True)
class Row:
    """A contender's runs on one input; `times_cp` is its median over cp's median."""

    contender: str
    note: str
    runs: int
    median_seconds: float
    min_seconds: float
    max_seconds: float
    times_cp: float | None
    peak_nbytes: int
    output_nbytes: int
    temporary_nbytes: int


def rounds(given: Sequence[Input], count: int, scratch: Path) -> Iterator[Sample]:
    """Every sample, round by round.

    Each round begins with another contender: what one leaves behind meets all the others in turn.
    """
    for number in range(count):
        for one in given:
            ready = [
                c for c in CONTENDERS if one.kind in c.kinds and (c.every_size or not one.large)
            ]
            first = number % len(ready)
            for contender in ready[first:] + ready[:first]:
                yield _sample(one, contender, number, scratch)


def _sample(given: Input, contender: Contender, number: int, scratch: Path) -> Sample:
    target = scratch / "output"
    shutil.rmtree(target, ignore_errors=True)
    command = contender.command(given, target, scratch)
    os.sync()
    time.sleep(_SETTLE_SECONDS)
    with measure.memory_in_hand(_MEMORY_NBYTES):
        measure.warm(contender.reads(given, scratch))
    ran = measure.run(command, _environment(), scratch)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    temporary = max(ran.disk_nbytes - measure.allocated(target), 0)
    shutil.rmtree(target)
    return Sample(given.name, contender.name, number, ran.seconds, ran.peak_nbytes, size, temporary)


def _environment() -> dict[str, str]:
    """That of a contender. Python keeps its bytecode, as it does where nobody forbids it."""
    kept = {name: it for name, it in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}


def summary(samples: Sequence[Sample], given: str) -> list[Row]:
    """A row for each contender that ran on the input `given`."""
    own = [sample for sample in samples if sample.input == given]
    copies = [sample.seconds for sample in own if sample.contender == "cp"]
    copy = statistics.median(copies) if copies else None
    return [
        _row(contender, mine, copy)
        for contender in CONTENDERS
        if (mine := [sample for sample in own if sample.contender == contender.name])
    ]


def _row(contender: Contender, samples: Sequence[Sample], copy: float | None) -> Row:
    seconds = [sample.seconds for sample in samples]
    median = statistics.median(seconds)
    return Row(
        contender.name,
        contender.note,
        len(samples),
        median,
        min(seconds),
        max(seconds),
        None if copy is None else median / copy,
        max(sample.peak_nbytes for sample in samples),
        samples[0].output_nbytes,
        max(sample.temporary_nbytes for sample in samples),
    )


def draw(console: Console, given: str, rows: Sequence[Row]) -> None:
    """The rows as a table."""
    table = Table(title=given, title_justify="left", title_style="bold")
    table.add_column("contender", no_wrap=True)
    for name in ("seconds", "least - most", "x cp", "peak MiB", "output MB", "temp MB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.contender,
            f"{row.median_seconds:.2f}",
            f"{row.min_seconds:.2f} - {row.max_seconds:.2f}",
            "" if row.times_cp is None else f"{row.times_cp:.2f}",
            f"{row.peak_nbytes / MIB:.0f}",
            f"{row.output_nbytes / 1e6:.0f}",
            f"{row.temporary_nbytes / 1e6:.0f}",
        )
    console.print(table)


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "memory_nbytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg(),
        "packages": {name: metadata.version(name) for name in PACKAGES if _installed(name)},
        "page_cache": "warm",
    }


def _installed(name: str) -> bool:
    return any(found.name == name for found in metadata.distributions())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument("folder", type=Path, help="inputs, results and scratch; 60 GB at most")
    parser.add_argument("--rounds", type=int, default=5)
    names = [recipe.name for recipe in RECIPES]
    parser.add_argument("--input", action="append", choices=names, help="default: all")
    options = parser.parse_args()
    console = Console()
    scratch: Path = options.folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    given = []
    for recipe in RECIPES:
        if not options.input or recipe.name in options.input:
            with console.status(f"making {recipe.name}"):
                given.append(inputs.ready(recipe, options.folder / "inputs"))
    samples: list[Sample] = []
    with console.status("") as status:
        for sample in rounds(given, options.rounds, scratch):
            samples.append(sample)
            status.update(f"round {sample.round + 1}: {sample.input}, {sample.contender}")
    results = {one.name: summary(samples, one.name) for one in given}
    for name, rows in results.items():
        draw(console, name, rows)
    for contender in CONTENDERS:
        console.print(f"{contender.name}: {contender.note}", style="dim")
    document = {
        "machine": machine(),
        "results": {name: [asdict(row) for row in rows] for name, rows in results.items()},
        "samples": [asdict(sample) for sample in samples],
    }
    path = options.folder / "results.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    console.print(f"Every run is in [b]{path}[/].")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
