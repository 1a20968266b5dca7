"""Write `docs/findings.md` from the table of codes: `python docs/make_findings.py`."""

from __future__ import annotations

from pathlib import Path

from reshard.core.findings import CODES

HEAD = """# Findings

What reshard tells about a checkpoint, a conversion or a comparison without refusing it. Each has a
code; `--json` lists them as `findings` with `code`, `severity`, `subject`, `message` and `fix`, and
in Python they are in `report.findings`. With `--strict`, findings of severity `warning` and `error`
are refused, with `--strict CODE...` those of the codes. What `reshard doctor` finds in a model
folder is in [doctor.md](doctor.md).

| code | severity | what it means | what to do |
|---|---|---|---|
"""


def page() -> str:
    """The page's text."""
    rows = [
        f"| `{name}` | {code.severity} | {code.meaning} | {code.fix} |"
        for name, code in CODES.items()
    ]
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("findings.md").write_text(page(), encoding="utf-8")
