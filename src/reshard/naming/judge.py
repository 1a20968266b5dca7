"""The verdict on each hub tensor, once source and base are read."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from enum import Enum
from fnmatch import translate
from functools import lru_cache

from msgspec import Struct, field

from reshard.core.tensors import Shape
from reshard.naming import ties
from reshard.naming.layouts import Piece, Version
from reshard.naming.readings import Reading
from reshard.naming.schema import (
    Schema,
    constants_of,
    says_tied,
    says_untied,
    unheld_of,
)

# Characters of a name that a pattern for it spells out.
_MAX_PATTERN = 200


class FitOptions(Struct, frozen=True):
    """What the user declared.

    `prefix`: take only the tensors under it, and strip it. `chosen`: a prefix was named and
    stripped before, so that no error suggests one. `fill_from_base`: tensors that the checkpoint
    does not hold are copied from the base. `headless`: the checkpoint is of a class without an
    output head, the base's is left out. `allow`: names (on the base's or the checkpoint's side)
    that may be missing or left over, where `*` is any characters. `transformers_version`: what the
    checkpoint was trained with; needed only where shapes do not show its layout. `untied`: tensors
    of the checkpoint, by its names, that are known to be tied to no other. `updated`: those that
    are written with an update, and a key of it: two tensors of equal values are one in the output
    only where their updates are, too.
    """

    prefix: str | None = None
    chosen: bool = False
    fill_from_base: bool = False
    headless: bool = False
    allow: tuple[str, ...] = ()
    transformers_version: Version | None = None
    untied: frozenset[str] = frozenset()
    updated: Mapping[str, str] = field(default_factory=dict)

    def allows(self, name: str, prefix: str = "") -> bool:
        """Whether a name may be missing or left over; patterns may leave out the prefix."""
        if not self.allow:
            return False
        found = _matcher(self.allow)
        if found(name) is not None:
            return True
        return name.startswith(prefix) and found(name[len(prefix) :]) is not None


def matched(names: Collection[str], patterns: Iterable[str]) -> bool:
    """Whether one of the names is matched by one of the patterns that `--allow` takes."""
    found = _matcher(tuple(patterns))
    return any(found(name) for name in names)


@lru_cache(maxsize=64)
def _matcher(given: tuple[str, ...]) -> Callable[[str], object]:
    """One expression: of 40,000 names that do not fit, each is asked for several times."""
    if not given:
        return lambda _: None
    return re.compile("|".join(f"(?:{translate(pattern)})" for pattern in given)).match


def pattern_of(name: str) -> str:
    r"""The pattern for `--allow` that matches a name, safe in single quotes on a command line.

    Wildcards take the place of the end of a long name and of what a shell, a terminal or the
    pattern itself would read as something else.

    >>> pattern_of("extra.weight"), pattern_of("a'; \n[0]")
    ('extra.weight', 'a?; ??0?')
    """
    start = "".join("?" if c in "'[]*?" or not c.isprintable() else c for c in name[:_MAX_PATTERN])
    return start if len(name) <= _MAX_PATTERN else f"{start}*"


class Verdict(Enum):
    """What happens to one hub tensor; the last three are faults."""

    MATCHED = "in both, with one shape"
    RESIZED = "in both, with another number of vocabulary rows"
    COPIED = "the base's, which the source stores under another of its names"
    FILLED = "taken from the base"
    LEFT_OUT = "the base's, not written"
    DROPPED = "the source's, not written"
    PARTNER = "another name of a tensor of the source, which the base does not store"
    MISSING = "the base's, without a source"
    UNEXPECTED = "the source's, without a place"
    MISMATCHED = "in both, with two shapes"

    # Enum's own is a function of Python's, and each of 300,000 names is sorted by its verdict.
    __hash__ = object.__hash__


FAULTS = (Verdict.MISSING, Verdict.UNEXPECTED, Verdict.MISMATCHED)


class Judge:
    """Compares readings of the source with readings of the base.

    `owners`: the source's names -> the names of their entries.
    """

    def __init__(self, owners: Mapping[str, str], schema: Schema, options: FitOptions) -> None:
        self._owners = owners
        self._several = {own for own, count in Counter(owners.values()).items() if count > 1}
        self._options = options
        self._tied, self._untied = says_tied(schema.config), says_untied(schema.config)
        self._is_constant = constants_of(schema.config)
        self._is_unheld = unheld_of(schema.config)

    def _comes_with_base(self, hub: str) -> bool:
        return self._is_constant(hub) or self._is_unheld(hub)

    def is_fault(self, hub: str, piece: Piece, want: Mapping[str, Piece], prefix: str) -> bool:
        """Whether a tensor of the source is a fault, whatever else the source holds."""
        base = want.get(hub)
        if base is None:
            return not self.may_be_beside(hub, piece, prefix)
        one = piece.shape[1:] == base.shape[1:] and ties.is_known(hub)
        return piece.shape != base.shape and not one

    def may_be_beside(self, hub: str, piece: Piece, prefix: str) -> bool:
        """Whether a tensor that the base does not have may be no fault."""
        return (
            ties.is_known(hub)
            or self._owners[piece.name] in self._several
            or self._may_be_dropped(hub, piece, prefix)
        )

    def _may_be_dropped(self, hub: str, piece: Piece, prefix: str) -> bool:
        """Whether the config computes a tensor, or the user allowed to drop it."""
        return self._is_constant(hub) or self._options.allows(piece.name, prefix)

    def may_be_absent(self, hub: str, piece: Piece) -> bool:
        """Whether it may be no fault that the source has no tensor of this name."""
        options = self._options
        return (
            options.fill_from_base
            or ties.is_known(hub)
            or self._comes_with_base(hub)
            or options.allows(piece.name)
        )

    def may_fit(self, source: Reading, base: Reading, prefix: str) -> bool:
        """Whether no tensor contradicts the reading; most readings fail at the first.

        An output would lack the base's misfits.
        """
        if source.misfits or base.misfits:
            return False
        return all(verdict not in FAULTS for verdict, _ in self._judge(source, base, prefix))

    def verdicts(
        self, source: Reading, base: Reading, prefix: str
    ) -> dict[Verdict, tuple[str, ...]]:
        sorted_: defaultdict[Verdict, list[str]] = defaultdict(list)
        for verdict, hub in self._judge(source, base, prefix):
            sorted_[verdict].append(hub)
        _demand_one_vocabulary(sorted_, source.pieces)
        return {verdict: tuple(names) for verdict, names in sorted_.items()}

    def _judge(self, source: Reading, base: Reading, prefix: str) -> Iterator[tuple[Verdict, str]]:
        have, want = source.pieces, base.pieces
        known = {**want, **have} if self._tied else have
        used: set[str] = set()
        cut: set[str] = set()
        for hub, piece in want.items():
            stored = hub if hub in have else self._partner(hub, piece, have, want)
            if stored is not None:
                held = have[stored]
                used.add(self._owners[held.name])
                if held.expert is not None:
                    cut.add(held.name)
            if stored is None:
                yield self._absent(hub, piece), hub
            elif stored == hub:
                yield _shapes(hub, have[hub].shape, piece.shape, have, want), hub
            else:
                yield Verdict.COPIED, hub
        for hub, piece in have.items():
            if hub not in want:
                others = known if ties.is_head(hub) else have
                kept = self._owners[piece.name] in used and piece.name not in cut
                yield self._extra(hub, piece, others, prefix, held=kept), hub

    def _partner(
        self, hub: str, piece: Piece, have: Mapping[str, Piece], want: Mapping[str, Piece]
    ) -> str | None:
        """The source's tensor that stands in for a tensor of the base which the source lacks."""
        partner = ties.tied_partner(hub, have)
        if partner is None or have[partner].name in self._options.untied:
            return None
        if (self._options.headless and ties.is_head(hub)) or (
            have[partner].shape[1:] != piece.shape[1:]
        ):
            return None
        # What the base stores once is one tensor, unless its config says that head and embedding
        # are two.
        apart = self._untied and (ties.is_head(hub) or ties.is_head(partner))
        one = (partner not in want and not apart) or ties.are_one(hub, partner, tied=self._tied)
        return partner if one else None

    def _absent(self, hub: str, piece: Piece) -> Verdict:
        """A tensor of the base that the source has under no name."""
        options = self._options
        if options.headless and ties.is_head(hub):
            return Verdict.LEFT_OUT
        if options.fill_from_base or self._comes_with_base(hub):
            return Verdict.FILLED
        if options.allows(piece.name):
            return Verdict.LEFT_OUT
        return Verdict.MISSING

    def _extra(
        self, hub: str, piece: Piece, others: Mapping[str, Piece], prefix: str, *, held: bool
    ) -> Verdict:
        """A tensor of the source that the base does not have; its partner may be among `others`.

        `held`: the base has it under another name.
        """
        if held or self._may_be_dropped(hub, piece, prefix):
            return Verdict.DROPPED
        partner = ties.tied_partner(hub, others)
        if partner is not None and others[partner].shape == piece.shape:
            return Verdict.PARTNER
        return Verdict.UNEXPECTED


def _shapes(hub: str, have: Shape, want: Shape, *names: Mapping[str, Piece]) -> Verdict:
    """`names` are the source's and the base's: a head's embedding may be in one of them alone."""
    if have == want:
        return Verdict.MATCHED
    if have[1:] == want[1:] and any(ties.is_vocabulary(hub, held) for held in names):
        return Verdict.RESIZED
    return Verdict.MISMATCHED


def _demand_one_vocabulary(
    verdicts: defaultdict[Verdict, list[str]], have: Mapping[str, Piece]
) -> None:
    """Head and embedding must have the same number of rows, or neither counts as resized."""
    resized = verdicts[Verdict.RESIZED]
    if not resized:
        return
    # A head counts here beside any embedding: a guessed layout may have renamed one of them.
    vocabulary = [hub for hub in have if ties.is_head(hub) or ties.is_vocabulary(hub, have)]
    if len({have[hub].shape[:1] for hub in vocabulary}) > 1:
        verdicts[Verdict.MISMATCHED].extend(resized)
        verdicts[Verdict.RESIZED] = []
