"""The map of names, as a value: what each tensor of the output is made of, and what is not made.

`fit` returns one. It names the checkpoint's tensors and holds none, so `apply` makes the output's
tensors from any table with those names: the weights, the moments of an optimizer, averaged copies.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from msgspec import Struct, field
from msgspec.structs import replace

from reshard.core.arrangement import Arrangement, Arranger, Whole, sources
from reshard.core.findings import Finding
from reshard.core.tensors import Entry
from reshard.naming.matching import Matching


class NameMap(Struct, frozen=True):
    """A checkpoint's tensors as the base has them. Names are the base's unless said otherwise.

    outputs: name -> what makes it, by the checkpoint's own names.
    origins: name -> the checkpoint's name, of tensors that are one of its tensors as it stands.
    prefix, rules: what was stripped from the names, and what was done to them, in words.
    matching: what is missing, to be filled, unexpected, tied and resized.
    from_base: a name -> the tensor of the base, of another name, to copy.
    tied_to: a head of its own in the output -> the tensor that the base ties it to.
    config_patches: dotted path in `config.json` -> new value.
    undecided: pairs of the checkpoint's names whose values decide a tie, where no `equal` was
    given; they were taken to be equal.
    findings: what a user should read.
    """

    outputs: Mapping[str, Arrangement]
    origins: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    rules: tuple[str, ...] = ()
    matching: Matching = Matching()
    from_base: Mapping[str, str] = field(default_factory=dict)
    tied_to: Mapping[str, str] = field(default_factory=dict)
    config_patches: Mapping[str, object] = field(default_factory=dict)
    undecided: tuple[tuple[str, str], ...] = ()
    findings: tuple[Finding, ...] = ()


class _Identity(Mapping[str, Arrangement]):
    """Names to themselves; of 200,000 no arrangement is made before someone asks for it."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names

    def __getitem__(self, name: str) -> Arrangement:
        if name not in self._names:
            raise KeyError(name)
        return Whole(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def identity(names: Collection[str]) -> Mapping[str, Arrangement]:
    """Every tensor as it is, under its own name. `names` are kept: a set, or a table's keys."""
    return _Identity(names)


def apply(outputs: Mapping[str, Arrangement], table: Mapping[str, Entry]) -> dict[str, Entry]:
    """The output's tensors, by name, made from a table of the checkpoint's names.

    Dtypes are the table's. Raises `PlanError` where its shapes or dtypes do not allow it.
    """
    arranger = Arranger(table)
    return {
        name: replace(arranger.make(made).renamed(name), aliases=())
        for name, made in outputs.items()
    }


class Translation(Struct, frozen=True):
    """A map of names for any table of a checkpoint's tensors: weights, or moments of some of them.

    sources: each output's name -> the names of what it is made of. make: the outputs of a table
    that holds all of their sources; others are left out.
    """

    sources: Mapping[str, tuple[str, ...]]
    make: Callable[[Mapping[str, Entry]], dict[str, Entry]]


def translation(outputs: Mapping[str, Arrangement]) -> Translation:
    """The translation that arrangements make."""
    made_of = {name: tuple(dict.fromkeys(sources(made))) for name, made in outputs.items()}

    def make(table: Mapping[str, Entry]) -> dict[str, Entry]:
        there = table.keys()
        return apply({n: made for n, made in outputs.items() if there >= {*made_of[n]}}, table)

    return Translation(made_of, make)
