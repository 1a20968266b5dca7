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
# Stretches of layers that one side lacks, and groups of layers, that are named.
_STRETCHES, _GROUPS = 4, 3


class Trait(Struct, frozen=True):
    """One row: what is compared, and what it is on either side."""

    name: str
    checkpoint: str
    base: str


class Differences(Struct, frozen=True):
    """How two models differ. `lacking` and `beyond` say in words which whole layers the checkpoint
    lacks, and which of its layers the base lacks; none where they have no layers in common."""

    traits: tuple[Trait, ...]
    lacking: tuple[str, ...]
    beyond: tuple[str, ...]


def differing(source: Mapping[str, Piece], base: Mapping[str, Piece]) -> Differences:
    """How two models differ that are given by hub name."""
    mine, theirs = _Facts(source), _Facts(base)
    return Differences(_traits(mine, theirs), mine.lacks_of(theirs), theirs.lacks_of(mine))


def _traits(mine: _Facts, theirs: _Facts) -> tuple[Trait, ...]:
    """The traits that differ; none where the names are alike.

    The number of layers and the width come first, because they show another size of the model.
    """
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

    def lacks_of(self, other: _Facts) -> tuple[str, ...]:
        """The layers that the other has and this lacks whole, in words, by group of layers."""
        found = []
        for group, numbers in other._numbers.items():
            lacking = numbers - self._numbers.get(group, numbers)
            if lacking and group and not f".{group}".endswith(".experts."):
                found.append(f"{_stretches({*map(int, lacking)})} of {group.removesuffix('.')}")
        return tuple(found[:_GROUPS])

    def layers(self, group: str) -> int:
        """How many layers a group has, by what precedes their numbers."""
        return len(self._numbers.get(group, ()))


def _sizes(embedding: Shape) -> Shape:
    return embedding if len(embedding) == 2 else (0, 0)


def _stretches(numbers: set[int]) -> str:
    """Numbers for people.

    >>> _stretches({3, 4, 5, 9}), _stretches({7})
    ('layers 3 to 5 and 9', 'layer 7')
    """
    starts = sorted(number for number in numbers if number - 1 not in numbers)
    ends = sorted(number for number in numbers if number + 1 not in numbers)
    found = [
        str(start) if start == end else f"{start} to {end}"
        for start, end in zip(starts, ends, strict=True)
    ]
    if len(found) > _STRETCHES:
        return f"{len(numbers)} layers ({', '.join(found[:_STRETCHES])}, ...)"
    told = " and ".join(filter(None, (", ".join(found[:-1]), found[-1])))
    return f"layer{'s' * (len(numbers) > 1)} {told}"
