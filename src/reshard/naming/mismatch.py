"""The error for a source that does not fit: what differs, or both lists and the nearest names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from reshard.core.tensors import Shape
from reshard.errors import Lines, NamesError, listed, shown
from reshard.naming import patterns, ties, value_heads, wrong_base
from reshard.naming.beginnings import Beginnings, heads
from reshard.naming.judge import Verdict, pattern_of
from reshard.naming.ways import Candidate

_BASE = "Check that the base is the model that was trained."
_CHECK = (
    f"{_BASE} If the checkpoint holds several models, choose one with --prefix (for example "
    "actor.model)."
)
_OTHERWISE = (
    "In some modules of the base the checkpoint holds other tensors, as in an unknown layout: it "
    "would be wrong to leave these out, and wrong to take the base's."
)
_FROZEN = (
    "If they were frozen and left out when it was saved, take them from the base: --fill-from-base."
)
_WITHOUT_LAYERS = (
    f"{_FROZEN} If the model that was trained has fewer layers, pass its own base as --base."
)
_BIASES = (
    "What it has no place for includes biases of its modules: a model without them is another one."
)
# Experts of all layers that are taken in any case: the largest models have half as many.
_MAX_EXPERTS = 1 << 17
# Names shown of each list; the error's fields hold all of them.
_SHOWN = 10
# Patterns that a hint spells out.
_PATTERNS = 4
# Names that difflib may compare with one name: about 10 us each.
_POOL = 200

#: The advice on a model that lacks tensors.
WHOLE_MODEL = (
    "Is it the whole model? What it lacks is taken from another by --base MODEL --fill-from-base."
)


def refuse(candidate: Candidate, chosen: bool = False) -> NamesError:
    """The error for the best candidate. Names are the base's and the checkpoint's own; where the
    user has `chosen` a prefix, it suggests none.

    Where the two are models of different sizes it says so, in a table of what differs; else it
    lists the names, the nearest beside each.
    """
    source, base = candidate.source.pieces, candidate.base.pieces
    missing = _names(
        [*candidate.base.misfits, *(base[hub].name for hub in candidate.of(Verdict.MISSING))]
    )
    unexpected = _names(
        [*candidate.source.misfits, *(source[hub].name for hub in candidate.of(Verdict.UNEXPECTED))]
    )
    clashes = [
        f"{shown(source[hub].name)}: {source[hub].shape} in the checkpoint, "
        f"{base[hub].shape} in the base"
        for hub in candidate.of(Verdict.MISMATCHED)
    ]
    resized = _resized_alone(candidate)
    if resized is not None and not clashes:
        return resized
    matched = len(candidate.of(Verdict.MATCHED))
    counted = f"{matched} of {len(base)} tensors have the same name and shape"
    apart = wrong_base.differing(source, base)
    check = _BASE if chosen else _CHECK
    layers = _layers(apart)
    if (clashes or unexpected) and {t.name for t in apart.traits} & {"layers", "hidden size"}:
        body = _diagnosis(f"{counted}.{layers}", apart.traits, (missing, unexpected, clashes))
        hint = f"{check} All names: reshard inspect SRC --base BASE --json."
    else:
        first = f"{counted}{candidate.read_as}.{layers}"
        body = _lists(first, missing, unexpected, clashes)
        if unexpected or clashes or not apart.lacking:
            hint = _hint(candidate, missing, unexpected, clashes, check)
        else:
            hint = _WITHOUT_LAYERS
    return NamesError(
        Lines(f"the checkpoint does not fit the base model: {body}\n"),
        missing=missing,
        unexpected=unexpected,
        hint=hint,
    )


def no_place(unknown: Sequence[str], model: str) -> NamesError:
    """The error for tensors that a trainer's `model` has no names for."""
    return NamesError(
        f"{len(unknown)} of its tensors have no place in {model}: {listed(unknown, 5)}.",
        unexpected=tuple(unknown),
        hint="Pass --base, the model as it was released, whose names they then get.",
    )


