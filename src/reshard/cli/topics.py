"""Topics of `reshard help` beside commands: kinds of errors, codes of findings, pages.

The pages are those of `docs/`, which an installed package has as `reshard/docs/`.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from reshard import errors
from reshard.core.findings import CODES

_ERRORS, _FINDINGS = "errors", "findings"


def pages() -> dict[str, Path]:
    """The pages by name: `names` for docs/names.md, `formats/dcp` for docs/formats/dcp.md."""
    for folder in (Path(str(files("reshard"))) / "docs", Path(__file__).parents[3] / "docs"):
        if (folder / "errors.md").is_file():
            found = sorted(folder.rglob("*.md"))
            return {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}
    return {}


def classes() -> list[str]:
    """The kinds of errors, by their classes."""
    found = [value for value in vars(errors).values() if isinstance(value, type)]
    return [kind.__name__ for kind in found if issubclass(kind, errors.ReshardError)]


def topics() -> dict[str, list[str]]:
    """Every topic, by kind."""
    return {
        "Pages": [*pages()],
        "Errors": classes(),
        "Findings": [*CODES],
    }


def text(topic: str) -> str | None:
    """The text on a topic, as Markdown; None where there is none of that name."""
    asked = topic.strip().lower().removesuffix(".md").removeprefix("docs/")
    there = pages()
    for name in classes():
        if asked in (name.lower(), heading(name).lower()) and _ERRORS in there:
            return _section(there[_ERRORS].read_text(encoding="utf-8"), heading(name))
    if asked in CODES:
        return _finding(asked)
    short = {name.rpartition("/")[2]: path for name, path in there.items()} | there
    return short[asked].read_text(encoding="utf-8") if asked in short else None


def about(words: str) -> list[str]:
    """The pages that say the words most often: three of them at most."""
    asked = re.compile(rf"\b{re.escape(words.strip())}", re.IGNORECASE)
    said = {
        name: len(asked.findall(path.read_text(encoding="utf-8"))) for name, path in pages().items()
    }
    return sorted((name for name in said if said[name]), key=lambda name: -said[name])[:3]


def heading(name: str) -> str:
    """The heading that an error's class has in errors.md.

    >>> heading("NotFoundError"), heading("ReshardError"), heading("OptionError")
    ('Not found', 'Reshard error', 'Option')
    """
    words = re.sub(r"(?<!^)([A-Z])", r" \1", name).lower()
    return (words if words == "reshard error" else words.removesuffix(" error")).capitalize()


def _section(page: str, title: str) -> str | None:
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    return None if found is None else found[0].strip() + "\n"


def _finding(name: str) -> str:
    code = CODES[name]
    lines = [f"## {name}", f"{code.severity}: {code.meaning}."]
    lines += [f"What to do: {code.fix}"] if code.fix else []
    if code.by:
        lines.append(f"Found by: reshard {', reshard '.join(code.by)}.")
    else:
        lines.append(f"To treat it as an error: --strict {name}.")
    return "\n\n".join(lines) + "\n"
