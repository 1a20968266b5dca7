"""The error of a source that does not fit: both lists, the nearest names, the shapes."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Sequence

from reshard.errors import Lines, NamesError, shown
from reshard.naming import value_heads
from reshard.naming.judge import Verdict
from reshard.naming.search import Candidate

# Names shown of each list; the error's fields hold all of them.
_SHOWN = 10
# Patterns that a hint spells out.
_PATTERNS = 4
# Names that difflib may compare with one name: about 10 us each.
_POOL = 200


def refuse(candidate: Candidate) -> NamesError:
    """The error for the best candidate. Names are the base's and the checkpoint's own."""
    source, base = candidate.source.pieces, candidate.base.pieces
    missing = _names(base[hub].name for hub in candidate.of(Verdict.MISSING))
    unexpected = _names(
        [*candidate.source.misfits, *(source[hub].name for hub in candidate.of(Verdict.UNEXPECTED))]
    )
    clashes = [
        f"{shown(source[hub].name)}: {source[hub].shape} in the checkpoint, "
        f"{base[hub].shape} in the base"
        for hub in candidate.of(Verdict.MISMATCHED)
    ]
    matched = len(candidate.of(Verdict.MATCHED))
    paragraphs = [f"{matched} of the base's {len(base)} tensors match ({candidate.title})."]
    if missing:
        near = Nearest(unexpected)
        rows = [_row(name, near.to(name)) for name in missing[:_SHOWN]]
        paragraphs.append(_list(f"{len(missing)} of the base are not in the checkpoint", rows,
                                len(missing)))  # fmt: skip
    if unexpected:
        near = Nearest(missing)
        rows = [_row(name, near.to(name)) for name in unexpected[:_SHOWN]]
        paragraphs.append(_list(f"{len(unexpected)} of the checkpoint are not in the base", rows,
                                len(unexpected)))  # fmt: skip
    if clashes:
        paragraphs.append(_list(f"{len(clashes)} have another shape", clashes[:_SHOWN],
                                len(clashes)))  # fmt: skip
    return NamesError(
        Lines("the checkpoint's tensors are not the base's: " + "\n".join(paragraphs) + "\n"),
        missing=missing,
        unexpected=unexpected,
        hint=_hint(candidate, missing, unexpected, clashes),
    )


def _hint(
    candidate: Candidate, missing: Sequence[str], unexpected: Sequence[str], clashes: Sequence[str]
) -> str:
    """The options that would help, where the base is the right one."""
    if missing and not unexpected and not clashes:
        return (
            "Were they frozen and left out when it was saved, take them from the base: "
            "--fill-from-base."
        )
    wrong = "Is it the model that the training started from? Name the model's part with --prefix."
    matched = len(candidate.of(Verdict.MATCHED))
    if clashes or not unexpected or matched < len(missing) + len(unexpected):
        return wrong
    leave = f"to leave out what the base has no place for, pass {_allowing(candidate, unexpected)}"
    if missing:
        fill = "to take from it what the checkpoint lacks, --fill-from-base"
        return f"{wrong} If it is, {leave}; {fill}."
    return f"{leave[0].upper()}{leave[1:]}.{_value_head(candidate)}"


def _allowing(candidate: Candidate, unexpected: Sequence[str]) -> str:
    """The option that leaves the names out: patterns as short as leave in all that fit."""
    left_out = set(unexpected)
    fitting = {p.name for p in candidate.source.pieces.values() if p.name not in left_out}
    kept = {head for name in fitting for head in _heads(name)}
    found = dict.fromkeys(
        next((f"{head}.*" for head in _heads(name) if head not in kept), name)
        for name in unexpected
    )
    if len(found) > _PATTERNS:
        return "--allow PATTERN ..., where * is any characters"
    return " ".join(("--allow", *(f"'{pattern}'" for pattern in found)))


def _heads(name: str) -> Sequence[str]:
    """What stands before each dot of a name, the shortest first."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _value_head(candidate: Candidate) -> str:
    """The option that makes a critic's head of a leftover row, in words."""
    pieces = candidate.source.pieces
    left = [(pieces[hub].name, pieces[hub].shape) for hub in candidate.of(Verdict.UNEXPECTED)]
    names = value_heads.candidates(left)
    return f" Is it a critic's head, pass --value-head {names[0]}." if len(names) == 1 else ""


def _names(names: Iterable[str]) -> tuple[str, ...]:
    """Each name once, in order: a stacked tensor is many hub tensors."""
    return tuple(dict.fromkeys(names))


def _row(name: str, nearest: str | None) -> str:
    return shown(name) if nearest is None else f"{shown(name)} (nearest: {shown(nearest)})"


def _list(title: str, rows: Sequence[str], total: int) -> str:
    more = [f"... and {total - len(rows)} more"] if total > len(rows) else []
    return "\n  ".join([f"{title}:", *rows, *more])


class Nearest:
    """The most similar of many names: those with the same last parts first, then by letters."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._by_tail: defaultdict[str, list[str]] = defaultdict(list)
        for name in names:
            parts = name.split(".")
            for depth in range(1, len(parts) + 1):
                self._by_tail[".".join(parts[-depth:])].append(name)

    def to(self, name: str) -> str | None:
        """The nearest name, or None where nothing is alike."""
        parts = name.split(".")
        for depth in range(len(parts), 0, -1):
            pool = self._by_tail.get(".".join(parts[-depth:]))
            if pool:
                break
        else:
            pool = list(self._names)
        close = difflib.get_close_matches(name, pool[:_POOL], n=1, cutoff=0.5)
        return close[0] if close else None
