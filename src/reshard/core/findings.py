"""Findings: what a person should know about a checkpoint, a conversion or a model.

A finding has a code, and `CODES` says once what each code means and how to fix it. Readers, the
fit of the names and the conversion all report findings; `--strict` and `--json` speak of codes.
Adding one is a line in `CODES` and the place that reports it; `docs/findings.md` is made from here.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

#: `info`: nothing to do. `warning`: read it, the result may not be what was meant. `error`: the
#: result is wrong or unusable somewhere.
Severity = Literal["info", "warning", "error"]


class Code(Struct, frozen=True):
    """What a code means, in one line, and how to fix what it reports; no fix where none is due."""

    severity: Severity
    meaning: str
    fix: str = ""


class Finding(Struct, frozen=True):
    """Something that a person should know.

    `code` is a key of `CODES`. `message` is one or two sentences with the evidence. `subject` is
    the tensor or file concerned, empty where it is the whole. `fix` says what to do in this case;
    empty: the code's own.
    """

    code: str
    message: str
    subject: str = ""
    fix: str = ""

    @property
    def severity(self) -> Severity:
        """How serious it is."""
        return CODES[self.code].severity

    def __str__(self) -> str:
        return self.message

    def to_json(self) -> dict[str, Any]:
        """The finding as JSON values."""
        return {
            "code": self.code,
            "severity": self.severity,
            "subject": self.subject,
            "message": self.message,
            "fix": self.fix or CODES[self.code].fix,
        }


#: Every code, in alphabetical order.
CODES: dict[str, Code] = {
    "old-output-kept": Code(
        "warning", "the output that was replaced cannot be deleted entirely",
        "Delete what is left of it."),
    "old-output-restored": Code(
        "info", "a killed run had moved the old output aside; it was put back"),
    "partial-output": Code("info", "what an interrupted run of this output left was removed"),
    "partial-output-kept": Code(
        "warning", "something beside the output looks like a run's leftover and was not removed",
        "Remove it, if nobody needs it."),
}  # fmt: skip
