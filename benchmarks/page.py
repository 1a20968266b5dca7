"""The pages that a benchmark's results become: docs/performance.md, its charts, README's table."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import charts
from benchmarks.contenders import (
    CONTENDERS,
    CP,
    CP_READ_BACK,
    DIRECTIONS,
    NO_VERIFY,
    RESHARD,
    Direction,
)
from benchmarks.results import Cell, Results, Row
from benchmarks.shapes import GB

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
CHARTS = ROOT / "docs" / "images"
README = ROOT / "README.md"
NOTES = Path(__file__).with_name("notes.md")
# Written by `giants_measure`, which takes minutes and gigabytes of its own.
GIANTS = Path(__file__).with_name("giants.md")
BEGIN, END = "<!-- made by make bench: begin -->\n", "<!-- made by make bench: end -->\n"
MIB = 1 << 20
_OWN = (RESHARD, NO_VERIFY, CP, CP_READ_BACK)
# The load average of a machine on which only the benchmark runs.
_IDLE = 0.5
# The size that tables of one size show.
_REFERENCE = 1.0
_COUNTED = (
    "`read`, `written`: bytes of read and write calls for each byte of 16-bit weights, cached or "
    "not; mapped files (safetensors and torch map theirs) are not counted. `calls`: such system "
    "calls for each MB of weights. Both as the kernel counts them for a process and its children "
    "(/proc/PID/io).\n"
)
_HEAD = (
    "| | runs | seconds | least to most | × `cp`, read back | CPU s | peak MiB | temporary MB "
    "| read | written | calls |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
)
_NOTES = {one.name: one.note for one in CONTENDERS} | {
    CP: "the same run until the copy is on the disk"
}


def publish(results: Results) -> list[Path]:
    """Write the page, the charts and README's table; their paths."""
    PAGE.write_text(page(results), encoding="utf-8")
    readme_text = README.read_text(encoding="utf-8")
    before, _, rest = readme_text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}{readme(results)}{END}{after}", encoding="utf-8")
    return [PAGE, README, *charts.save(results, CHARTS)]


def page(results: Results) -> str:
    """docs/performance.md."""
    parts = [
        "# Performance\n",
        "<!-- Made by `make bench` from benchmarks/results.json; notes: benchmarks/notes.md. -->\n",
        _setting(results),
        "## At a glance\n",
        _glance(results),
        "Time against size (median; the bars are the least and the most), and peak memory:\n",
        "![Time of reshard and cp against size](images/performance-time.svg)\n",
        "![Time of all tools against size](images/performance-tools.svg)\n",
        "![Peak memory against size](images/performance-memory.svg)\n",
        "## Time by size\n",
        "Seconds (median), and the line through them: seconds at size 0, and for each GB.\n",
        *(_sweep(results, direction) for direction in _swept(results)),
        _large(results),
        "## Each conversion\n",
        _COUNTED,
        *(_table(results, direction) for direction in DIRECTIONS),
        "The contenders:\n",
        "\n".join(f"* `{name}`: {_NOTES[name]}" for name in _names(results)) + "\n",
        _skipped(results),
        "## Starting\n",
        _starts(results),
        NOTES.read_text(encoding="utf-8"),
        GIANTS.read_text(encoding="utf-8"),
    ]
    return "\n".join(part for part in parts if part)


def readme(results: Results) -> str:
    """README's part on speed."""
    first = results.machine
    begin = (
        "`make bench` compares reshard with the tools that people use today, and with `cp` of the "
        "same bytes: each tool in its own process, in turn, with a warm page cache. reshard and "
        "`cp` wait for the disk, the others do not. Medians on "
        f"{first['cores']} cores of an {first['processor']}:\n{_busy(results)}"
    )
    lines = [begin, _glance(results)]
    lines += [sentence for sentence in (_growth(results), _far(results)) if sentence]
    convert = next((one for one in results.starts if one.name == "reshard convert"), None)
    if convert is not None:
        lines.append(
            "Starting Python, planning and all else that does not depend on the size take "
            f"{statistics.median(convert.cpu_seconds):.2f} s of processor time.\n"
        )
    lines.append(
        "All figures, charts of time and memory against size, and what was tried: "
        "[docs/performance.md](docs/performance.md).\n"
    )
    return "\n".join(lines)


def tables(results: Results) -> str:
    """Every cell as a table, for the terminal."""
    parts = []
    for cell in (cell for cell in results.cells if cell.rows):
        title = next(one.title for one in DIRECTIONS if one.key == cell.direction)
        parts.append(f"{title}, {cell.gb:g} GB\n{_rows(cell)}")
    return "\n".join([*parts, _starts(results)])


