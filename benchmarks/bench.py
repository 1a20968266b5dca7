"""Run the benchmark: `python -m benchmarks.bench [FOLDER]`, or write its page: `--page`.

A cell is a direction at a size. Its input is made, every contender runs on it in turn, round by
round, each round beginning with another, so that what else the machine does falls on all of them
alike; then the input is removed. Before each run its input is read once, so that the page cache is
warm for everyone, and as much memory as an output needs is touched and freed. Outputs are removed
and the disk is waited for between runs, and some seconds more, outside the time. reshard and cp
wait for their own writes to reach the disk, the other tools do not.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from benchmarks import measure, schedule, start
from benchmarks.contenders import (
    CONTENDERS,
    DIRECTIONS,
    Contender,
    Direction,
    Ready,
    made,
    taking_part,
)
from benchmarks.results import Cell, Results, Row, Sample, Skipped
from benchmarks.schedule import Pace, Rounds
from benchmarks.shapes import GB

SIZES = (0.125, 0.25, 0.5, 1.0, 2.0)
#: The size in the tables. At this size every peer runs, however short the time.
REFERENCE = 1.0
RESULTS = Path(__file__).with_name("results.json")
#: Why a contender has no figures that ended with an error, which the benchmark shows.
FAILED = "failed"
NO_INPUT = "its input cannot be made"
_STARTS = 9
# Rounds of reshard and cp by which the time is shared among the cells.
_BASIS = 3
# A virtual machine's host takes freed memory back some seconds later, in large pieces: that of the
# last output in the middle of the next run, which then took up to twice as long.
_SETTLE_SECONDS = 2.2
# What a peer may need of the free memory, and a cell of the free disk.
_MOST = 0.9
PACKAGES = ("reshard", "torch", "deepspeed", "transformers", "accelerate", "safetensors", "numpy")


@dataclass(slots=True)
class Bench:
    """One benchmark under way. `deadline` is on `time.monotonic`'s clock; `tell` shows a line."""

    scratch: Path
    most: Rounds
    deadline: float
    only: Sequence[str]
    other: str
    tell: Callable[[str], None]
    seconds: Pace = field(default_factory=Pace)
    peaks: Pace = field(default_factory=Pace)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def contenders(self, direction: Direction) -> list[Contender]:
        return taking_part(direction, self.only, self.other)

    def cost(self, direction: Direction, gb: float) -> float:
        """About how long a cell takes: its input, a few rounds, the peers once."""
        making = self.seconds.expect((direction.key, ""), _making(direction, gb))
        runs = [
            self.expect(direction, one, gb) * (1 if one.group == "peers" else _BASIS)
            for one in self.contenders(direction)
        ]
        return making + sum(runs)

    def expect(self, direction: Direction, contender: Contender, gb: float) -> float:
        """How long a run will take, with all that is around it."""
        return self.seconds.expect(
            (direction.key, contender.name), _running(direction, contender, gb)
        )

    def cell(self, direction: Direction, gb: float, seconds: float) -> Cell:
        """Measure a cell, in about so many seconds."""
        end = min(time.monotonic() + seconds, self.deadline)
        contenders = self.contenders(direction)
        begun = time.monotonic()
        self.tell(f"{direction.title}, {gb:g} GB: making the input")
        with made(direction, gb, self.scratch) as ready:
            took = time.monotonic() - begun
            self.seconds.note((direction.key, ""), _making(direction, gb), took)
            turns = _Turns(self, direction, gb, ready)
            own = [one for one in contenders if one.group != "peers"]
            peers = [one for one in contenders if one.group == "peers"]
            turns.round(0, own)
            fit = schedule.rounds(
                end - time.monotonic() + self._sum(direction, own, gb),
                self._sum(direction, own, gb),
                self._sum(direction, peers, gb),
                self.most,
            )
            forced = self.most.peers and (direction.at is not None or gb == REFERENCE)
            count = max(fit.peers, 1) if forced else fit.peers
            for number in range(max(fit.own, count)):
                more = own if 0 < number < fit.own else []
                turns.round(number, [*more, *(peers if number < count else [])])
            if not count:
                turns.skipped += [Skipped(one.name, "no time left") for one in peers]
            rows = [Row(name, samples) for name, samples in turns.samples.items()]
            return Cell(direction.key, gb, ready.written_nbytes, rows, turns.skipped)

    def _sum(self, direction: Direction, contenders: Sequence[Contender], gb: float) -> float:
        return sum(self.expect(direction, one, gb) for one in contenders)


