"""The search for the map: prefixes and layouts, until the source's tensors are the base's.

A candidate is a prefix to strip and a layout to read the rest through. It is complete where every
hub tensor of the base has one of the source with the same shape, and the other way round, but for
the exceptions that are declared: resized vocabularies, tied heads, constants, and what the user
allowed. Exactly one complete candidate must remain.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain

from msgspec import Struct
from msgspec.structs import replace

from reshard.core.regex import regex
from reshard.core.tensors import Entry, Shape
from reshard.errors import NamesError
from reshard.naming import families
from reshard.naming.beginnings import heads
from reshard.naming.judge import FAULTS, FitOptions, Verdict, pattern_of
from reshard.naming.readings import common_start
from reshard.naming.scanning import any_contains
from reshard.naming.schema import Schema
from reshard.naming.ways import Candidate, Ways
from reshard.naming.wider import likely_prefixes, part_views

# Names of the base's first layers that are looked for in the source, after any prefix.
_FIRST = 512
# Prefixes with which an error message may compare the base.
_MOST = 32


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
    wrapped = any_contains(
        (name for own, entry in entries.items() for name in (own, *entry.aliases)),
        families.WRAPPERS,
    )
    aliased = any(entry.aliases for entry in entries.values())
    if entries and prefix is None and not wrapped and not aliased:
        own_shapes = {name: entry.spec.shape for name, entry in entries.items()}
        return SourceNames(dict(zip(entries, entries, strict=True)), own_shapes)
    owners: dict[str, str] = {}
    shapes: dict[str, Shape] = {}
    for own, entry in entries.items():
        for name in (own, *entry.aliases):
            clean = unwrap(name) if wrapped else name
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


def unwrapped(names: Iterable[str]) -> list[str]:
    """Each of the names without the parts that wrappers insert."""
    listed = [*names]
    return [*map(unwrap, listed)] if any_contains(listed, families.WRAPPERS) else listed


def search(source: SourceNames, schema: Schema, options: FitOptions) -> Candidate:
    """The one complete candidate; where there is none, the best of the incomplete.

    Prefixes and layouts that trainers use are tried first; where none is complete, prefixes that
    only the names suggest, and parts of the base that may have been trained by themselves.

    Raises `NamesError` where several are complete and differ in what goes where, or where the
    checkpoint holds several models that fit.
    """
    ways = Ways(source.shapes, source.owners, schema, options)
    usual = list(prefixes(source.shapes, options.prefix))
    near = [ways.after(prefix) for prefix in usual]
    complete = ways.complete(near)
    if complete:
        return _unique(complete, options)
    parts = part_views(schema.config, ways.hub_templates)
    first = ways.first(_FIRST)
    likely = likely_prefixes(source.shapes, first, schema.config, guess=ways.guesses)
    more = [] if options.prefix else [prefix for prefix in likely if prefix not in usual]
    far = [*((prefix, parts) for prefix in (*usual, *more)), *map(ways.after, more)]
    complete = ways.complete(far)
    if complete:
        return _unique(complete, options)
    told = [*near[:_MOST], *(one for one in far if one[0] in {*usual[:_MOST], *more})]
    return _nearest(ways.likely(told), source)


def _nearest(candidates: Iterator[Candidate], source: SourceNames) -> Candidate:
    """The first of those with the most tensors in common; only it, and what fits, is kept.

    Raises `NamesError` where the only fault is that other tensors lie beside several that fit.
    """
    best = next(candidates)
    fitting = []
    for candidate in chain([best], candidates):
        if _fits_beside(candidate):
            fitting.append(candidate)
        if _rank(candidate) > _rank(best):
            best = candidate
    _refuse_several(fitting, source)
    return best


def _rank(candidate: Candidate) -> tuple[int, int]:
    return len(candidate.of(Verdict.MATCHED)), -candidate.faults


def _fits_beside(candidate: Candidate) -> bool:
    """Whether the only fault is that other tensors lie beside those that fit."""
    beside = all(not name.startswith(candidate.prefix) for name in candidate.source.misfits)
    fits = candidate.of(Verdict.MATCHED) and not any(candidate.of(fault) for fault in FAULTS)
    return bool(fits) and beside


def _refuse_several(fitting: Iterable[Candidate], source: SourceNames) -> None:
    """Raise `NamesError` where several models of the checkpoint fit."""
    holders = {one.prefix: one for one in _apart(fitting)}
    if len(holders) < 2:
        return
    listed = " and ".join(f"{prefix.removesuffix('.')!r}" for prefix in holders)
    rest = [name for name in source.shapes if not name.startswith(tuple(holders))]
    raise NamesError(
        f"the checkpoint holds {len(holders)} models that fit the base, under {listed}.",
        unexpected=tuple(rest),
        hint=_choosing(holders),
    )


def _choosing(prefixes: Iterable[str]) -> str:
    options = " or ".join(f"--prefix {prefix.removesuffix('.')}" for prefix in prefixes)
    return f"Name the one to read: {options}."


def prefixes(names: Iterable[str], given: str | None) -> Iterator[str]:
    """The prefixes worth a try: what all names share, part by part, and the trainers' known ones.

    A known prefix needs half of the names behind it: fewer could not make a fit, only a bad guess
    in an error message.
    """
    if given is not None:
        yield given
        return
    listed = tuple(names)
    shared = shared_prefixes(listed)
    yield from shared
    known = tuple(prefix for prefix in families.PREFIXES if prefix not in shared)
    likely = [name for name in listed if name.startswith(known)]
    for prefix in known if 2 * len(likely) > len(listed) else ():
        if 2 * sum(name.startswith(prefix) for name in likely) > len(listed):
            yield prefix


def shared_prefixes(names: Iterable[str]) -> list[str]:
    """The dotted beginnings that all names have, from none to the longest.

    >>> shared_prefixes(["app.model.norm.weight", "app.model.lm_head.weight"])
    ['', 'app.', 'app.model.']
    """
    listed = tuple(names)
    common = common_start(listed) if listed else ""
    return ["", *(f"{head}." for head in heads(common))]


def _apart(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The candidates that differ in what goes where: the first of each kind, with the views of
    all."""
    found: list[tuple[object, Candidate]] = []
    for candidate in candidates:
        assignment = candidate.assignment()
        alike = next((at for at, (other, _) in enumerate(found) if other == assignment), None)
        if alike is None:
            found.append((assignment, candidate))
        else:
            first = found[alike][1]
            found[alike] = assignment, replace(first, views=(*first.views, *candidate.views))
    return [candidate for _, candidate in found]


