"""The page of `reshard diff`: what changed, at a glance, then tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from reshard.comparison.result import Compared, Comparison
from reshard.comparison.sums import percent, short
from reshard.pages.figures import (
    Histogram,
    Legend,
    Map,
    maps,
    relative_changes,
    sizes,
    steps,
)
from reshard.pages.page import render


class Step(Struct, frozen=True):
    """A comparison with its figures; `title` is short, and is its only name in a list of steps."""

    title: str
    found: Comparison
    maps: Sequence[Map]
    legends: Sequence[Legend]
    histograms: Sequence[Histogram]
    has_energy: bool


def changes_page(comparisons: Sequence[Comparison]) -> str:
    """The page of one comparison, or of each of several checkpoints with the one before.

    Raises `UnsupportedError` without jinja2.
    """
    made = [_step(found) for found in comparisons]
    over: list[Map] = []
    legends: list[Legend] = []
    if len(made) > 1:
        columns = [_name(step.found.second) for step in made]
        rows = {
            "Modules": [step.found.modules() for step in made],
            "Layers": [step.found.layers() for step in made],
        }
        over, scale = steps(columns, [step.title for step in made], rows)
        legends = scale.legends()
    return render(
        "changes.html.jinja",
        title=_title(comparisons),
        steps=made,
        columns=_columns,
        cells=_cells,
        over=over,
        legends=legends,
    )


def _title(comparisons: Sequence[Comparison]) -> str:
    first, last = comparisons[0], comparisons[-1]
    if len(comparisons) == 1:
        return f"{first.first} → {first.second}"
    return f"{len(comparisons) + 1} checkpoints: {_name(first.first)} → {_name(last.second)}"


def _name(path: str) -> str:
    return Path(path).name or path


def _step(comparison: Comparison) -> Step:
    made, scale = maps(comparison.tensors)
    histograms = [sizes(comparison.sizes), relative_changes(comparison.tensors)]
    return Step(
        f"{_name(comparison.first)} → {_name(comparison.second)}",
        comparison,
        made,
        scale.legends(),
        [histogram for histogram in histograms if histogram is not None],
        any(one.change.energy for one in comparison.tensors),
    )


def _columns(step: Step) -> list[tuple[str, str]]:
    """The titles of the columns of numbers, and what they are."""
    columns = [
        ("elements", "the share of elements that differ"),
        ("largest", "the largest |a - b|"),
        ("mean", "the mean |a - b| of the elements that differ"),
        ("rel. max", "the largest |a - b| / max(|a|, |b|)"),
        ("rel. mean", "its mean over the elements that differ"),
        ("cosine", "of the angle between the tensors"),
        ("change", "the norm of the change over the norm of the weights"),
    ]
    if step.has_energy:
        words = "the share of the change that its best approximation of this rank holds"
        columns += [("rank 1", words), ("rank 8", words)]
    return columns


def _cells(step: Step, one: Compared) -> list[tuple[str, str]]:
    """A tensor's numbers: each to sort by, empty where there is none, and in words."""
    change = one.change
    share = change.differing / max(change.numel, 1)
    cosine = "-" if change.cosine is None else f"{change.cosine:.6f}"
    cells = [_cell(share, percent(share))]
    for value in (change.largest, change.mean, change.largest_relative, change.mean_relative):
        cells.append(_cell(value, short(value)))
    cells += [_cell(change.cosine, cosine), _cell(change.relative, short(change.relative))]
    if step.has_energy:
        energy = change.energy
        cells += [_cell(energy[at], percent(energy[at])) if energy else ("", "-") for at in (0, -1)]
    return cells


def _cell(value: float | None, words: str) -> tuple[str, str]:
    return ("" if value is None else repr(value)), words
