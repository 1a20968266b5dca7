"""The charts of docs/performance.md, drawn by matplotlib: the same results give the same SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.contenders import CP, CP_READ_BACK, DIRECTIONS, NO_VERIFY, RESHARD, Direction
from benchmarks.results import Results, Row
from benchmarks.shapes import GB

_COPIES = (RESHARD, NO_VERIFY, CP, CP_READ_BACK)
_COLOURS = {RESHARD: "#0969da", NO_VERIFY: "#54aeff", CP: "#8c959f", CP_READ_BACK: "#24292f"}
_OTHERS = ("#cf222e", "#bf8700", "#8250df")
# The identifiers in the file follow from this word, and text stays text.
_STYLE: Any = {"svg.hashsalt": "reshard", "svg.fonttype": "none", "font.size": 9}


def save(results: Results, folder: Path) -> list[Path]:
    """Draw every chart into the folder; their paths."""
    mib = 1 << 20
    charts: dict[str, tuple[Callable[[Row], float], str, bool, bool]] = {
        "time": (lambda row: row.seconds, "seconds", False, False),
        "tools": (lambda row: row.seconds, "seconds", True, True),
        "memory": (lambda row: row.peak_nbytes / mib, "peak MiB", True, True),
    }
    folder.mkdir(exist_ok=True)
    paths = []
    for name, (value, label, everyone, logarithmic) in charts.items():
        paths.append(folder / f"performance-{name}.svg")
        figure = _figure(results, value, label, everyone=everyone, logarithmic=logarithmic)
        with mpl.rc_context(_STYLE):
            figure.savefig(paths[-1], metadata={"Date": None})
    return paths


def _figure(
    results: Results,
    value: Callable[[Row], float],
    label: str,
    *,
    everyone: bool,
    logarithmic: bool,
) -> Figure:
    """A panel for each direction that has several sizes."""
    swept = [one for one in DIRECTIONS if len(results.filled(one.key)) > 1]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.1 * max(1, -(-len(swept) // 2))), layout="constrained")
        panels = figure.subplots(max(1, -(-len(swept) // 2)), 2, squeeze=False).flat
        for panel, direction in zip(panels, swept, strict=False):
            _panel(panel, results, direction, value, everyone=everyone)
            panel.set_title(direction.title, loc="left", fontsize=10)
            panel.set_xlabel("GB of 16-bit weights")
            panel.set_ylabel(label)
            if logarithmic:
                panel.set_xscale("log", base=2)
                panel.set_yscale("log")
                sizes = [cell.gb for cell in results.filled(direction.key)]
                panel.set_xticks(sizes, [f"{size:g}" for size in sizes])
            else:
                panel.set_xlim(left=0)
                panel.set_ylim(bottom=0)
            panel.grid(visible=True, color="#d0d7de", linewidth=0.6)
            beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if everyone else {}
            panel.legend(fontsize=8, frameon=False, **beside)
    return figure


def _panel(
    panel: Any,
    results: Results,
    direction: Direction,
    value: Callable[[Row], float],
    *,
    everyone: bool,
) -> None:
    own = results.filled(direction.key)
    ran = [row.contender for cell in own for row in cell.rows]
    names = [name for name in _COPIES if name in ran]
    others = [name for name in dict.fromkeys(ran) if name not in _COPIES] if everyone else []
    for name in (*names, *others):
        points = [(cell.nbytes / GB, row) for cell in own if (row := cell.row(name))]
        colour = _COLOURS.get(name) or _OTHERS[others.index(name) % len(_OTHERS)]
        at, middle = [size for size, _ in points], [value(row) for _, row in points]
        panel.plot(at, middle, "o-", color=colour, label=name, markersize=3, linewidth=1.4)
        if not everyone:
            rows = [row for _, row in points]
            _bars(panel, at, rows, colour)


def _bars(panel: Any, at: Sequence[float], rows: Sequence[Row], colour: str) -> None:
    """From the least to the most."""
    for x, row in zip(at, rows, strict=True):
        panel.plot([x, x], [row.least, row.most], color=colour, linewidth=0.8, alpha=0.6)
