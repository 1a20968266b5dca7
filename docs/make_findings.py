"""Write `docs/findings.md` from the table of codes: `python docs/make_findings.py`."""

from __future__ import annotations

from pathlib import Path

from reshard.core.findings import CODES

HEAD = """# Findings

A finding is something about a checkpoint, a conversion or a model that reshard reports without
refusing it. Each has a code. `reshard help CODE` explains a code; `--json` lists the findings as
`findings`, with `code`, `severity`, `subject`, `message`, `fix` and `evidence`; in Python they are
`reshard.Finding` objects in `report.findings`.

## Of checkpoints, conversions and comparisons

`--strict` refuses findings of severity `warning` and `error`; `--strict CODE...` refuses only
findings with these codes.

| code | severity | what it means | what to do |
|---|---|---|---|
"""

MODELS = """
## Of models

`reshard doctor` and `reshard try` exit with code 1 if they find an error. [doctor.md](doctor.md)
and [try.md](try.md) say how each finding is detected, and which ones doctor repairs.

| code | severity | what it means | found by |
|---|---|---|---|
"""


def page() -> str:
    """The page's text."""
    general = [
        f"| `{name}` | {code.severity} | {code.meaning} | {code.fix} |\n"
        for name, code in CODES.items()
        if not code.by
    ]
    models = [
        f"| `{name}` | {code.severity} | {code.meaning} | {', '.join(code.by)} |\n"
        for name, code in CODES.items()
        if code.by
    ]
    return "".join((HEAD, *general, MODELS, *models))


if __name__ == "__main__":
    Path(__file__).with_name("findings.md").write_text(page(), encoding="utf-8")
