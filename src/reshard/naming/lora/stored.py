"""The shapes of weights that a checkpoint of adapters does not hold, looked up in its base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from reshard.core.tensors import Entry, Shape
from reshard.naming.beginnings import Endings


class Stored:
    """How the base keeps a weight that the checkpoint does not hold, by the ends of its names."""

    def __init__(self, base: Mapping[str, Entry]) -> None:
        self._shapes = [entry.spec.shape for entry in base.values()]
        self._ending = Endings(list(base))
        self._known: dict[str, set[Shape]] = {}

    def shape(self, name: str, product: tuple[int, int]) -> Shape:
        """`product`, or its reverse where the base stores the weight transposed (a Conv1D)."""
        found = next(filter(None, map(self._of, _ends(name))), set())
        return product[::-1] if product not in found and product[::-1] in found else product

    def _of(self, end: str) -> set[Shape]:
        if end not in self._known:
            places = self._ending.places(self._ending.span(end))
            self._known[end] = {self._shapes[place] for place in places}
        return self._known[end]


def _ends(name: str) -> Iterable[str]:
    """The ends of a name of two parts or more, the longest first."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(max(len(parts) - 1, 1)))
