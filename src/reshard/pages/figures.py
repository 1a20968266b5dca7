"""Heat maps and histograms: plain geometry, which the templates draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from reshard.comparison.result import Compared
from reshard.comparison.sums import Place, Sum, joined, natural, percent, place, short, summed

# What a heat map can show, and its name in the legend.
MEASURES = {
    "change": "norm of the change / norm of the weights",
    "largest": "largest difference",
    "mean": "mean difference",
    "elements": "share of elements that differ",
}
# The faintest colour of a cell that differs at all.
_FAINTEST = 0.06
_BINS = 24
# Marks below a histogram, besides the first.
_TICKS = 4


class Cell(Struct, frozen=True):
    """A cell of a heat map: `row` is the table's row that it leads to.

    `levels` are 0 to 1, by measure; without levels nothing differs, or nothing could be measured:
    `mark` says which.
    """

    words: str
    row: int | None = None
    levels: Mapping[str, float] = {}
    mark: str = ""


class Line(Struct, frozen=True):
    """A row of a heat map: None where the layer has no such module."""

    name: str
    cells: tuple[Cell | None, ...]


class Map(Struct, frozen=True):
    """A heat map: a stack's layers, each with its modules."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]


class Legend(Struct, frozen=True):
    """A measure's range, as words, by which colours are read."""

    measure: str
    title: str
    least: str
    most: str


class Scale:
    """Colours of measures: logarithmic, from the least to the most that is not 0."""

    def __init__(self, sums: Iterable[Sum]) -> None:
        every = [_values(one) for one in sums]
        self._ranges: dict[str, tuple[float, float]] = {}
        for measure in MEASURES:
            found = [v[measure] for v in every if 0 < v[measure] < math.inf]
            if found:
                self._ranges[measure] = (min(found), max(found))

    def levels(self, one: Sum) -> dict[str, float]:
        """Where a sum is in each measure's range."""
        return {
            measure: self._level(measure, value)
            for measure, value in _values(one).items()
            if measure in self._ranges
        }

    def _level(self, measure: str, value: float) -> float:
        least, most = self._ranges[measure]
        if value <= 0:
            return 0.0
        if value >= most or least == most:
            return 1.0
        share = math.log(value / least) / math.log(most / least)
        return round(_FAINTEST + (1 - _FAINTEST) * max(share, 0.0), 3)

    def legends(self) -> list[Legend]:
        """The ranges, as words."""
        return [
            Legend(m, MEASURES[m], *(percent(v) if m == "elements" else short(v) for v in bounds))
            for m, bounds in self._ranges.items()
        ]


def _values(one: Sum) -> dict[str, float]:
    change = math.inf if one.relative is None else one.relative
    return {"change": change, "largest": one.largest, "mean": one.mean, "elements": one.share}


def maps(tensors: Sequence[Compared]) -> tuple[list[Map], Scale]:
    """A heat map of each stack of layers, and one line of the tensors outside; and their colours.

    Rows of the table are the tensors in their order.
    """
    places = [place(one.name) for one in tensors]
    groups: dict[tuple[str, str, str], list[int]] = {}
    for number, where in enumerate(places):
        groups.setdefault(_key(where, tensors[number].name), []).append(number)
    sums = {
        key: summed(joined(*key), [tensors[n] for n in numbers if tensors[n].measured])
        for key, numbers in groups.items()
    }
    scale = Scale(sums.values())
    cells = {
        key: _cell(sums[key], [tensors[n] for n in numbers], numbers[0], scale)
        for key, numbers in groups.items()
    }
    stacks = sorted({key[0] for key in groups if key[1]}, key=natural)
    made = [_map(stack, cells) for stack in stacks]
    outside = {key: cell for key, cell in cells.items() if not key[1]}
    if outside:
        names = tuple(key[2] for key in outside)
        made.append(Map("Outside layers", names, (Line("", tuple(outside.values())),)))
    return made, scale


def _key(where: Place, name: str) -> tuple[str, str, str]:
    if where.layer is None:
        return "", "", name
    return where.stack, str(where.layer), where.module


def _cell(total: Sum, tensors: Sequence[Compared], row: int, scale: Scale) -> Cell:
    apart = [one for one in tensors if not one.measured]
    if apart:
        return Cell(f"{apart[0].name}: {apart[0]}", row, mark="apart")
    several = f", {total.tensors} tensors" if total.tensors > 1 else ""
    if not total.differing:
        return Cell(f"{total.name}{several}: equal", row, mark="equal")
    words = (
        f"{total.name}{several}: change {short(total.relative)}, {percent(total.share)} of "
        f"elements differ, by {short(total.largest)} at most and {short(total.mean)} on average"
    )
    return Cell(words, row, scale.levels(total))


