"""The result of a check of a model folder, and its repair if there is one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct, field

from reshard.core.catalog import Asset
from reshard.core.findings import Finding
from reshard.errors import listed

#: The advice on what only the run's own checkpoint holds.
CONVERT_AGAIN = "Convert the run's checkpoint again: reshard convert RUN OUT --base HF_DIR."
# Names shown in a line of evidence; a broken export can have thousands.
_SHOWN = 4


class Repair(Struct, frozen=True):
    """How a finding is repaired: in words, and what that changes beside the fit onto the base.

    config: dotted path in `config.json` -> new value.
    assets, texts: files that the folder lacks, and small files that are written again.
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


class CheckResult(Struct, frozen=True):
    """A finding of a check, and its repair where there is one."""

    finding: Finding
    repair: Repair | None = None


def result_of(code: str, signs: Signs) -> CheckResult:
    """What a check saw as a finding; its fix is the repair or, where there is none, the advice."""
    fix = signs.advice if signs.repair is None else signs.repair.words
    return CheckResult(Finding(code, "; ".join(signs.evidence), fix=fix), signs.repair)


def some(names: Iterable[str]) -> str:
    """The first few names, and how many there are more.

    >>> some(["a", "b", "c", "d", "e", "f"])
    'a, b, c, d and 2 more'
    """
    return listed(names, _SHOWN)
