"""Shared by the steps of the fit: the map that the search found, and what each step adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from reshard.core.arrangement import Arrangement
from reshard.core.findings import Finding
from reshard.core.tensors import Entry, Equal
from reshard.naming.judge import FitOptions, Verdict
from reshard.naming.layouts import Piece
from reshard.naming.ways import Candidate


class Known(Struct, frozen=True):
    """The map that the search found, and the tensors that it maps.

    owners: a name without wrappers' parts -> the checkpoint's own. by_name: its entry.
    """

    candidate: Candidate
    owners: Mapping[str, str]
    by_name: Mapping[str, Entry]
    config: Mapping[str, object]
    options: FitOptions
    equal: Equal | None

    @property
    def have(self) -> Mapping[str, Piece]:
        """The checkpoint's pieces, by hub name."""
        return self.candidate.source.pieces

    @property
    def want(self) -> Mapping[str, Piece]:
        """The base's pieces, by hub name."""
        return self.candidate.base.pieces

    def own(self, hub: str) -> str:
        """The checkpoint's own name of a piece that it has."""
        return self.owners[self.have[hub].name]

    def here(self, hub: str) -> str:
        """The base's name of a piece, or the name that the base would give it."""
        return self.candidate.base_view.name_here(hub)

    def named(self, verdict: Verdict) -> tuple[str, ...]:
        """The base's names of the pieces of a verdict."""
        return tuple(dict.fromkeys(self.want[hub].name for hub in self.candidate.of(verdict)))


class FitResult(Struct, frozen=True):
    """What one step adds to the map; the fields are those of `NameMap` and its `Matching`."""

    outputs: Mapping[str, Arrangement] = {}
    origins: Mapping[str, str] = {}
    tied: Mapping[str, str] = {}
    tied_to: Mapping[str, str] = {}
    from_base: Mapping[str, str] = {}
    config_patches: Mapping[str, object] = {}
    unexpected: tuple[str, ...] = ()
    undecided: tuple[tuple[str, str], ...] = ()
    findings: tuple[Finding, ...] = ()

    def __add__(self, later: FitResult) -> FitResult:
        """Both results; where both name something, the later one counts."""
        joined: dict[str, Any] = {}
        for name in self.__struct_fields__:
            mine, theirs = getattr(self, name), getattr(later, name)
            table = isinstance(mine, Mapping)
            joined[name] = {**mine, **theirs} if table else (*mine, *theirs)
        return FitResult(**joined)


def is_chosen(options: FitOptions) -> bool:
    return options.chosen or options.prefix is not None