@dataclass(slots=True)
class _Turns:
    """The runs of a cell."""

    bench: Bench
    direction: Direction
    gb: float
    ready: Ready
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)

    def round(self, number: int, contenders: Sequence[Contender]) -> None:
        """Every contender once; each round begins with another."""
        first = number % len(contenders) if contenders else 0
        for contender in (*contenders[first:], *contenders[:first]):
            if any(one.contender == contender.name for one in self.skipped):
                continue
            begun = time.monotonic()
            why = self._cannot(contender)
            if not why:
                self.bench.tell(
                    f"{self.direction.title}, {self.gb:g} GB, round {number + 1}: {contender.name}"
                )
                why = self._run(number, contender)
            if why:
                self.skipped.append(Skipped(contender.name, why))
                continue
            took = time.monotonic() - begun
            guess = _running(self.direction, contender, self.gb)
            self.bench.seconds.note((self.direction.key, contender.name), guess, took)

    def _cannot(self, contender: Contender) -> str:
        """Why a peer is not run; empty where it is."""
        if contender.group != "peers":
            return ""
        key = (self.direction.key, contender.name)
        needed = self.bench.peaks.expect(key, _peak(self.gb))
        if needed > _MOST * _free_memory():
            return f"needs about {needed / GB:.0f} GB of memory"
        late = self.bench.expect(self.direction, contender, self.gb) > self.bench.left()
        return "no time left" if late else ""

    def _run(self, number: int, contender: Contender) -> str:
        """Run a contender once; why it failed, if it is a peer's failure."""
        target = self.bench.scratch / "output"
        shutil.rmtree(target, ignore_errors=True)
        command = contender.command(self.direction, self.ready, target)
        os.sync()
        time.sleep(_SETTLE_SECONDS)
        times = 3 if contender.group == "peers" else 1.3
        needed = min(int(times * self.ready.written_nbytes) + GB // 4, _free_memory() // 2)
        with measure.memory_in_hand(needed):
            measure.warm(contender.reads(self.ready))
        try:
            ran = measure.run(command, _environment(contender.path), self.bench.scratch)
        except measure.CommandError as error:
            self.bench.tell(str(error))
            return FAILED
        finally:
            size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
            there = measure.allocated(target)
            shutil.rmtree(target, ignore_errors=True)
        sample = Sample(
            number,
            ran.seconds,
            ran.peak_nbytes,
            ran.cpu_seconds,
            output_nbytes=size,
            temporary_nbytes=max(ran.disk_nbytes - there, 0),
        )
        if ran.calls is not None:
            sample = replace(sample, **asdict(ran.calls))
        self.samples.setdefault(contender.name, []).append(sample)
        if contender.marked and ran.marked is not None:
            part = Sample(number, ran.marked, ran.peak_nbytes, output_nbytes=size)
            self.samples.setdefault(contender.marked, []).append(part)
        key = (self.direction.key, contender.name)
        self.bench.peaks.note(key, _peak(self.gb), ran.peak_nbytes)
        return ""


def _making(direction: Direction, gb: float) -> float:
    """A guess of the seconds in which an input is made."""
    return 6 + 4 * direction.times * gb


def _running(direction: Direction, contender: Contender, gb: float) -> float:
    """A guess of the seconds of a run, with all that is around it."""
    fixed, each = contender.guess
    return _SETTLE_SECONDS + 0.6 + fixed + (0.6 + each) * gb * direction.times


def _disk(direction: Direction, contenders: Sequence[Contender]) -> float:
    """What a cell needs of the disk, in multiples of the 16-bit weights: its source and base, what
    `cp` copies and reads, and an output, which a peer writes in float32 and may write twice."""
    output = 3 if any(one.group == "peers" for one in contenders) else 1
    return direction.times + direction.based + direction.times + output


def _peak(gb: float) -> float:
    """A guess of a peer's peak memory."""
    return (0.4 + 2 * gb) * GB


def _environment(path: str = "") -> dict[str, str]:
    """That of a contender. Python keeps its bytecode, as it does where nobody forbids it."""
    kept = {name: it for name, it in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    own = {"PYTHONPATH": path} if path else {}
    return kept | own | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}


def _free_memory() -> int:
    """Bytes of memory that are free or hold only what can be read again."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (line,) = (line for line in text.splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "platform": f"{platform.system()} {platform.release().partition('-')[0]}",
        "processor": _processor(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "memory_nbytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg()[0],
        "packages": {name: metadata.version(name) for name in PACKAGES if _installed(name)},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _installed(name: str) -> bool:
    return any(found.name == name for found in metadata.distributions())


def cells(sizes: Sequence[float], chosen: Sequence[str]) -> list[tuple[Direction, float]]:
    """The cells, small ones first: what they take tells how long the larger ones will."""
    found = []
    for direction in DIRECTIONS:
        if chosen and direction.key not in chosen:
            continue
        at = direction.at
        near = sizes if at is None else [min(sizes, key=lambda size: abs(size - at))]
        found += [(direction, gb) for gb in near]
    return sorted(found, key=lambda cell: cell[1])


def run(options: argparse.Namespace, tell: Callable[[str], None]) -> Results:
    """Measure everything; results are saved after each cell."""
    scratch: Path = options.folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + (options.budget or 1e6) * 60
    most = Rounds(options.rounds, options.peer_rounds)
    bench = Bench(scratch, most, deadline, options.only, options.other, tell)
    called = {"sizes": options.sizes, "rounds": most.own, "peer_rounds": most.peers}
    of, done = machine(), list[Cell]()
    plan = cells(options.sizes, options.directions)
    starts = start.starts(_STARTS, _environment(), options.other)
    path = options.folder / "results.json"
    for place, (direction, gb) in enumerate(plan):
        needed = int(_disk(direction, bench.contenders(direction)) * gb * GB)
        if needed > _MOST * shutil.disk_usage(scratch).free or bench.left() < 0:
            why = "no time left" if bench.left() < 0 else f"needs {needed / GB:.0f} GB of disk"
            names = [Skipped(one.name, why) for one in bench.contenders(direction)]
            done.append(Cell(direction.key, gb, 0, [], names))
        else:
            costs = [bench.cost(*cell) for cell in plan]
            # Without a budget, as many rounds as were asked for.
            seconds = schedule.share(bench.left(), costs, place) if options.budget else 1e6
            done.append(_tried(bench, direction, gb, seconds))
        results = Results(of, called, done, starts)
        results.save(path)
    shutil.rmtree(scratch)
    return results


def _tried(bench: Bench, direction: Direction, gb: float, seconds: float) -> Cell:
    """Measure a cell; without figures where its input cannot be made."""
    try:
        return bench.cell(direction, gb, seconds)
    except (measure.CommandError, subprocess.CalledProcessError) as error:
        bench.tell(str(error))
        names = [Skipped(one.name, NO_INPUT) for one in bench.contenders(direction)]
        return Cell(direction.key, gb, 0, [], names)


def failed(results: Results) -> list[str]:
    """The runs of reshard and cp that ended with an error; peers may."""
    own = {one.name for one in CONTENDERS if one.group != "peers"}
    return [
        f"{cell.direction} at {cell.gb:g} GB: {one.contender}"
        for cell in results.cells
        for one in cell.skipped
        if one.why in (FAILED, NO_INPUT) and one.contender in own
    ]


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, nargs="?", default=Path("bench-out"), help="results and scratch")
    add("--sizes", type=lambda text: [float(word) for word in _words(text)], default=list(SIZES),
        metavar="GB,...", help="10^9 bytes of 16-bit weights; default: %(default)s")  # fmt: skip
    add("--rounds", type=int, default=5, help="of reshard and cp in each cell, at most")
    add("--peer-rounds", type=int, default=3, help="of the other tools, at most")
    add("--budget", type=float, metavar="MINUTES", help="end within about so many minutes")
    add("--only", type=_words, default=[], metavar="NAME,...",
        help="contenders or groups of them: reshard, cp, peers")  # fmt: skip
    add("--directions", type=_words, default=[], metavar="NAME,...",
        help=", ".join(one.key for one in DIRECTIONS))  # fmt: skip
    add("--other", default="", metavar="SRC", help="src folder of another reshard to compare with")
    add("--publish", action="store_true", help="also write benchmarks/results.json and the pages")
    add(
        "--add",
        action="store_true",
        help="publish, with these cells added to benchmarks/results.json or in place of its own",
    )
    add("--page", type=Path, nargs="?", const=RESULTS, metavar="JSON",
        help="only publish the results of an earlier run")  # fmt: skip
    options = parser.parse_args(arguments)
    unknown = set(options.directions) - {one.key for one in DIRECTIONS}
    if unknown:
        parser.error(f"unknown directions: {', '.join(sorted(unknown))}")
    options.other = str(Path(options.other).resolve()) if options.other else ""
    return options


def main() -> None:
    options = parsed()
    path = options.page or options.folder / "results.json"
    if options.page is None:
        # The page's packages are not imported before: children begin as large as the benchmark is.
        begun = time.monotonic()
        run(options, lambda line: print(f"{time.monotonic() - begun:6.0f} s  {line}"))
    from benchmarks import page
    from benchmarks.results import load

    results = load(path)
    print(page.tables(results))
    if options.add:
        results = load(RESULTS).with_cells(results.cells)
    if options.publish or options.add or options.page:
        results.save(RESULTS)
        for written in page.publish(results):
            print(f"written: {written}")
    if options.page is None and (wrong := failed(results)):
        sys.exit(f"failed: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
