"""How two models differ: in layers, widths, vocabulary, and kinds of tensors."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from msgspec import Struct

from reshard.core.tensors import Shape
from reshard.naming import ties
from reshard.naming.layouts import Piece
from reshard.naming.readings import NUMBER, templates_of

# Kinds of tensors that only one side has, shown in the table.
_KINDS = 4


class Trait(Struct, frozen=True):
    """One row: what is compared, and what it is on either side."""

    name: str
    checkpoint: str
    base: str


def differing(source: Mapping[str, Piece], base: Mapping[str, Piece]) -> tuple[Trait, ...]:
    """The traits in which two models differ, given by hub name; none where the names are alike.

    The number of layers and the width come first, because they show another size of the model.
    """
    mine, theirs = _Facts(source), _Facts(base)
    group = theirs.group
    numbers = [
        ("layers", mine.layers(group), theirs.layers(group)),
        ("hidden size", mine.width, theirs.width),
        ("vocabulary", mine.rows, theirs.rows),
    ]
    traits = [
        Trait(name, _shown(one), _shown(other)) for name, one, other in numbers if one != other
    ]
    if not mine.layers(group):
        return ()  # the names are not of one kind: no row would mean anything
    kinds = [(kind, "yes", "no") for kind in mine.kinds if kind not in theirs.kinds]
    kinds += [(kind, "no", "yes") for kind in theirs.kinds if kind not in mine.kinds]
    return (*traits, *(Trait(*kind) for kind in kinds[:_KINDS]))


def table(traits: tuple[Trait, ...]) -> str:
    """The rows below a heading, in columns."""
    rows = [("", "checkpoint", "base"), *((t.name, t.checkpoint, t.base) for t in traits)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"  {name:{widths[0]}}  {one:>{widths[1]}}  {other:>{widths[2]}}"
        for name, one, other in rows
    )


def _shown(number: int) -> str:
    return str(number) if number else "none"


class _Facts:
    """What a model's tensors say of it; 0 where they do not say."""

    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        numbers: defaultdict[str, set[str]] = defaultdict(set)
        counts: Counter[str] = Counter()
        self.kinds: dict[str, None] = {}
        for hub, template in zip(pieces, templates_of(pieces), strict=True):
            if template is not None and NUMBER in template:
                start = template.index(NUMBER)
                numbers[template].add(hub[start:].partition(".")[0])
                counts[template] += 1
        by_group: defaultdict[str, set[str]] = defaultdict(set)
        sizes: Counter[str] = Counter()
        for template, found in numbers.items():
            group, _, rest = template.partition(NUMBER)
            by_group[group] |= found
            sizes[group] += counts[template]
            self.kinds[".".join(rest.replace(f".{NUMBER}", "").split(".")[1:])] = None
        self._numbers = by_group
        self.group = sizes.most_common(1)[0][0] if sizes else ""
        embedding = next((pieces[n].shape for n in pieces if n in ties.EMBEDDINGS), ())
        self.rows, self.width = _sizes(embedding)

    def layers(self, group: str) -> int:
        """How many layers a group has, by what precedes their numbers."""
        return len(self._numbers.get(group, ()))


def _sizes(embedding: Shape) -> Shape:
    return embedding if len(embedding) == 2 else (0, 0)
