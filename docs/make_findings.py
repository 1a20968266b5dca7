"""Write `docs/findings.md` from the table of codes: `python docs/make_findings.py`."""

from __future__ import annotations

from pathlib import Path

from reshard.core.findings import CODES

HEAD = """# Findings

What reshard tells about a checkpoint, a conversion or a model without refusing it. Each has a
code; `--json` lists them as `findings` with `code`, `severity`, `subject`, `message`, `fix` and
`evidence`, and in Python they are `reshard.Finding`s in `report.findings`.

## Of checkpoints, conversions and comparisons

With `--strict`, findings of severity `warning` and `error` are refused, with `--strict CODE...`
those of the codes.

| code | severity | what it means | what to do |
|---|---|---|---|
"""

MODELS = """
## Of models

`reshard doctor` and `reshard try` end with code 1 where they find an error. How each is seen, and
what doctor repairs: [doctor.md](doctor.md), [try.md](try.md).

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
