"""The search for the map: prefixes and layouts, until the source's tensors are the base's.

A candidate is a prefix to strip and a layout to read the rest through. It is complete where every
hub tensor of the base has one of the source with the same shape, and the other way round, but for
the exceptions that are declared: resized vocabularies, tied heads, constants, and what the user
allowed. Exactly one complete candidate must remain.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from reshard.core.regex import regex
from reshard.core.tensors import Entry, Shape
from reshard.errors import NamesError
from reshard.naming import families
from reshard.naming.judge import FAULTS, FitOptions, Judge, Verdict
from reshard.naming.layouts import Effect, Names, Piece, Reading, View
from reshard.naming.schema import Schema, views_of
from reshard.naming.wider import likely_prefixes, part_views

# Names times readings on each of which a verdict is given, in search of the nearest: a second.
# Beyond, only the likeliest readings get one.
_MAX_VERDICTS, _FEW = 500_000, 4
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
        # A head alone, of a base that ties it, is the base's embedding under another name.
        fitting = (*self.of(Verdict.MATCHED), *self.of(Verdict.COPIED))
        return self.faults == 0 and bool(fitting)

    @property
    def given_up(self) -> int:
        """How many tensors of the source and of the base are not in the output."""
        left_out, dropped = self.of(Verdict.LEFT_OUT), self.of(Verdict.DROPPED)
        return len(left_out) + len(dropped) + len(self.source.allowed)

    @property
    def title(self) -> str:
        return f"prefix {self.prefix!r}, names {self.views[0].title}"

    @property
    def read_as(self) -> str:
        """How the checkpoint's names were read, in brackets; empty where they were left alone."""
        parts = [f"without the prefix {self.prefix!r}"] if self.prefix else []
        if self.views[0].title != families.AS_RELEASED:
            parts.append(f"names {self.views[0].title}")
        return f" ({', '.join(parts)})" if parts else ""

    def assignment(self) -> dict[str, Piece]:
        """Hub name -> where the source holds it: two candidates with the same are one."""
        return {hub: piece for hub, piece in self.source.pieces.items() if hub in self.base.pieces}


class SourceNames(Struct, frozen=True):
    """The checkpoint's tensors by every name they have, wrappers' parts left out.

    `owners`: cleaned name -> the entry's own name. `shapes`: cleaned name -> shape.
    """

    owners: Mapping[str, str]
    shapes: Mapping[str, Shape]


def sources(entries: Mapping[str, Entry], prefix: str | None) -> SourceNames:
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
                raise clash(owners[clean], own, clean)
            shapes[clean] = entry.spec.shape
    if not shapes:
        raise NamesError(
            f"none of the checkpoint's {len(entries)} tensors has the prefix {prefix!r}."
            if prefix
            else "the checkpoint holds no tensor.",
            unexpected=tuple(entries),
        )
    return SourceNames(owners, shapes)


def clash(one: str, other: str, name: str) -> NamesError:
    """The error for two different tensors whose names are equal without wrappers' parts."""
    return NamesError(
        f"{one!r} and {other!r} are both {name!r} without wrappers' parts, but they differ.",
        hint="Load the checkpoint, remove the wrong one of the two, and save it again.",
    )


def unwrap(name: str) -> str:
    """The name without the parts that wrappers insert.

    >>> unwrap("module._orig_mod.model.norm._fsdp_wrapped_module.weight")
    'model.norm.weight'
    """
    if _WRAPPED.search(name) is None:  # of a million calls for 40,000 names, nearly all
        return name
    return ".".join(part for part in name.split(".") if part not in families.WRAPPERS)


_WRAPPED = regex("|".join(map(re.escape, sorted(families.WRAPPERS))))


def search(source: SourceNames, schema: Schema, options: FitOptions) -> Candidate:
    """The one complete candidate; where there is none, the best of the incomplete.

    Prefixes and layouts that trainers use are tried first; where none is complete, prefixes that
    only the names suggest, and parts of the base that may have been trained by themselves.

    Raises `NamesError` where several are complete and differ in what goes where, or where the
    checkpoint holds several models that fit.
    """
    trial = _Trial(source, schema, options)
    near = trial.readings(trial.prefixes, trial.usual)
    complete = trial.complete(near)
    if complete:
        return _unique(complete, options)
    far = trial.wider()
    complete = trial.complete(far)
    if complete:
        return _unique(complete, options)
    candidates = trial.likely([*near, *far])
    _refuse_several(candidates, source)
    return max(candidates, key=lambda one: (len(one.of(Verdict.MATCHED)), -one.faults))