def _unique(complete: list[Candidate], options: FitOptions) -> Candidate:
    """The one way to read the source, or an error that names the ways."""
    if options.allow:  # what --allow names is dropped only where no way keeps it
        least = min(candidate.given_up for candidate in complete)
        complete = [candidate for candidate in complete if candidate.given_up == least]
    every = different = _apart(complete)
    version = options.transformers_version
    if len(different) > 1 and version is not None:
        loaded = [c for c in different if any(view.loads_as(version) for view in c.views)]
        different = loaded or different  # none has that version: all are named
    if len(different) == 1:
        return different[0]
    ways = "; ".join(candidate.title for candidate in different)
    holders = dict.fromkeys(candidate.prefix for candidate in different)
    # Models, of which --allow leaves one: what is outside of each is allowed.
    beside = all(candidate.source.allowed for candidate in different if candidate.prefix)
    if len(holders) > 1 and beside:
        raise NamesError(
            f"the checkpoint holds {len(holders)} models that fit the base: {ways}.",
            hint=_choosing_allowed(holders),
        )
    told = (
        f"the checkpoint fits the base in {len(different)} ways that put tensors in different "
        f"places or orientations: {ways}."
    )
    if not _is_told_by_version(every):
        raise NamesError(f"{told} No option says which of them is right.")
    raise NamesError(
        told,
        hint="Name the transformers version it was trained with: --transformers-version."
        if version is None
        else "Name the version of another one of these ways, if it was trained with that.",
    )


def _choosing_allowed(prefixes: Collection[str]) -> str:
    """The options that choose one of the models that `--allow` leaves, each without the others."""
    named = [prefix for prefix in prefixes if prefix]
    chosen = _choosing(named)
    if "" not in prefixes:
        return chosen
    patterns = " ".join(f"'{pattern_of(prefix)}*'" for prefix in named)
    return f"{chosen} For the one without a prefix, pass only --allow {patterns}."


def _is_told_by_version(candidates: Iterable[Candidate]) -> bool:
    """Whether there is a version of transformers in which only one of them is loaded."""
    views = [candidate.views for candidate in candidates]
    starts = {layout.since for same in views for view in same for layout in view.layouts}
    loaded = (
        [any(view.loads_as(start) for view in same) for same in views]
        for start in starts
        if start is not None
    )
    return any(sum(each) == 1 for each in loaded)
