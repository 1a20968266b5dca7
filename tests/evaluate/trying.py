"""Short ways to run a model in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reshard.core.findings import Finding
from reshard.evaluate.options import Options
from reshard.evaluate.report import TryReport
from reshard.evaluate.run import run

PROMPTS = ("Hello.", "你好！")


def attempt(model: Path, tmp_path: Path, **more: Any) -> TryReport:
    """Run a model on the CPU for eight tokens a prompt; `more` are fields of `Options`."""
    fields: dict[str, Any] = {
        "prompts": PROMPTS,
        "device": "cpu",
        "max_new_tokens": 8,
        "output_file": tmp_path / "report.json",
    }
    return run(Options(model, **{**fields, **more}))


def named(report: TryReport, name: str) -> Finding:
    """The one finding of that name."""
    found = [finding for finding in report.findings if finding.code == name]
    assert len(found) == 1, [finding.code for finding in report.findings]
    return found[0]


def names(report: TryReport) -> set[str]:
    """The names of all findings that are more than an info."""
    return {finding.code for finding in report.findings if finding.severity != "info"}
