"""Where the marks of a plot go: plain geometry, which the page's template draws as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reshard.evaluate.report import Batch, Sample

# All lengths are in SVG user units; the page scales the whole drawing to its column.
WIDTH = 360.0
_LEFT = 64.0
_RIGHT = 72.0
_TOP = 8.0
_ROW = 34.0
_AXIS = 22.0


@dataclass(frozen=True, slots=True)
class Mark:
    """A point and the words that a pointer over it shows."""

    x: float
    words: str


@dataclass(frozen=True, slots=True)
class Row:
    """One batch size: its samples as dots, their median as a tick with its value beside it."""

    y: float
    label: str
    dots: tuple[Mark, ...]
    median: Mark


@dataclass(frozen=True, slots=True)
class Plot:
    """A strip plot. `ticks` are marks on the axis; `left`, `right` and `base` bound the field."""

    title: str
    unit: str
    rows: tuple[Row, ...]
    ticks: tuple[Mark, ...]
    left: float
    right: float
    base: float
    height: float


@dataclass(frozen=True, slots=True)
class _Figure:
    title: str
    unit: str
    value: Callable[[Sample], float | None]


def _scaled(name: str, factor: float) -> Callable[[Sample], float | None]:
    def value(sample: Sample) -> float | None:
        found = getattr(sample, name)
        return None if found is None else float(found) * factor

    return value


_FIGURES = (
    _Figure("Throughput", "tokens/s", _scaled("tokens_per_second", 1)),
    _Figure("Time to first token", "ms", _scaled("time_to_first_token", 1000)),
    _Figure("Time per output token", "ms", _scaled("time_per_output_token", 1000)),
    _Figure("Whole call", "s", _scaled("seconds", 1)),
    _Figure("Peak CPU memory", "MiB", _scaled("peak_cpu_bytes", 2**-20)),
    _Figure("Peak GPU memory", "MiB", _scaled("peak_gpu_bytes", 2**-20)),
)


def benchmark_plots(batches: Sequence[Batch]) -> list[Plot]:
    """One plot for each figure that the benchmark has."""
    plots: list[Plot] = []
    for figure in _FIGURES:
        rows = [
            (f"batch {batch.batch_size}", [figure.value(sample) for sample in batch.samples])
            for batch in batches
        ]
        known = [(label, [v for v in values if v is not None]) for label, values in rows]
        if known and all(values for _, values in known):
            plots.append(strip(figure.title, figure.unit, known))
    return plots


def strip(title: str, unit: str, rows: Sequence[tuple[str, Sequence[float]]]) -> Plot:
    """A strip plot over an axis that begins at zero, so that lengths compare as ratios."""
    ticks = axis(max(max(values) for _, values in rows))
    left, right = _LEFT, WIDTH - _RIGHT
    scale = (right - left) / (ticks[-1] or 1)

    def mark(value: float, words: str) -> Mark:
        return Mark(round(left + value * scale, 1), words)

    drawn = tuple(
        Row(
            y=_TOP + _ROW * (index + 0.5),
            label=label,
            dots=tuple(mark(value, f"{_number(value)} {unit}") for value in values),
            median=mark(_median(values), _number(_median(values))),
        )
        for index, (label, values) in enumerate(rows)
    )
    base = _TOP + _ROW * len(rows)
    marks = tuple(mark(tick, _number(tick)) for tick in ticks)
    return Plot(title, unit, drawn, marks, left, right, base, base + _AXIS)


def axis(largest: float, most: int = 4) -> list[float]:
    """Round numbers from zero to at least `largest`, at most `most` steps.

    >>> axis(73)
    [0.0, 20.0, 40.0, 60.0, 80.0]
    """
    if largest <= 0:
        return [0.0, 1.0]
    rough = largest / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= rough * (1 - 1e-9))
    return [round(step * index, 12) for index in range(math.ceil(largest / step - 1e-9) + 1)]


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _number(value: float) -> str:
    """Three significant digits, thousands apart.

    >>> _number(1234.5), _number(0.01234)
    ('1,234', '0.0123')
    """
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