def _map(stack: str, cells: Mapping[tuple[str, str, str], Cell]) -> Map:
    mine = {key[1:]: cell for key, cell in cells.items() if key[0] == stack and key[1]}
    modules = [*dict.fromkeys(module for _, module in mine)]
    layers = sorted({layer for layer, _ in mine}, key=int)
    lines = tuple(
        Line(layer, tuple(mine.get((layer, module)) for module in modules)) for layer in layers
    )
    return Map(f"{stack}.*" if stack else "*", tuple(modules), lines)


def steps(
    columns: Sequence[str], titles: Sequence[str], rows: Mapping[str, Sequence[Sequence[Sum]]]
) -> tuple[list[Map], Scale]:
    """Heat maps of changes from step to step; `rows` are those of each step, by the map's title.

    `columns` are the steps' short names, `titles` those in the words of a cell.
    """
    scale = Scale(one for each in rows.values() for step in each for one in step)
    maps = []
    for title, each in rows.items():
        by_name = [{one.name: one for one in step} for step in each]
        names = sorted({name for step in by_name for name in step}, key=natural)
        lines = tuple(
            Line(
                name,
                tuple(
                    _at_step(step.get(name), number, titles[number], scale)
                    for number, step in enumerate(by_name)
                ),
            )
            for name in names
        )
        maps.append(Map(title, tuple(columns), lines))
    return maps, scale


def _at_step(one: Sum | None, number: int, title: str, scale: Scale) -> Cell | None:
    if one is None:
        return None
    if not one.differing:
        return Cell(f"{one.name}, {title}: equal", number, mark="equal")
    return Cell(f"{one.name}, {title}: change {short(one.relative)}", number, scale.levels(one))


class Bar(Struct, frozen=True):
    """A bar of a histogram: its height, 0 to 1, and what it counts, in words."""

    height: float
    words: str


class Histogram(Struct, frozen=True):
    """Bars of equal width; `ticks` are (place from 0 to 1, label)."""

    title: str
    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]


def sizes(found: Sequence[tuple[int, int]]) -> Histogram | None:
    """How many elements changed by how much, in powers of two."""
    if not found:
        return None
    counts = dict(found)
    least, most = min(counts), max(counts)
    # The few smallest may reach far down: what is below a millionth of the largest is one bar.
    first = max(least, most - _BINS + 1)
    below = sum(count for exponent, count in counts.items() if exponent < first)
    bins = [
        (f"from {_power(e)} to {_power(e + 1)}", counts.get(e, 0)) for e in range(first, most + 1)
    ]
    if below:
        bins.insert(0, (f"below {_power(first)}", below))
    ticks = _ticks([_power(first - bool(below) + at) for at in range(len(bins) + 1)])
    return _histogram("Elements, by how far they moved", bins, "elements", ticks)


def relative_changes(tensors: Sequence[Compared]) -> Histogram | None:
    """How many tensors changed by how much, beside their norms."""
    values = [v for one in tensors if (v := one.change.relative) and one.kind == "values"]
    if len(values) < 2 or min(values) == max(values):
        return None
    low, high = math.log(min(values)), math.log(max(values))
    number = min(_BINS, max(6, len(values) // 4))
    width = (high - low) / number
    counts = [0] * number
    for value in values:
        counts[min(int((math.log(value) - low) / width), number - 1)] += 1
    edges = [f"{math.exp(low + width * at):.2g}" for at in range(number + 1)]
    bins = [(f"from {edges[at]} to {edges[at + 1]}", count) for at, count in enumerate(counts)]
    return _histogram("Tensors, by their change", bins, "tensors", _ticks(edges))


def _power(exponent: int) -> str:
    return f"{math.ldexp(1.0, exponent):.2g}"


def _ticks(edges: Sequence[str]) -> tuple[tuple[float, str], ...]:
    last = len(edges) - 1
    places = sorted({round(last * at / _TICKS) for at in range(_TICKS + 1)})
    return tuple((at / last, edges[at]) for at in places)


def _histogram(
    title: str, bins: Sequence[tuple[str, int]], what: str, ticks: tuple[tuple[float, str], ...]
) -> Histogram:
    most = max(count for _, count in bins)
    bars = tuple(Bar(count / most, f"{words}: {count:,} {what}") for words, count in bins)
    return Histogram(title, bars, ticks)
