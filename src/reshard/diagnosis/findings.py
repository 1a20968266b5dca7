"""What a check finds: an ailment by name, its evidence, and the mend where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from msgspec import Struct, field

from reshard.core.catalog import Asset
from reshard.diagnosis.case import Case
from reshard.errors import listed

#: An error makes the model wrong or unusable somewhere; a warning does not.
Severity = Literal["error", "warning"]

# Names shown in a line of evidence; a broken export can have thousands.
_SHOWN = 4


class Repair(Struct, frozen=True):
    """How a finding is mended: in words, and what that changes beside the fit onto the base.

    config: dotted path in `config.json` -> new value.
    assets, texts: files that the folder lacks, and small files that are written anew.
    renamed: tensor's name in the folder -> the right one. dropped: tensors not to write.
    cast: whether the weights take the base's dtypes.
    rescued: whether the weights are those of the training checkpoint inside the folder.
    """

    words: str
    config: Mapping[str, object] = field(default_factory=dict)
    assets: tuple[Asset, ...] = ()
    texts: tuple[tuple[str, bytes], ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    cast: bool = False
    rescued: bool = False


class Signs(Struct, frozen=True):
    """What a check saw. `advice` says what to do where there is no repair."""

    evidence: tuple[str, ...]
    repair: Repair | None = None
    advice: str = ""


class Finding(Struct, frozen=True):
    """An ailment that a folder has."""

    name: str
    severity: Severity
    about: str
    evidence: tuple[str, ...]
    repair: Repair | None = None
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        """The finding as JSON values; `repair` is null where it cannot be mended."""
        return {
            "name": self.name,
            "severity": self.severity,
            "about": self.about,
            "evidence": list(self.evidence),
            "repair": None if self.repair is None else self.repair.words,
            "advice": self.advice,
        }


class Ailment(Struct, frozen=True):
    """A thing that can be wrong: what it is, in one line, and the check that sees it."""

    name: str
    severity: Severity
    about: str
    check: Callable[[Case], Signs | None]

    def examine(self, case: Case) -> Finding | None:
        """The finding, or None where the folder does not have this ailment."""
        signs = self.check(case)
        if signs is None:
            return None
        return Finding(
            self.name, self.severity, self.about, signs.evidence, signs.repair, signs.advice
        )


def some(names: Iterable[str]) -> str:
    """The first few names, and how many there are more.

    >>> some(["a", "b", "c", "d", "e", "f"])
    'a, b, c, d and 2 more'
    """
    return listed(names, _SHOWN)
