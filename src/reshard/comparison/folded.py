"""Differences of many tensors as a short table: layers folded, in natural order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from msgspec import Struct

from reshard.comparison.values import Difference
from reshard.errors import printable

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


class Row(Struct, frozen=True):
    """Tensors that differ in the same way, whose names are alike but for layers and experts.

    `name` has `*` for the numbers that differ. `share` of all their elements
    differ, by `largest` at most and by `mean` on average of those that differ.
    """

    name: str
    tensors: int
    kind: str
    share: float = 0.0
    largest: float = 0.0
    mean: float = 0.0

    def cells(self) -> tuple[str, ...]:
        """The row as text: name, tensors, and how they differ."""
        if self.kind:
            return printable(self.name), str(self.tensors), self.kind, "", ""
        share = f"{100 * self.share:.1f} %"
        return self.name, str(self.tensors), share, f"{self.largest:.3g}", f"{self.mean:.3g}"


HEADER = ("tensor", "tensors", "differ", "largest", "mean")


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts layer 2 before layer 10.

    >>> sorted(["layers.10.w", "layers.2.w", "embed.w"], key=natural)
    ['embed.w', 'layers.2.w', 'layers.10.w']
    """
    return [
        (0, int(part), "") if part.isdecimal() and len(part) < 19 else (1, 0, part)
        for part in re.split(r"(\d+)", name)
    ]


def folded(differences: Iterable[Difference], *, fold: bool = True) -> list[Row]:
    """The differences as rows; without `fold` one for each tensor."""
    groups: dict[tuple[str, str], list[Difference]] = {}
    for found in sorted(differences, key=lambda found: natural(found.name)):
        name = _NUMBER.sub("*", found.name) if fold else found.name
        groups.setdefault((name, "" if found.kind == "values" else str(found)), []).append(found)
    return [_row(name, kind, group) for (name, kind), group in groups.items()]


def _row(name: str, kind: str, group: Sequence[Difference]) -> Row:
    title = group[0].name if len(group) == 1 else name
    if kind:
        return Row(title, len(group), kind)
    numel = sum(found.numel for found in group)
    differing = sum(found.differing for found in group)
    return Row(
        title,
        len(group),
        "",
        differing / max(numel, 1),
        max(found.largest for found in group),
        sum(found.mean * found.differing for found in group) / max(differing, 1),
    )
