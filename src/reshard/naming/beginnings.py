"""Which of many names begin or end with some parts, without a text for each such part.

40,000 names of 100 parts have 4 million beginnings; only the names are held, sorted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

# Sorts after every continuation of a text.
_LAST = chr(0x10FFFF)


def heads(name: str) -> Sequence[str]:
    """The beginnings of a name up to each dot, the shortest first.

    >>> heads("a.b.c")
    ['a', 'a.b']
    """
    return [name[:place] for place, sign in enumerate(name) if sign == "."]


class Beginnings:
    """The beginnings of names up to each dot.

    >>> "a.b" in Beginnings(["a.b.c"]), "a.b.c" in Beginnings(["a.b.c"])
    (True, False)
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._sorted = sorted(names)

    def __contains__(self, module: object) -> bool:
        start = f"{module}."
        place = bisect_left(self._sorted, start)
        return place < len(self._sorted) and self._sorted[place].startswith(start)


class Endings:
    """The ends of names after each dot, and the names themselves."""

    def __init__(self, names: Sequence[str]) -> None:
        self._sorted = sorted((f".{name}"[::-1], place) for place, name in enumerate(names))

    def span(self, end: str) -> range:
        """The names that end so, in an order of their own: for `places`."""
        start = f".{end}"[::-1]
        low, high = (bisect_left(self._sorted, (text,)) for text in (start, start + _LAST))
        return range(low, high)

    def places(self, span: range) -> Iterator[int]:
        """The places of the names in a span.

        >>> ends = Endings(["a.b.c", "b.c", "bb.c"])
        >>> list(ends.places(ends.span("b.c")))
        [1, 0]
        """
        return (self._sorted[index][1] for index in span)