def _resized_alone(candidate: Candidate) -> NamesError | None:
    """The error of a head of another vocabulary, all that is left over, whose embedding is only in
    the base: with the rows that it had before."""
    source, base = candidate.source.pieces, candidate.base.pieces
    over = candidate.of(Verdict.UNEXPECTED)
    if len(over) != 1 or candidate.source.misfits:
        return None
    embedding = ties.embedding_of(over[0], base)
    if embedding is None or embedding in source:
        return None
    head, other = source[over[0]], base[embedding]
    if head.shape[1:] != other.shape[1:] or head.shape == other.shape:
        return None
    return NamesError(
        f"{shown(head.name)!r} has {head.shape[0]} rows, and {shown(other.name)!r}, which the base "
        f"ties it to, has {other.shape[0]}; the checkpoint lacks the latter, which must have as "
        f"many.",
        missing=(other.name,),
        unexpected=(head.name,),
        hint="Convert a checkpoint of the run that holds it.",
    )


def _layers(apart: wrong_base.Differences) -> str:
    """Which whole layers are on one side alone."""
    told = [f" The checkpoint lacks {listed(apart.lacking)}."] if apart.lacking else []
    if apart.beyond:
        told.append(f" The base lacks {listed(apart.beyond)}.")
    return "".join(told)


def _diagnosis(
    counted: str, traits: tuple[wrong_base.Trait, ...], lists: tuple[Sequence[str], ...]
) -> str:
    """What differs, in a table, and how many tensors that concerns."""
    missing, unexpected, clashes = lists
    parts = [
        f"{len(missing)} are only in the base" if missing else "",
        f"{len(unexpected)} are only in the checkpoint" if unexpected else "",
        f"{len(clashes)} have another shape ({clashes[0]})" if clashes else "",
    ]
    return (
        f"{counted}\n{wrong_base.table(traits)}\n"
        f"Of the tensors, {', '.join(part for part in parts if part)}."
    )


def _lists(
    first: str, missing: Sequence[str], unexpected: Sequence[str], clashes: Sequence[str]
) -> str:
    """Everything that does not fit, each name with the nearest one beside it."""
    paragraphs = [first]
    for title, names, others in (
        ("of the base are not in the checkpoint", missing, unexpected),
        ("of the checkpoint are not in the base", unexpected, missing),
    ):
        if names:
            some = names[:_SHOWN]
            rows = [*map(_row, some, nearest(some, others))]
            paragraphs.append(_list(f"{len(names)} {title}", rows, len(names)))
    if clashes:
        title = f"{len(clashes)} have another shape"
        paragraphs.append(_list(title, clashes[:_SHOWN], len(clashes)))
    return "\n".join(paragraphs)


def _hint(
    candidate: Candidate,
    missing: Sequence[str],
    unexpected: Sequence[str],
    clashes: Sequence[str],
    check: str,
) -> str:
    """The options that would help, where the base is the right one."""
    if missing and not unexpected and not clashes:
        return _FROZEN
    matched = len(candidate.of(Verdict.MATCHED))
    if _holds_otherwise(candidate):
        return f"{check} {_OTHERWISE}"
    if clashes or not unexpected or matched < len(missing) + len(unexpected):
        return check
    if _replaced(candidate):
        return f"{check} {_OTHERWISE}"
    if _holds_biases(candidate):
        return f"{check} {_BIASES}"
    leave = f"to leave out what the base has no place for, pass {_allowing(candidate, unexpected)}"
    if missing:
        fill = "to take from it what the checkpoint lacks, --fill-from-base"
        return f"{check} If it is, {leave}; {fill}."
    return f"{leave[0].upper()}{leave[1:]}.{_value_head(candidate)}"


def _holds_otherwise(candidate: Candidate) -> bool:
    """Whether a module of the base has other tensors in the checkpoint: to leave these out and to
    fill it from the base would put untrained weights beside trained ones."""
    modules = Beginnings([*candidate.of(Verdict.MISSING), *candidate.of(Verdict.FILLED)])
    return any(hub.rpartition(".")[0] in modules for hub in candidate.of(Verdict.UNEXPECTED))


def _replaced(candidate: Candidate) -> bool:
    """Whether a module of which nothing fits holds one thing in the checkpoint and another in the
    base, as a dense layer's in place of experts."""
    lacking = Beginnings([*candidate.of(Verdict.MISSING), *candidate.of(Verdict.FILLED)])
    kept = Beginnings([*candidate.of(Verdict.MATCHED), *candidate.of(Verdict.RESIZED)])
    apart = (
        next((head for head in heads(hub) if head not in kept), None)
        for hub in candidate.of(Verdict.UNEXPECTED)
    )
    return any(head is not None and head in lacking for head in apart)