# One way to read the source: the prefix, the views that read so, what it gives.
_Way = tuple[str, Views, Reading]


class _Trial:
    """Readings of the source, compared with the base."""

    def __init__(self, source: SourceNames, schema: Schema, options: FitOptions) -> None:
        self._found = source
        self._options = options
        self._config = schema.config
        self.prefixes = list(prefixes(source.shapes, options.prefix))
        self._judge = Judge(source.owners, schema, options)
        shapes = {name: spec.shape for name, spec in schema.specs.items()}
        # The base is taken to be as on the hub where that fits: released models are.
        self._bases = _distinct(Names(shapes), views_of(shapes, "", schema.config))
        self._read: list[tuple[Views, Reading]] = []
        self._names: dict[str, Names] = {}

    def usual(self, prefix: str) -> tuple[View, ...]:
        """The layouts that the whole model may be in after a prefix."""
        return views_of(self._found.shapes, prefix, self._config)

    def readings(
        self, tried: Iterable[str], layouts: Callable[[str], Iterable[View]]
    ) -> list[_Way]:
        return [
            (prefix, same, _without_allowed(source, prefix, self._options))
            for prefix in tried
            for same, source in _distinct(self._after(prefix), layouts(prefix))
        ]

    def _after(self, prefix: str) -> Names:
        """The names after a prefix, for whichever layouts are tried."""
        if prefix not in self._names:
            self._names[prefix] = Names(self._found.shapes, prefix)
        return self._names[prefix]

    def wider(self) -> list[_Way]:
        """The readings that are tried where the usual ones do not fit."""
        hubs = {hub for _, base in self._read for hub in base.pieces}
        parts = part_views(self._config, hubs)
        more = (
            [] if self._options.prefix else likely_prefixes(self._found.shapes, hubs, self._config)
        )
        more = [prefix for prefix in more if prefix not in self.prefixes]
        return self.readings([*self.prefixes, *more], lambda _: parts) + self.readings(
            more, self.usual
        )

    def complete(self, ways: Sequence[_Way]) -> list[Candidate]:
        """The complete candidates of the first layout of the base that has any."""
        for base in self._each_base():
            fitting = [way for way in ways if self._judge.may_fit(way[2], base[1], way[0])]
            complete = [one for one in self._held(fitting, base) if one.complete]
            if complete:
                return complete
        return []

    def likely(self, ways: Sequence[_Way]) -> list[Candidate]:
        """Every way beside every layout of the base; of very many names, those with the most in
        common and the least beside: a verdict on each name takes 2 us, and there may be 175."""
        pairs = [(way, base) for base in self._each_base() for way in ways]
        if len(pairs) * len(self._found.shapes) > _MAX_VERDICTS:
            pairs = sorted(pairs, key=_likeness, reverse=True)[:_FEW]
        return [one for way, base in pairs for one in self._held([way], base)]

    def _each_base(self) -> Iterator[tuple[Views, Reading]]:
        """The base's layouts, each read once and when it is needed."""
        yield from self._read
        for base in self._bases:
            self._read.append(base)
            yield base

    def _held(self, ways: Iterable[_Way], base: tuple[Views, Reading]) -> list[Candidate]:
        (view, *_), read = base
        return [
            Candidate(prefix, same, view, source, read, self._judge.verdicts(source, read, prefix))
            for prefix, same, source in ways
        ]


def _likeness(pair: tuple[_Way, tuple[Views, Reading]]) -> tuple[int, int]:
    """How many names a reading of the source has in common with one of the base, and how few each
    has alone."""
    (_, _, source), (_, base) = pair
    common = len(source.pieces.keys() & base.pieces.keys())
    return common, 2 * common - len(source.pieces) - len(base.pieces) - len(source.misfits)