def _setting(results: Results) -> str:
    machine = results.machine
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    return (
        f"Measured on {machine['cores']} cores of an {machine['processor']} with "
        f"{machine['memory_nbytes'] / GB:.0f} GB of memory ({machine['platform']}), Python "
        f"{machine['python']}, {packages}. Models are Qwen2's tensors in sizes of "
        f"{', '.join(f'{size:g}' for size in results.options['sizes'])} GB of 16-bit weights; at "
        f"most {results.options['rounds']} rounds, in turn. The page cache is warm; reshard and "
        "`cp` wait for the disk, the other tools do not. How a run goes: `benchmarks/bench.py`; "
        f"every run: `benchmarks/results.json`.\n{_busy(results)}"
    )


def _busy(results: Results) -> str:
    """That the machine did other work, if it did."""
    load = results.machine["load_average"]
    if load < _IDLE:
        return ""
    return (
        f"\n**The machine did other work as well** (load average {load:.1f} at the start): compare "
        "what ran in turn, and take no time for itself.\n"
    )


def _glance(results: Results) -> str:
    """A row for each direction: reshard against cp, and the other tools."""
    head = (
        "| conversion | GB | reshard, verified | `cp`, and reading the copy back | ratio "
        "| peak memory | other tools |\n|---|---|---|---|---|---|---|\n"
    )
    rows = []
    for direction in DIRECTIONS:
        cell = _shown(results, direction)
        if cell is None or (ours := cell.row(RESHARD)) is None:
            continue
        copy, ratio = cell.row(CP_READ_BACK), _against_cp(cell)
        others = [
            f"`{row.contender}` {_seconds(row.seconds)} s, {row.peak_nbytes / MIB:,.0f} MiB"
            for row in cell.rows
            if row.contender not in _OWN
        ]
        rows.append(
            f"| {direction.title} | {cell.gb:g} | {_seconds(ours.seconds)} s "
            f"| {'' if copy is None else f'{_seconds(copy.seconds)} s'} "
            f"| {'' if ratio is None else f'{ratio:.2f}'} "
            f"| {ours.peak_nbytes / MIB:.0f} MiB | {'; '.join(others)} |\n"
        )
    return head + "".join(rows)


def _growth(results: Results) -> str:
    """How memory and time grow from the smallest to the largest size."""
    found = []
    for direction in _swept(results):
        own = [cell for cell in results.of(direction.key) if cell.row(RESHARD)]
        first, last = own[0].row(RESHARD), own[-1].row(RESHARD)
        if first is not None and last is not None:
            found.append((own[0].gb, own[-1].gb, first.peak_nbytes, last.peak_nbytes))
    if not found:
        return ""
    small, large = found[0][:2]
    low, high = (max(one[place] for one in found) / MIB for place in (2, 3))
    return (
        f"From {small:g} to {large:g} GB of weights, the peak memory goes from {low:.0f} to "
        f"{high:.0f} MiB.\n"
    )


def _against_cp(cell: Cell) -> float | None:
    """reshard's time as a multiple of that of cp and reading the copy back."""
    ours, copy = cell.row(RESHARD), cell.row(CP_READ_BACK)
    return None if ours is None or copy is None else ours.seconds / copy.seconds


def _large(results: Results) -> str:
    """The table of models whose files exceed the memory."""
    found = [cell for one in DIRECTIONS for cell in results.filled(one.key, large=True)]
    titles = {one.key: one.title for one in DIRECTIONS}
    if not found:
        return ""
    head = (
        "| conversion | GB | runs | reshard, verified | least to most | `cp`, and reading the copy "
        "back | least to most | ratio | peak MiB |\n|---|---|---|---|---|---|---|---|---|\n"
    )
    intro = (
        "Measured by themselves (`--add`), without the other tools. Not all files fit into memory, "
        "so much of the time is the disk's:\n\n"
    )
    lines = ["## Large models\n\n", intro, head]
    for cell in found:
        ours, copy = cell.row(RESHARD), cell.row(CP_READ_BACK)
        if ours is None or copy is None:
            continue
        timed = [
            f"{_seconds(row.seconds)} s | {_seconds(row.least)} to {_seconds(row.most)}"
            for row in (ours, copy)
        ]
        lines.append(
            f"| {titles[cell.direction]} | {cell.gb:g} | {len(ours.samples)} | {' | '.join(timed)} "
            f"| {_against_cp(cell):.2f} | {ours.peak_nbytes / MIB:.0f} |\n"
        )
    return "".join(lines)


