"""Reading the names of tensors through layouts, for 40,000 names as for 40.

Layers and experts differ only in numbers, so a view is asked once for each *template*, the name
with `NUMBER` for its numbers: a few dozen for a model of 36,000 tensors. Where nearly every name is
a template of its own, most views still change few of them, because each pattern spells out a part
that few names have: the others are not even asked about.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import NamedTuple

from msgspec import Struct

from reshard.core.regex import regex
from reshard.core.tensors import Shape
from reshard.naming import patterns
from reshard.naming.layouts import Effect, Layout, Piece, View
from reshard.naming.scanning import batched

#: Stands for a part of a name that is a number. A name that contains it belongs to no view.
NUMBER = "\0"
# Experts in one tensor: far more than any model has. A shape without elements may state any number.
_MAX_EXPERTS = 1 << 16


class Reading(Struct, frozen=True):
    """What a set of tensors holds if it is read through a view.

    `pieces`: hub name -> where it lies. `rules`: how often each rule was used. `misfits`: names
    without the prefix, or that read as a hub tensor which another name already gave. `allowed`:
    names without the prefix that are left out because the user said so.
    """

    pieces: Mapping[str, Piece]
    rules: Mapping[str, int]
    misfits: tuple[str, ...]
    allowed: tuple[str, ...] = ()


class Effects:
    """What a view does to each of some templates; of most it does nothing.

    `whole` is of a first layout that changes every name, and shared by the views that begin with
    it, else empty; `more` says where a view differs from that. Views of equal keys read the same.
    """

    __slots__ = ("more", "whole")

    def __init__(self, whole: Mapping[str, Effect], more: Mapping[str, Effect]) -> None:
        self.whole = whole
        self.more = more

    @property
    def key(self) -> tuple[object, ...]:
        return (id(self.whole), *self.more.items())

    def of(self, template: str) -> Effect | None:
        """What happens to a template; None: it stays as it is."""
        return self.more.get(template) or self.whole.get(template)

    def changes(self) -> Iterable[Effect]:
        """Every effect that is one."""
        return {**self.whole, **self.more}.values()


class Row(Struct, frozen=True, gc=False):
    """A tensor: its name, its shape, and its name's template; None: the name belongs to no view."""

    name: str
    shape: Shape
    template: str | None

    def numbers(self, start: int = 0) -> tuple[str, ...]:
        """The numbers in its name after so many characters; most readings do without."""
        return tuple(_NUMBERED.findall(self.name, start))


class Names:
    """Names and shapes of tensors, ready to be read after any prefix.

    `rows` are in the order given, `members` the same by template.
    """

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.rows: list[Row] = []
        self.members: dict[str, list[Row]] = {}
        known: dict[str, str] = {}
        for (name, shape), template in zip(shapes.items(), templates_of(shapes), strict=True):
            if template is None:
                self.rows.append(Row(name, shape, None))
                continue
            row = Row(name, shape, known.setdefault(template, template))
            self.rows.append(row)
            self.members.setdefault(template, []).append(row)

    @cached_property
    def shared(self) -> str | None:
        """What all names begin with; None where one belongs to no view."""
        if not self.rows or any(row.template is None for row in self.rows):
            return None
        return common_start(row.name for row in self.rows)


