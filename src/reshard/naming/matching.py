"""The differences between a checkpoint and its base, as one value.

The fit of the names creates it; the conversion, errors, the report, `inspect`, `diff` and
`reshard.json` use it. A conversion's decisions (to copy from the base or not) move names in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct, field

from reshard.errors import NamesError, listed

# Names in a row of a report.
_SHOWN = 5


class Resize(Struct, frozen=True):
    """A vocabulary of `rows` rows where the base has `base_rows`."""

    name: str
    base_rows: int
    rows: int

    def __str__(self) -> str:
        return f"{self.name}: {self.base_rows} rows to {self.rows}"


class Matching(Struct, frozen=True):
    """How a checkpoint's tensors and the base's match; the names are the output's but for those of
    `unexpected`, which are the checkpoint's.

    missing: tensors of the base that are not written. filled: those that are copied from it.
    unexpected: tensors of the checkpoint that are not written.
    tied: a name that is not stored -> the name that its weights are stored under.
    resized: tensors with another number of vocabulary rows than the base's.
    """

    missing: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    resized: tuple[Resize, ...] = ()

    def rows(self) -> list[tuple[str, str]]:
        """The matching as lines of a label and its words; what is empty has none."""
        rows = [("tied", listed(f"{a} = {b}" for a, b in self.tied.items()))] if self.tied else []
        for what in ("filled", "missing", "unexpected"):
            names: tuple[str, ...] = getattr(self, what)
            if names:
                rows.append((what, f"{len(names)}: {listed(names, _SHOWN)}"))
        return [*rows, ("resized", listed(map(str, self.resized)))] if self.resized else rows

    def to_json(self) -> dict[str, Any]:
        """The matching as JSON values; `resized` is left out where nothing is."""
        resized = {"resized": [str(one) for one in self.resized]} if self.resized else {}
        return {
            "tied": dict(self.tied),
            "filled": list(self.filled),
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            **resized,
        }


def of_error(error: NamesError) -> Matching:
    """The matching for an error about names: a refused conversion fills and ties nothing."""
    return Matching(missing=error.missing, unexpected=error.unexpected)


def parsed(names: Mapping[str, Any]) -> Matching:
    """The matching as `reshard.json` states it, vocabularies aside.

    Raises `TypeError`, `ValueError` or `AttributeError` for what is none.
    """
    missing, filled, unexpected = (
        tuple(map(str, names.get(what, ()))) for what in ("missing", "filled", "unexpected")
    )
    tied = {str(name): str(tie) for name, tie in names.get("tied", {}).items()}
    return Matching(missing, filled, unexpected, tied)