def _far(results: Results) -> str:
    """How the large sizes compare with cp, in a sentence."""
    found = [cell for one in DIRECTIONS for cell in results.filled(one.key, large=True)]
    ratios = [ratio for cell in found if (ratio := _against_cp(cell)) is not None]
    if not ratios:
        return ""
    sizes = [cell.gb for cell in found]
    peak = max(row.peak_nbytes for cell in found if (row := cell.row(RESHARD))) / MIB
    return (
        f"From {min(sizes):g} to {max(sizes):g} GB, where not all fits into memory, reshard takes "
        f"{min(ratios):.2f} to {max(ratios):.2f} times as long as `cp` and reading the copy back, "
        f"with at most {peak:.0f} MiB.\n"
    )


def _sweep(results: Results, direction: Direction) -> str:
    """Medians of all contenders at all sizes."""
    own = results.of(direction.key)
    sizes = [cell.gb for cell in own]
    lines = [
        f"| {direction.title} | {' | '.join(f'{gb:g} GB' for gb in sizes)} | at 0 | a GB |\n",
        f"|---|{'---|' * len(sizes)}---|---|\n",
    ]
    for name in _names(results, own):
        rows = [cell.row(name) for cell in own]
        points = [(cell.nbytes / GB, row.seconds) for cell, row in zip(own, rows, strict=True)
                  if row is not None]  # fmt: skip
        start, slope = line(points) if len(points) > 1 else (None, None)
        cellwise = " | ".join("" if row is None else _seconds(row.seconds) for row in rows)
        fitted = " | ".join("" if one is None else f"{one:.2f}" for one in (start, slope))
        lines.append(f"| `{name}` | {cellwise} | {fitted} |\n")
    return "".join(lines)


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The line of least squares through points: its value at 0, its slope."""
    fitted = statistics.linear_regression(*zip(*points, strict=True))
    return fitted.intercept, fitted.slope


def _table(results: Results, direction: Direction) -> str:
    cell = _shown(results, direction)
    if cell is None or not cell.rows:
        return ""
    return f"### {direction.title}, {cell.gb:g} GB\n\n{_rows(cell)}"


def _rows(cell: Cell) -> str:
    """A cell as a table."""
    copy = cell.row(CP_READ_BACK)
    lines = [_HEAD]
    for row in cell.rows:
        lines.append(f"| `{row.contender}` | {' | '.join(_figures(cell, row, copy))} |\n")
    return "".join(lines)


def _figures(cell: Cell, row: Row, copy: Row | None) -> Iterator[str]:
    """The columns of a row after its name."""
    yield str(len(row.samples))
    yield _seconds(row.seconds)
    yield f"{_seconds(row.least)} to {_seconds(row.most)}"
    yield "" if copy is None else f"{row.seconds / copy.seconds:.2f}"
    cpu = row.median("cpu_seconds")
    yield "" if cpu is None else f"{cpu:.2f}"
    yield f"{row.peak_nbytes / MIB:,.0f}"
    yield f"{row.temporary_nbytes / 1e6:,.0f}"
    size = cell.gb * GB
    for name in ("read", "written"):
        nbytes = row.median(name)
        yield "" if nbytes is None else f"{nbytes / size:.2f}"
    calls = [row.median("reads"), row.median("writes")]
    known = [count for count in calls if count is not None]
    yield f"{sum(known) / (size / 1e6):.2f}" if known else ""


def _starts(results: Results) -> str:
    if not results.starts:
        return ""
    head = (
        "On a model of 0.2 MB that lies in memory, with the bytecode written, medians of "
        f"{len(results.starts[0].seconds)} runs:\n\n"
        "| command | CPU seconds | seconds |\n|---|---|---|\n"
    )
    lines = [head]
    for one in results.starts:
        cpu, wall = statistics.median(one.cpu_seconds), statistics.median(one.seconds)
        lines.append(f"| `{one.name}` | {cpu:.3f} | {wall:.3f} |\n")
    return "".join(lines)


def _skipped(results: Results) -> str:
    """What did not run, and why."""
    lines = [
        f"* {direction.title}, {cell.gb:g} GB: `{one.contender}` ({one.why})"
        for direction in DIRECTIONS
        for cell in results.of(direction.key)
        for one in cell.skipped
    ]
    return "Not run:\n\n" + "\n".join(lines) + "\n" if lines else ""


def _swept(results: Results) -> list[Direction]:
    """The directions that were measured at several sizes."""
    return [one for one in DIRECTIONS if len(results.filled(one.key)) > 1]


def _shown(results: Results, direction: Direction) -> Cell | None:
    """The cell of a direction that tables of one size show."""
    own = results.filled(direction.key)
    return min(own, key=lambda cell: abs(cell.gb - _REFERENCE), default=None)


def _names(results: Results, among: Sequence[Cell] | None = None) -> list[str]:
    """The contenders that ran, in their order."""
    ran = {row.contender for cell in among or results.cells for row in cell.rows}
    order = [*_OWN, *(one.name for one in CONTENDERS if one.name not in _OWN)]
    return [name for name in order if name in ran]


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"