def _holds_biases(candidate: Candidate) -> bool:
    """Whether a module fits the base's, but has a bias that the base's lacks. The model would
    change if it were left out."""
    unexpected = candidate.of(Verdict.UNEXPECTED)
    biased = {hub.rpartition(".")[0] for hub in unexpected if hub.endswith(".bias")}
    kept = (*candidate.of(Verdict.MATCHED), *candidate.of(Verdict.RESIZED))
    return bool(biased) and any(hub.rpartition(".")[0] in biased for hub in kept)


def _allowing(candidate: Candidate, unexpected: Sequence[str]) -> str:
    """The option that leaves the names out: the shortest patterns that match no name that fits."""
    left_out = set(unexpected)
    fitting = {p.name for p in candidate.source.pieces.values() if p.name not in left_out}
    kept = Beginnings(fitting)
    found: dict[str, None] = {}
    apart: tuple[str, ...] = ()
    for name in unexpected:
        if name.startswith(apart):
            continue
        head = next((head for head in heads(name) if head not in kept), None)
        found[pattern_of(name) if head is None else f"{pattern_of(head)}.*"] = None
        apart += () if head is None else (f"{head}.",)
        if len(found) > _PATTERNS:
            break
    most = len(found) > _PATTERNS
    if most or any(fnmatchcase(name, pattern) for pattern in found for name in fitting):
        return "--allow PATTERN ..., where * is any characters"
    return " ".join(("--allow", *(f"'{pattern}'" for pattern in found)))


def _value_head(candidate: Candidate) -> str:
    """The option that makes a critic's head of a leftover row, in words."""
    pieces = candidate.source.pieces
    left = [(pieces[hub].name, pieces[hub].shape) for hub in candidate.of(Verdict.UNEXPECTED)]
    names = value_heads.candidates(left)
    return f" If it is a critic's head, pass --value-head {names[0]}." if len(names) == 1 else ""


def _names(names: Iterable[str]) -> tuple[str, ...]:
    """Each name once, in order: a stacked tensor is many hub tensors."""
    return tuple(dict.fromkeys(names))


def _row(name: str, nearest: str | None) -> str:
    return shown(name) if nearest is None else f"{shown(name)} (nearest: {shown(nearest)})"


def _list(title: str, rows: Sequence[str], total: int) -> str:
    more = [f"... and {total - len(rows)} more"] if total > len(rows) else []
    return "\n  ".join([f"{title}:", *rows, *more])


def nearest(names: Sequence[str], others: Sequence[str]) -> list[str | None]:
    """The most similar of the others for each of a few names: of those with the most last parts in
    common, the one with the most alike letters; None where nothing is alike.

    It looks once at each of the others, however many end alike.
    """
    sought = {end for name in names for end in _ends(name)}
    alike: dict[str, list[str]] = {}
    for other in others:
        for end in _ends(other):
            if end not in sought:
                break
            found = alike.setdefault(end, [])
            if len(found) < _POOL:
                found.append(other)
    pools = (_longest(alike, name, others[:_POOL]) for name in names)
    close = (difflib.get_close_matches(*both, 1, 0.5) for both in zip(names, pools, strict=True))
    return [next(iter(each), None) for each in close]


def _longest(alike: Mapping[str, list[str]], name: str, rest: Sequence[str]) -> Sequence[str]:
    """Those that end as much as the name does; the rest where none ends as it does."""
    return next((alike[end] for end in reversed([*_ends(name)]) if end in alike), rest)


def _ends(name: str) -> Iterator[str]:
    """The ends of a name after each dot, the shortest first, and then the name.

    >>> list(_ends("a.b.c"))
    ['c', 'b.c', 'a.b.c']
    """
    place = name.rfind(".")
    while place >= 0:
        yield name[place + 1 :]
        place = name.rfind(".", 0, place)
    yield name


def check_stacked(shapes: Mapping[str, Shape], stacks: Sequence[str], count: int) -> None:
    """Refuse tensors of the patterns `stacks`, [experts, rows, columns], that stack more experts
    than any model has: a tensor without elements may state any number.

    `count` are the base's tensors; it may have all experts of a layer in one. Raises `NamesError`.
    """
    stacked = {
        name: shape[0]
        for name, shape in shapes.items()
        if len(shape) == 3 and patterns.matches_any(stacks, name)
    }
    experts = sum(stacked.values())
    if experts > max(_MAX_EXPERTS, count):
        raise NamesError(
            f"its {experts} experts are more than the base has tensors, {count}.",
            tensor=max(stacked, key=stacked.__getitem__),
            hint="Check that --base is the model that the training started from.",
        )
