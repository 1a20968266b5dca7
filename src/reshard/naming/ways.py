"""The ways to read a source, compared with the layouts of its base.

A way is a prefix and the views that read the same after it; there are up to 270. Each is asked
about a few tensors first: one that the base lacks, or has in another shape, refutes it, unless
something may excuse it, and only ways that none refutes are read in full. If no way fits, each is
judged for the error message, or, of many names, those few that a sample of the names favours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from reshard.core.tensors import Shape
from reshard.naming import families
from reshard.naming.beginnings import Beginnings
from reshard.naming.judge import FAULTS, FitOptions, Judge, Verdict
from reshard.naming.layouts import Piece, View
from reshard.naming.readings import (
    Below,
    Effects,
    Names,
    Reading,
    Templates,
    part_templates,
    template_of,
)
from reshard.naming.schema import Schema, views_of

# Names times pairs of readings on each of which a verdict is given, in search of the nearest: a
# second. Beyond, only the likeliest pairs get one.
_MAX_VERDICTS = 500_000
# Templates by which a way is refuted, and by which ways are told apart in search of the nearest; no
# model has as many as the latter.
_ASKED, _COMPARED = 256, 1024
# With more templates, the search tries the layouts of the base's kind and guesses no others.
_GUESSED = 4096
# Layouts that read the same names alike.
Views = tuple[View, ...]
# A prefix, and the layouts to try after it.
Asked = tuple[str, Views]
# Template of names on the hub -> how many tensors.
_Sizes = Mapping[str, int]


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
        misfits = len(self.source.misfits) + len(self.base.misfits)
        return misfits + sum(len(self.of(verdict)) for verdict in FAULTS)

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


class _Way(Struct, frozen=True):
    """A way to read the source: the names after a prefix, through views that read them alike.

    `effects` are those of the views on all names, None where a sample of them was compared. `sizes`
    are of the sample, where the way is one of many to choose from.
    """

    below: Below
    views: Views
    effects: Effects | None
    sizes: _Sizes = {}


class _Question(NamedTuple):
    """A view of the source that may fit, and what it makes of a sample of the names: the pieces of
    one tensor of each template. `whole`: of every template."""

    below: Below
    view: View
    pieces: Mapping[str, Piece]
    whole: bool


class _Base:
    """The base, read through views of equal effects.

    `more` are the sizes of what the views change, `stage` those of all names before that.
    """

    def __init__(self, below: Below, views: Views, effects: Effects, stage: _Sizes) -> None:
        self.view = views[0]
        self._below = below
        self._effects = effects
        self._stage = stage
        self._less = _sizes(below, effects.more, Effects(effects.whole, {}))
        self.more = _sizes(below, effects.more, effects)

    @cached_property
    def reading(self) -> Reading:
        return self._below.read(self._effects)

    def size(self, template: str) -> int:
        """How many tensors of a template on the hub it holds."""
        whole = self._stage.get(template, 0) - self._less.get(template, 0)
        return whole + self.more.get(template, 0)

    @cached_property
    def sample(self) -> Mapping[str, Piece]:
        """The pieces of one tensor of each of some templates."""
        found: dict[str, Piece] = {}
        for template in self._below.sample(_ASKED):
            row = self._below.members[template][0]
            found |= self._below.pieces(row, self._effects.of(template))
        return found

    def first(self) -> Iterator[str]:
        """The hub names whose numbers are all 0."""
        for template, row in self._below.first:
            yield from self._below.pieces(row, self._effects.of(template))


def _sizes(below: Below, templates: Iterable[str], effects: Effects) -> _Sizes:
    """How many tensors of these templates a view reads as such, by template on the hub."""
    sizes: Counter[str] = Counter()
    for template in templates:
        rows, rest = below.members[template], below.rest(template)
        effect = effects.of(rest)
        if effect is None:
            sizes[rest] += len(rows)
            continue
        sizes[effect.hub] += len(rows)
        if effect.stacked is not None:
            experts = sum(row.shape[0] for row in rows if len(row.shape) == 3)
            sizes.update(dict.fromkeys(part_templates(effect), experts))
    return sizes


class Ways:
    """The ways to read a source beside the layouts of its base.

    `guesses`: layouts of other kinds than the base's are tried, too, where its kind has none.
    """

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        owners: Mapping[str, str],
        schema: Schema,
        options: FitOptions,
    ) -> None:
        self._modules = Beginnings(shapes)
        self._options = options
        self._config = schema.config
        self._judge = Judge(owners, schema, options)
        self._names = Names(shapes)
        self._below: dict[str, Below] = {}
        self._stages: dict[int, _Sizes] = {}
        stored = {name: spec.shape for name, spec in schema.specs.items()}
        self._count = max(len(shapes), len(stored))
        below = Below(Names(stored))
        self.guesses = max(len(self._names.members), len(below.members)) <= _GUESSED
        layouts = views_of(Beginnings(stored), "", schema.config, guess=self.guesses)
        # The hub's comes first: released models are as on the hub.
        self._bases = [
            _Base(below, same, effects, self._stage(below, effects))
            for same, effects in _distinct(below.templates, layouts)
        ]

    def _stage(self, below: Below, effects: Effects) -> _Sizes:
        """The sizes of what the first layout makes of the base."""
        whole = effects.whole
        if id(whole) not in self._stages:
            self._stages[id(whole)] = _sizes(below, below.members, Effects(whole, {}))
        return self._stages[id(whole)]

    def after(self, prefix: str) -> Asked:
        """A prefix, and the layouts that the whole model may be in after it."""
        return prefix, views_of(self._modules, prefix, self._config, guess=self.guesses)

    @cached_property
    def hub_templates(self) -> frozenset[str]:
        """The templates of all names that the base may have on the hub."""
        stages, more = self._stages.values(), (base.more for base in self._bases)
        return frozenset().union(*stages, *more)

    def first(self, count: int) -> list[str]:
        """So many names, at most, that the base may have on the hub: those whose numbers are all
        0."""
        names = (name for base in self._bases for name in islice(base.first(), count))
        return list(islice(dict.fromkeys(names), count))

    def complete(self, asked: Iterable[Asked]) -> list[Candidate]:
        """The complete candidates of the first layout of the base that has any."""
        questions = list(self._questions(asked))
        read: dict[tuple[str, Views], Reading] = {}
        for base in self._bases if questions else ():
            found = []
            for way in self._unrefuted(questions, base):
                prefix = way.below.prefix
                key = prefix, way.views
                if key not in read:
                    read[key] = self._reading(way)
                if self._judge.may_fit(read[key], base.reading, prefix):
                    found.append(self._candidate(way, read[key], base))
            complete = [candidate for candidate in found if candidate.complete]
            if complete:
                return complete
        return []

    def likely(self, asked: Iterable[Asked]) -> Iterator[Candidate]:
        """Every way beside every layout of the base; of very many names, those with the most in
        common: a verdict on each name takes 2 us, and there may be 1,800 pairs."""
        ways = [way for prefix, views in asked for way in _compared(self._after(prefix), views)]
        pairs = [(way, base) for base in self._bases for way in ways]
        for way, base in _likeliest(pairs) if len(pairs) * self._count > _MAX_VERDICTS else pairs:
            yield self._candidate(way, self._reading(way), base)

    def _after(self, prefix: str) -> Below:
        """The names after a prefix, for whichever layouts are tried."""
        if prefix not in self._below:
            self._below[prefix] = Below(self._names, prefix)
        return self._below[prefix]

    def _questions(self, asked: Iterable[Asked]) -> Iterator[_Question]:
        """The views in which every tensor of a sample has a place in some layout of the base."""
        hubs = self.hub_templates
        for prefix, views in asked:
            below = self._after(prefix)
            if not all(map(self._options.allows, below.outside)):
                continue
            rows = [(below.rest(t), below.members[t][0]) for t in below.sample(_ASKED)]
            for view in views:
                pieces: dict[str, Piece] = {}
                for rest, row in rows:
                    found = below.pieces(row, view.effect(rest))
                    pieces |= found
                    if self._has_no_place(found, hubs, prefix):
                        break
                else:
                    yield _Question(below, view, pieces, len(rows) == len(below.members))

    def _has_no_place(self, pieces: Mapping[str, Piece], hubs: Container[str], prefix: str) -> bool:
        """Whether one of these pieces is not among the templates, and nothing may excuse that."""
        return any(
            _template(hub) not in hubs and not self._judge.may_be_beside(hub, piece, prefix)
            for hub, piece in pieces.items()
        )

    def _unrefuted(self, questions: Iterable[_Question], base: _Base) -> Iterator[_Way]:
        """The ways in which every tensor of the sample fits this layout of the base."""
        left: dict[str, list[View]] = {}
        for question in questions:
            if not self._is_refuted(question, base):
                left.setdefault(question.below.prefix, []).append(question.view)
        for prefix, views in left.items():
            below = self._after(prefix)
            for same, effects in _distinct(below.templates, views):
                yield _Way(below, same, effects)

    def _is_refuted(self, question: _Question, base: _Base) -> bool:
        """Whether a tensor of the sample, or of the base's, is a fault. It reads the base only if
        the templates fit."""
        pieces, prefix, judge = question.pieces, question.below.prefix, self._judge
        known = set(map(_template, pieces))
        held = {template for template in known if base.size(template)}
        if self._has_no_place(pieces, held, prefix):
            return True
        if question.whole and any(
            _template(hub) not in known and not judge.may_be_absent(hub, piece)
            for hub, piece in base.sample.items()
        ):
            return True
        want = base.reading.pieces
        return any(judge.is_fault(hub, piece, want, prefix) for hub, piece in pieces.items())

    def _reading(self, way: _Way) -> Reading:
        """The reading, in which names outside the prefix that the user allowed are not faults."""
        below = way.below
        source = below.read(way.effects or below.templates.effects(way.views[0]))
        if not self._options.allow or not source.misfits:
            return source
        outside = (name for name in source.misfits if not name.startswith(below.prefix))
        allowed = dict.fromkeys(name for name in outside if self._options.allows(name))
        misfits = tuple(name for name in source.misfits if name not in allowed)
        return replace(source, misfits=misfits, allowed=tuple(allowed))

    def _candidate(self, way: _Way, source: Reading, base: _Base) -> Candidate:
        prefix = way.below.prefix
        verdicts = self._judge.verdicts(source, base.reading, prefix)
        return Candidate(prefix, way.views, base.view, source, base.reading, verdicts)


def _template(name: str) -> str:
    return template_of(name)[0]


def _distinct(templates: Templates, views: Iterable[View]) -> Iterator[tuple[Views, Effects]]:
    """The views that do the same to the templates, and what they do."""
    alike: dict[tuple[object, ...], tuple[list[View], Effects]] = {}
    for view in views:
        effects = templates.effects(view)
        alike.setdefault(effects.key, ([], effects))[0].append(view)
    for same, effects in alike.values():
        yield tuple(same), effects


def _compared(below: Below, views: Iterable[View]) -> Iterator[_Way]:
    """The ways to read the names after a prefix, told apart by a sample of them."""
    sample = below.sample(_COMPARED)
    whole = len(sample) == len(below.members)
    templates = below.templates if whole else Templates([below.rest(t) for t in sample])
    for same, effects in _distinct(templates, views):
        yield _Way(below, same, effects if whole else None, _sizes(below, sample, effects))


_Pair = tuple[_Way, _Base]


def _likeliest(pairs: Sequence[_Pair]) -> Iterator[_Pair]:
    """The pair with the most names in common, the first of the others, and the first after another
    prefix, as of a second model; without the others where they have nothing in common."""
    common = [_in_common(way, base) for way, base in pairs]
    order = sorted(range(len(pairs)), key=lambda place: -common[place])
    first = order[0]
    yield pairs[first]
    prefix = pairs[first][0].below.prefix
    apart = [place for place in order if pairs[place][0].below.prefix != prefix]
    for place in dict.fromkeys((*order[1:2], *apart[:1])):
        if common[place]:
            yield pairs[place]


def _in_common(way: _Way, base: _Base) -> int:
    """How many names a way may have in common with a layout of the base."""
    return sum(min(count, base.size(template)) for template, count in way.sizes.items())
