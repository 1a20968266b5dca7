"""All names that loaded models use for the tensors of the files, where layouts only rename.

A container that can name the same bytes more than once (DCP) gets the names in the files and those
of the loaded models of every known transformers version. A layout that stacks or transposes tensors
has no bytes here to name; it is listed as `apart`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from reshard.core.tensors import Shape
from reshard.errors import PlanError
from reshard.naming.layouts import Piece, Version, View
from reshard.naming.memory import NEWEST, memory_layout, pieces_of, placed_pieces, unsupported
from reshard.naming.schema import views

# The first version whose layouts were read. The layouts of families without a table of their own
# may change there.
_FIRST: Version = (4, 0)
_FIRST_5: Version = (5, 0)


class Apart(Struct, frozen=True):
    """Versions `[since, before)` of transformers whose loaded models ask for other tensors.

    `name` is one of those tensors, `count` their number; an empty name means that nobody knows how
    that version makes its tensors from those of the files. `before` is None where no later version
    differs.
    """

    since: Version
    before: Version | None
    name: str = ""
    count: int = 0

    @property
    def versions(self) -> str:
        """The versions in words, to follow "transformers".

        >>> Apart((5, 0), None).versions, Apart((4, 0), (5, 0)).versions, Apart((0,), None).versions
        ('5.0 and later', 'before 5.0', 'of every version')
        """
        early = self.since <= _FIRST
        if self.before is None:
            return "of every version" if early else f"{_text(self.since)} and later"
        return (
            f"before {_text(self.before)}"
            if early
            else f"from {_text(self.since)} to before {_text(self.before)}"
        )

    def holds(self, version: Version) -> bool:
        """Whether a version is one of these."""
        return self.since <= version and (self.before is None or version < self.before)


class Answers(Struct, frozen=True):
    """`names`: each name in the files -> all others, oldest first; names without any are left out.

    `apart`: the versions whose names are not among them, oldest first.
    """

    names: Mapping[str, tuple[str, ...]]
    apart: tuple[Apart, ...] = ()


def answers(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> Answers:
    """The names in loaded models of the tensors of a model's files.

    `shapes` are by the names in the files, `config` is the parsed `config.json`. The result depends
    on nothing else, such as installed packages.
    """
    reading = pieces_of(shapes, config)
    owners = {name: name for name in shapes}
    found: list[tuple[Version, Apart | None]] = []
    for version in _versions(config):
        apart = Apart(version, None)
        if not unsupported(config, version):
            view = memory_layout(config, version)
            if view is None:
                continue
            named, others = _renamed(reading, config, view)
            others += [name for name, own in named.items() if owners.get(name, own) != own]
            if not others:
                owners.update(named)
                found.append((version, None))
                continue
            apart = Apart(version, None, others[0], len(others))
        found.append((version, apart))
    names: dict[str, list[str]] = {}
    for name, own in owners.items():
        if name != own:
            names.setdefault(own, []).append(name)
    return Answers({own: tuple(more) for own, more in names.items()}, tuple(_ranges(found)))


def _versions(config: Mapping[str, Any]) -> list[Version]:
    """The versions that changed a layout which a loaded model of this config may have."""
    layouts = {layout for view in views(config, guess=False) for layout in view.layouts}
    changes = {v for layout in layouts for v in (layout.since, layout.before) if v is not None}
    return sorted(version for version in changes | {_FIRST_5} if version <= NEWEST)


def _renamed(
    stored: Mapping[str, Piece], config: Mapping[str, Any], view: View
) -> tuple[dict[str, str], list[str]]:
    """Name in memory -> name in the files, where the tensor is the same one; second, all other
    names."""
    parts = Counter(piece.name for piece in stored.values())
    named: dict[str, str] = {}
    others: list[str] = []
    try:
        placed = placed_pieces(stored, config, view)
    except PlanError as error:  # some experts of a layer only: there is no such stack
        return {}, [error.tensor or ""]
    for name, pairs in placed.items():
        own = pairs[0][1].name
        whole = len(pairs) == parts[own]
        if whole and all(replace(here, name=own) == there for here, there in pairs):
            named[name] = own
        else:
            others.append(name)
    return named, others


def _ranges(versions: Sequence[tuple[Version, Apart | None]]) -> Iterator[Apart]:
    """The versions that are apart; neighbours with the same evidence are joined."""
    ends: list[Version | None] = [version for version, _ in versions[1:]]
    ranges = [(apart, end) for (_, apart), end in zip(versions, [*ends, None], strict=True)]
    for _, group in groupby(ranges, lambda item: item[0] and bool(item[0].name)):
        members = list(group)
        first = members[0][0]
        if first is not None:
            yield Apart(first.since, members[-1][1], first.name, first.count)


def _text(version: Version) -> str:
    return ".".join(map(str, version))
