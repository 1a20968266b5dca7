"""The search for the map: prefixes and layouts, until the source's tensors are the base's.

A candidate is a prefix to strip and a layout to read the rest through. It is complete where every
hub tensor of the base has one of the source with the same shape, and the other way round, but for
the exceptions that are declared: resized vocabularies, tied heads, constants, and what the user
allowed. Exactly one complete candidate must remain.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from fnmatch import fnmatchcase

from msgspec import Struct

from reshard.core.tensors import Entry, Shape
from reshard.errors import NamesError
from reshard.naming import families, ties
from reshard.naming.layouts import Effect, Names, Piece, Reading, Version, View
from reshard.naming.schema import (
    Schema,
    comes_with_base,
    is_constant,
    says_tied,
    says_untied,
    views_of,
)


class FitOptions(Struct, frozen=True):
    """What the user declared.

    `prefix`: take only the tensors under it, and strip it. `fill_from_base`: tensors that the
    checkpoint does not hold are copied from the base. `headless`: the checkpoint is of a class
    without an output head, the base's is left out. `allow`: names (on the base's or the
    checkpoint's side) that may be missing or left over, where `*` is any characters.
    `transformers_version`: what the checkpoint was trained with; needed only where its layout
    cannot be told from shapes. `untied`: tensors of the checkpoint, by its names, that are known to
    be tied to no other.
    """

    prefix: str | None = None
    fill_from_base: bool = False
    headless: bool = False
    allow: tuple[str, ...] = ()
    transformers_version: Version | None = None
    untied: frozenset[str] = frozenset()

    def allows(self, name: str) -> bool:
        """Whether a name may be missing or left over."""
        return any(fnmatchcase(name, pattern) for pattern in self.allow)


class Verdict(Enum):
    """What becomes of one hub tensor; the last three are faults."""

    MATCHED = "in both, with one shape"
    RESIZED = "in both, with another number of vocabulary rows"
    COPIED = "the base's, which the source stores under another of its names"
    FILLED = "taken from the base"
    LEFT_OUT = "the base's, not written"
    DROPPED = "the source's, not written"
    TWIN = "another name of a tensor of the source, which the base does not store"
    MISSING = "the base's, without a source"
    UNEXPECTED = "the source's, without a place"
    MISMATCHED = "in both, with two shapes"


FAULTS = (Verdict.MISSING, Verdict.UNEXPECTED, Verdict.MISMATCHED)

# Layouts that read the same names alike.
Views = tuple[View, ...]


class Candidate(Struct, frozen=True):
    """One way to read the source, compared with the base; verdicts are over hub names.

    `views` are the layouts that read it so, `base_view` one that reads the base.
    """

    prefix: str
    views: Views
    base_view: View
    source: Reading
    base: Reading
    verdicts: Mapping[Verdict, tuple[str, ...]]

    def of(self, verdict: Verdict) -> tuple[str, ...]:
        return self.verdicts.get(verdict, ())

    @property
    def faults(self) -> int:
        return len(self.source.misfits) + sum(len(self.of(verdict)) for verdict in FAULTS)

    @property
    def complete(self) -> bool:
        return self.faults == 0 and bool(self.of(Verdict.MATCHED))

    @property
    def title(self) -> str:
        return f"prefix {self.prefix!r}, names {self.views[0].title}"

    def assignment(self) -> dict[str, Piece]:
        """Hub name -> where the source holds it: two candidates with the same are one."""
        return {hub: piece for hub, piece in self.source.pieces.items() if hub in self.base.pieces}


class Sources(Struct, frozen=True):
    """The checkpoint's tensors by every name they have, wrappers' parts left out.

    `owners`: cleaned name -> the entry's own name. `shapes`: cleaned name -> shape.
    """

    owners: Mapping[str, str]
    shapes: Mapping[str, Shape]


def sources(entries: Mapping[str, Entry], prefix: str | None) -> Sources:
    """The names of all entries and aliases, without wrappers' parts; with `prefix`, those under it.

    Raises `NamesError` where two tensors get the same name that way, or none has the prefix.
    """
    owners: dict[str, str] = {}
    shapes: dict[str, Shape] = {}
    for own, entry in entries.items():
        for name in (own, *entry.aliases):
            clean = unwrap(name)
            if prefix is not None and not clean.startswith(prefix):
                continue
            if owners.setdefault(clean, own) != own:
                raise NamesError(
                    f"{owners[clean]!r} and {own!r} are both {clean!r} without wrappers' parts.",
                    hint="Name the part that holds the model with --prefix.",
                )
            shapes[clean] = entry.spec.shape
    if not shapes:
        raise NamesError(
            f"none of the checkpoint's {len(entries)} tensors has the prefix {prefix!r}."
            if prefix
            else "the checkpoint holds no tensor.",
            unexpected=tuple(entries),
        )
    return Sources(owners, shapes)


def unwrap(name: str) -> str:
    """The name without the parts that wrappers insert.

    >>> unwrap("module._orig_mod.model.norm._fsdp_wrapped_module.weight")
    'model.norm.weight'
    """
    return ".".join(part for part in name.split(".") if part not in families.WRAPPERS)


def search(found: Sources, schema: Schema, options: FitOptions) -> Candidate:
    """The one complete candidate; where there is none, the best of the incomplete.

    Raises `NamesError` where several are complete and differ in what goes where.
    """
    config = schema.config
    shapes = {name: spec.shape for name, spec in schema.specs.items()}
    bases = _distinct(Names(shapes), views_of(shapes, "", config))
    readings = [
        (prefix, same, source)
        for prefix in prefixes(found.shapes, options.prefix)
        for same, source in _distinct(
            Names(found.shapes, prefix), views_of(found.shapes, prefix, config)
        )
    ]
    judge = _Judge(found, schema, options)

    def candidate(reading: tuple[str, Views, Reading], base: tuple[Views, Reading]) -> Candidate:
        prefix, same, source = reading
        (base_view, *_), read = base
        return Candidate(prefix, same, base_view, source, read, judge.verdicts(source, read))

    tried: list[tuple[Views, Reading]] = []
    # The base is taken to be as on the hub where that fits: released models are.
    for base in bases:
        fitting = [candidate(one, base) for one in readings if judge.may_fit(one[2], base[1])]
        complete = [one for one in fitting if one.complete]
        if complete:
            return _unique(complete, options)
        tried.append(base)
    closest = [candidate(one, base) for base in tried for one in readings]
    return max(closest, key=lambda one: (len(one.of(Verdict.MATCHED)), -one.faults))


def _distinct(names: Names, layouts: Iterable[View]) -> Iterator[tuple[Views, Reading]]:
    """The different readings of the names, each with the views that give it."""
    by_effects: dict[tuple[Effect, ...], list[View]] = {}
    for view in layouts:
        by_effects.setdefault(names.effects(view), []).append(view)
    for effects, same in by_effects.items():
        yield tuple(same), names.read(effects)


def prefixes(names: Iterable[str], wanted: str | None) -> Iterator[str]:
    """The prefixes worth a try: what all names share, part by part, and the trainers' known ones.

    A known prefix needs half of the names behind it: fewer could not make a fit, only a bad guess
    in an error message.
    """
    if wanted is not None:
        yield wanted
        return
    split = [name.split(".")[:-1] for name in names]
    shared: list[str] = [""]
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(f"{shared[-1]}{parts[0]}.")
    yield from shared
    for prefix in families.PREFIXES:
        known = prefix.split(".")[:-1]
        holders = sum(name[: len(known)] == known for name in split)
        if prefix not in shared and 2 * holders > len(split):
            yield prefix


def _unique(complete: list[Candidate], options: FitOptions) -> Candidate:
    """The one way to read the source, or an error that names the ways."""
    different = [complete[0]]
    for candidate in complete[1:]:
        if all(candidate.assignment() != other.assignment() for other in different):
            different.append(candidate)
    version = options.transformers_version
    if len(different) > 1 and version is not None:
        different = [c for c in different if any(view.is_live(version) for view in c.views)]
    if len(different) == 1:
        return different[0]
    ways = "; ".join(candidate.title for candidate in different)
    raise NamesError(
        f"the checkpoint fits the base in {len(different)} ways that put tensors in different "
        f"places or orientations: {ways}.",
        hint="Name the transformers version it was trained with: --transformers-version.",
    )


class _Judge:
    """Compares readings of the source with readings of the base."""

    def __init__(self, found: Sources, schema: Schema, options: FitOptions) -> None:
        self._owners = found.owners
        self._options = options
        self._tied, self._untied = says_tied(schema.config), says_untied(schema.config)
        self._config = schema.config

    def may_fit(self, source: Reading, base: Reading) -> bool:
        """Whether no tensor stands in the way; most readings fail with the first."""
        return not source.misfits and all(v not in FAULTS for v, _ in self._judge(source, base))

    def verdicts(self, source: Reading, base: Reading) -> dict[Verdict, tuple[str, ...]]:
        sorted_: defaultdict[Verdict, list[str]] = defaultdict(list)
        for verdict, hub in self._judge(source, base):
            sorted_[verdict].append(hub)
        _demand_one_vocabulary(sorted_, source.pieces)
        return {verdict: tuple(names) for verdict, names in sorted_.items()}

    def _judge(self, source: Reading, base: Reading) -> Iterator[tuple[Verdict, str]]:
        have, want = source.pieces, base.pieces
        known = {**want, **have} if self._tied else have
        used: set[str] = set()
        for hub, piece in want.items():
            stored = hub if hub in have else self._twin(hub, piece, have, want)
            if stored is not None:
                used.add(self._owners[have[stored].name])
            if stored is None:
                yield self._absent(hub, piece), hub
            elif stored == hub:
                yield _shapes(hub, have[hub].shape, piece.shape, have), hub
            else:
                yield Verdict.COPIED, hub
        for hub, piece in have.items():
            if hub not in want:
                others = known if ties.is_head(hub) else have
                yield self._extra(hub, piece, others, used), hub

    def _twin(
        self, hub: str, piece: Piece, have: Mapping[str, Piece], want: Mapping[str, Piece]
    ) -> str | None:
        """The tensor of the source that stands for one of the base, which it has no tensor of."""
        twin = ties.twin_of(hub, have)
        if twin is None or have[twin].name in self._options.untied:
            return None
        if (self._options.headless and ties.is_head(hub)) or (
            have[twin].shape[1:] != piece.shape[1:]
        ):
            return None
        # What the base stores once is one tensor, unless its config says that head and embedding
        # are two.
        apart = self._untied and (ties.is_head(hub) or ties.is_head(twin))
        one = (twin not in want and not apart) or ties.are_one(hub, twin, tied=self._tied)
        return twin if one else None

    def _absent(self, hub: str, piece: Piece) -> Verdict:
        """A tensor of the base that the source does not have under any name."""
        options = self._options
        if options.headless and ties.is_head(hub):
            return Verdict.LEFT_OUT
        if options.fill_from_base or comes_with_base(hub, self._config):
            return Verdict.FILLED
        if options.allows(piece.name):
            return Verdict.LEFT_OUT
        return Verdict.MISSING

    def _extra(
        self, hub: str, piece: Piece, others: Mapping[str, Piece], used: set[str]
    ) -> Verdict:
        """A tensor of the source that the base does not have; its twin may be among `others`."""
        if self._owners[piece.name] in used or is_constant(hub, self._config):
            return Verdict.DROPPED
        if self._options.allows(piece.name):
            return Verdict.DROPPED
        twin = ties.twin_of(hub, others)
        if twin is not None and others[twin].shape == piece.shape:
            return Verdict.TWIN
        return Verdict.UNEXPECTED


def _shapes(hub: str, have: Shape, want: Shape, names: Mapping[str, Piece]) -> Verdict:
    if have == want:
        return Verdict.MATCHED
    if have[1:] == want[1:] and ties.is_vocabulary(hub, names):
        return Verdict.RESIZED
    return Verdict.MISMATCHED


def _demand_one_vocabulary(
    verdicts: defaultdict[Verdict, list[str]], have: Mapping[str, Piece]
) -> None:
    """Head and embedding must have as many rows as each other, or neither is a resized one."""
    resized = verdicts[Verdict.RESIZED]
    if not resized:
        return
    # A head counts here beside any embedding: a guessed layout may have renamed one of them.
    vocabulary = [hub for hub in have if ties.is_head(hub) or ties.is_vocabulary(hub, have)]
    if len({have[hub].shape[:1] for hub in vocabulary}) > 1:
        verdicts[Verdict.MISMATCHED].extend(resized)
        verdicts[Verdict.RESIZED] = []
