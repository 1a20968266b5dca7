"""What a hint's test is made of: an input that fails, what the hint says done, and the result.

    @follows("Name one of them with --tag.")
    def tag(at: Path) -> Case: ...

`cause` fails, or finds something, and says the hint; `mend` is the same call once the hint was
followed to the letter. It must not say that hint again, and what it writes must be well: read back,
and without an error for doctor. Where a hint leads to another refusal, `refused` is its error.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reshard
from reshard.core.findings import CODES
from reshard.errors import ReshardError

GOLDEN = Path(__file__).parents[1] / "golden"
#: What tiny models lack beside their weights, and what a model that was not trained is.
LACKING = {"tokenizer-missing", "processor-missing", "identical-to-base", "code-missing"}


@dataclass(frozen=True)
class Case:
    """One input; `same` says that the corrected call gives what it must."""

    cause: Callable[[], Any]
    mend: Callable[[], Any]
    refused: type[ReshardError] | None = None
    same: Callable[[Any], bool] | None = None


Maker = Callable[[Path], Case]
CASES: dict[str, list[Maker]] = {}


def follows(*templates: str) -> Callable[[Maker], Maker]:
    """A maker whose case follows these hints."""

    def register(maker: Maker) -> Maker:
        for template in templates:
            CASES.setdefault(template, []).append(maker)
        return maker

    return register


def pattern(template: str) -> re.Pattern[str]:
    """A hint's template as an expression for its text."""
    return re.compile(".+".join(map(re.escape, template.split("{}"))), re.DOTALL)


def said(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """A call's result, or its error, and every hint in it."""
    try:
        result = call()
    except ReshardError as error:
        return error, [error.hint or ""]
    findings = getattr(result, "findings", ())
    return result, [found.fix or CODES[found.code].fix for found in findings]


def follow(case: Case, template: str) -> None:
    """See the hint, follow it, and see what it promised."""
    expression = pattern(template)
    first, hints = said(case.cause)
    assert any(expression.search(hint) for hint in hints), (template, hints, first)
    second, later = said(case.mend)
    assert not any(expression.search(hint) for hint in later), (template, later, second)
    if case.refused is not None:
        assert isinstance(second, case.refused), second
        assert str(second) != str(first)
        return
    if isinstance(second, ReshardError):
        raise second
    if isinstance(second, reshard.Report):
        well(Path(second.target))
    assert case.same is None or case.same(second), second


def well(out: Path) -> None:
    """What was written is read back, and doctor finds no error in it."""
    assert reshard.verify(out).num_tensors > 0
    if (out / "config.json").is_file() and list(out.glob("*.safetensors")):
        errors = [f.code for f in reshard.doctor(out).errors]
        assert not set(errors) - LACKING, errors


def golden(name: str, at: Path) -> Path:
    """A copy of a golden checkpoint, to be spoilt."""
    return Path(shutil.copytree(GOLDEN / name / "checkpoint", at))


def as_golden(name: str) -> Callable[[Any], bool]:
    """Whether a conversion wrote the tensors that the golden checkpoint holds, by their digests."""
    kept = json.loads((GOLDEN / name / "digests.json").read_text("utf-8"))["tensors"]

    def same(report: Any) -> bool:
        stated = json.loads((Path(report.target) / "reshard.json").read_text("utf-8"))
        return bool(stated["tensors"] == kept)

    return same