class Below:
    """The names after a prefix, which ends in a dot or is empty, ready to be read through views.

    `members`: whole template -> the tensors of it that are below. `outside` are the other names.
    """

    def __init__(self, names: Names, prefix: str = "") -> None:
        self.prefix = prefix
        self.members: Mapping[str, Sequence[Row]] = names.members
        self.outside: tuple[str, ...] = ()
        self._rows = names.rows
        self._start, numbers = template_of(prefix)
        self._numbered = bool(numbers)
        if names.shared is None or not names.shared.startswith(prefix):
            self.members = {
                template: rows
                for template, listed in names.members.items()
                if template.startswith(self._start) and (rows := self._of_number(listed))
            }
            held = {row.name for rows in self.members.values() for row in rows}
            self.outside = tuple(row.name for row in names.rows if row.name not in held)

    def _of_number(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Those that have the prefix's numbers."""
        if not self._numbered:
            return rows
        return [row for row in rows if row.name.startswith(self.prefix)]

    def rest(self, template: str) -> str:
        """The part of a template that is after the prefix."""
        return template[len(self._start) :]

    @cached_property
    def templates(self) -> Templates:
        """What is after the prefix."""
        return Templates([self.rest(template) for template in self.members])

    @cached_property
    def first(self) -> list[tuple[str, Row]]:
        """The tensors whose numbers are all 0, each with its whole template."""
        zeros = ((template, template.replace(NUMBER, "0")) for template in self.members)
        return [(t, row) for t, zero in zeros for row in self.members[t] if row.name == zero]

    def sample(self, count: int) -> list[str]:
        """So many of the whole templates, evenly among all."""
        listed = list(self.members)
        return listed[:: -(-len(listed) // count) or 1]

    def pieces(self, row: Row, effect: Effect | None) -> dict[str, Piece]:
        """The hub tensors in one of the tensors; of many experts, the first one's alone."""
        name, shape = row.name, row.shape
        if effect is None:
            return {name.removeprefix(self.prefix): Piece(name, shape)}
        if effect.stacked is not None and len(shape) == 3 and 1 < shape[0] <= _MAX_EXPERTS:
            shape = (1, *shape[1:])
        return _pieces(name, shape, effect, row.numbers(len(self.prefix)))

    def read(self, effects: Effects) -> Reading:
        """Read the tensors through a view, given by its effects. Pieces keep prefixes."""
        known = {template: effects.of(self.rest(template)) for template in self.members}
        length = len(self.prefix)
        pieces: dict[str, Piece] = {}
        rules: dict[str, int] = {}
        twice = []
        for row in self._rows:
            name, shape, template = row.name, row.shape, row.template
            if template not in known or (self._numbered and not name.startswith(self.prefix)):
                continue
            effect = known[template]
            if effect is None or (effect.stacked is None and not effect.swapped):
                # Most tensors: without a table of their own.
                hub = name[length:] if effect is None else _number(effect.hub, row.numbers(length))
                fits = hub not in pieces
                if fits:
                    pieces[hub] = Piece(name, shape)
            else:
                found = _pieces(name, shape, effect, row.numbers(length))
                fits = not (found.keys() & pieces.keys())
                if fits:
                    pieces.update(found)
            if not fits:
                twice.append(name)
            elif effect is not None:
                for rule in effect.rules:
                    rules[rule] = rules.get(rule, 0) + 1
        shown = {_shown(rule): used for rule, used in rules.items()}
        return Reading(pieces, shown, (*self.outside, *twice))


class _Stage(NamedTuple):
    """Templates after the first layout of a view, where that one changes all: what it does to
    them, what they are then, and which of these contain a part, once it was asked for."""

    effects: Mapping[str, Effect]
    texts: Sequence[str]
    holding: dict[str, Sequence[int]]


class Templates:
    """Templates of names, and what views do to them."""

    def __init__(self, templates: Sequence[str]) -> None:
        self._all = templates
        self._plain = _Stage({}, templates, {})
        self._stages: dict[Layout, _Stage] = {}

    def effects(self, view: View) -> Effects:
        """What a view does to the templates."""
        layouts = [layout for layout in view.layouts if _keys(layout)]
        stage = self._plain
        if layouts and "" in _keys(layouts[0]):
            stage = self._stage(layouts.pop(0))
        keys = {key for layout in layouts for key in _keys(layout)}
        more = {}
        for index in sorted({index for key in keys for index in _holding(stage, key)}):
            template = self._all[index]
            effect = view.effect(template)
            if effect != (stage.effects.get(template) or Effect(template, ())):
                more[template] = effect
        return Effects(stage.effects, more)

    def _stage(self, layout: Layout) -> _Stage:
        known = self._stages.get(layout)
        if known is None:
            effects = {template: View((layout,)).effect(template) for template in self._all}
            texts = [effects[template].hub for template in self._all]
            known = self._stages[layout] = _Stage(effects, texts, {})
        return known


def _holding(stage: _Stage, key: str) -> Sequence[int]:
    """Which templates contain a part, or what looks like it."""
    found = stage.holding.get(key)
    if found is None:
        found = [index for index, text in enumerate(stage.texts) if key in text]
        stage.holding[key] = found
    return found


@lru_cache(maxsize=1024)
def _keys(layout: Layout) -> frozenset[str]:
    """A part that each pattern for names of this layout spells out; empty for one that spells out
    none. A name without all of them stays as it is."""
    here = (*(here for _, here in layout.names), *(rule.name for rule in layout.stacked))
    return frozenset(map(patterns.spelt, (*here, *layout.swapped)))


def common_start(names: Iterable[str]) -> str:
    """The letters that all names begin with.

    >>> common_start(["model.layers", "model.lm_head"])
    'model.l'
    """
    listed = tuple(names)
    pairs = zip(min(listed), max(listed), strict=False)
    return "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def template_of(name: str) -> tuple[str, tuple[str, ...]]:
    """The name with its numbers left out, and the numbers in order.

    >>> template_of("layers.3.experts.12.up")
    ('layers.\\x00.experts.\\x00.up', ('3', '12'))
    """
    parts = _NUMBERED.split(name)
    return (NUMBER.join(parts[::2]), tuple(parts[1::2])) if len(parts) > 1 else (name, ())


def templates_of(names: Iterable[str]) -> Iterator[str | None]:
    """The template of each of very many names, None for a name that contains `NUMBER`.

    A thousand names are one text, in which a third of the time is needed.

    >>> list(templates_of(["layers.3.up", "norm.weight", "\\0.weight"]))
    ['layers.\\x00.up', 'norm.weight', None]
    """
    for some in batched(names, _AT_ONCE):
        joined = "\n".join(some)
        if NUMBER in joined or joined.count("\n") >= len(some):
            yield from (None if NUMBER in name else template_of(name)[0] for name in some)
        else:
            yield from _NUMBERED_LINES.sub(NUMBER, joined).split("\n")


# A part between dots that is of digits alone, whatever the script, as str.isdecimal has it.
# It begins with the digit, which the search skips to, and looks back from there.
_NUMBERED = regex(r"(\d(?<![^.].)\d*)(?![^.])")
_NUMBERED_LINES = regex(r"\d(?<![^.\n].)\d*(?![^.\n])")
# Names that are taken apart as one text.
_AT_ONCE = 1000


def _number(template: str, numbers: Iterable[str]) -> str:
    """The name that a template and its numbers make."""
    return _format(template) % tuple(numbers)


@lru_cache(maxsize=1024)
def _format(template: str) -> str:
    """The template as a format of `%`: a few dozen serve 40,000 names."""
    return template.replace("%", "%%").replace(NUMBER, "%s")


def _shown(rule: str) -> str:
    return rule.replace(NUMBER, "*")


def _pieces(name: str, shape: Shape, effect: Effect, numbers: tuple[str, ...]) -> dict[str, Piece]:
    """The hub tensors in one tensor."""
    stacked = effect.stacked
    unstacks = stacked is not None and len(shape) == 3 and shape[0] <= _MAX_EXPERTS
    if stacked is not None and unstacks and shape[1] % len(stacked.parts) == 0:
        return _unstack(name, shape, effect, numbers)
    hub = _number(effect.hub, numbers)
    if effect.swapped and len(shape) >= 2:
        turned = (*shape[:-2], shape[-1], shape[-2])
        return {hub: Piece(name, turned, swapped=True)}
    return {hub: Piece(name, shape)}


def _unstack(name: str, shape: Shape, effect: Effect, numbers: tuple[str, ...]) -> dict[str, Piece]:
    experts, total, columns = shape
    parts = effect.stacked.parts if effect.stacked is not None else ()
    rows = total // len(parts)
    templates = part_templates(effect)
    pieces = {}
    for expert in range(experts):
        for place, template in enumerate(templates):
            start = place * rows
            hub = _number(template, (*numbers, str(expert)))
            pieces[hub] = Piece(name, (rows, columns), expert, start, start + rows)
    return pieces


def part_templates(effect: Effect) -> list[str]:
    """The templates of what a stacked tensor holds; none where the effect does not unstack."""
    parts = () if effect.stacked is None else effect.stacked.parts
    return [patterns.fill(part, (*effect.wild, NUMBER)) for part in parts]