def _refuse_several(candidates: Iterable[Candidate], source: SourceNames) -> None:
    """Raise `NamesError` where the only fault is that other tensors lie beside those that fit."""
    fitting = []
    for one in candidates:
        beside = all(not name.startswith(one.prefix) for name in one.source.misfits)
        fits = one.of(Verdict.MATCHED) and not any(one.of(fault) for fault in FAULTS)
        if fits and beside:
            fitting.append(one)
    holders = {one.prefix: one for one in _apart(fitting)}
    if len(holders) < 2:
        return
    listed = " and ".join(f"{prefix.removesuffix('.')!r}" for prefix in holders)
    rest = [name for name in source.shapes if not name.startswith(tuple(holders))]
    raise NamesError(
        f"the checkpoint holds {len(holders)} models that fit the base, under {listed}.",
        unexpected=tuple(rest),
        hint="Name the one to read: "
        + " or ".join(f"--prefix {prefix.removesuffix('.')}" for prefix in holders)
        + ".",
    )


def _distinct(names: Names, layouts: Iterable[View]) -> Iterator[tuple[Views, Reading]]:
    """The different readings of the names, each with the views that give it."""
    by_effects: dict[tuple[Effect, ...], list[View]] = {}
    for view in layouts:
        by_effects.setdefault(names.effects(view), []).append(view)
    for effects, same in by_effects.items():
        yield tuple(same), names.read(effects)


def _without_allowed(source: Reading, prefix: str, options: FitOptions) -> Reading:
    """The reading, in which omitted names outside the prefix are not faults."""
    if not options.allow or not source.misfits:
        return source
    outside = [name for name in source.misfits if not name.startswith(prefix)]
    allowed = tuple(name for name in outside if options.allows(name))
    misfits = tuple(name for name in source.misfits if name not in allowed)
    return replace(source, misfits=misfits, allowed=allowed)


def prefixes(names: Iterable[str], given: str | None) -> Iterator[str]:
    """The prefixes worth a try: what all names share, part by part, and the trainers' known ones.

    A known prefix needs half of the names behind it: fewer could not make a fit, only a bad guess
    in an error message.
    """
    if given is not None:
        yield given
        return
    listed = tuple(names)
    split = [name.split(".")[:-1] for name in listed]
    shared = shared_prefixes(listed)
    yield from shared
    for prefix in families.PREFIXES:
        known = prefix.split(".")[:-1]
        holders = sum(name[: len(known)] == known for name in split)
        if prefix not in shared and 2 * holders > len(split):
            yield prefix


def shared_prefixes(names: Iterable[str]) -> list[str]:
    """The dotted beginnings that all names have, from none to the longest.

    >>> shared_prefixes(["app.model.norm.weight", "app.model.lm_head.weight"])
    ['', 'app.', 'app.model.']
    """
    shared = [""]
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(f"{shared[-1]}{parts[0]}.")
    return shared


def _apart(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The candidates that differ in what goes where, the first of each kind."""
    found: list[tuple[object, Candidate]] = []
    for candidate in candidates:
        assignment = candidate.assignment()
        if all(assignment != other for other, _ in found):
            found.append((assignment, candidate))
    return [candidate for _, candidate in found]


def _unique(complete: list[Candidate], options: FitOptions) -> Candidate:
    """The one way to read the source, or an error that names the ways."""
    if options.allow:  # what --allow names is dropped only where no way keeps it
        least = min(candidate.given_up for candidate in complete)
        complete = [candidate for candidate in complete if candidate.given_up == least]
    different = _apart(complete)
    version = options.transformers_version
    if len(different) > 1 and version is not None:
        loaded = [c for c in different if any(view.loads_as(version) for view in c.views)]
        different = loaded or different  # none has that version: all are named
    if len(different) == 1:
        return different[0]
    ways = "; ".join(candidate.title for candidate in different)
    raise NamesError(
        f"the checkpoint fits the base in {len(different)} ways that put tensors in different "
        f"places or orientations: {ways}.",
        hint="Name the transformers version it was trained with: --transformers-version."
        if version is None
        else "Name the version of another one of these ways, if it was trained with that.",
    )
