"""The wheel, as far as it can be told without building one: what it takes from the tree."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_wheel_has_the_package_the_pages_and_nothing_else() -> None:
    tomllib = pytest.importorskip("tomllib", reason="it came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["only-include"] == ["src/reshard", "docs"]
    assert wheel["sources"] == {"src/reshard": "reshard", "docs": "reshard/docs"}
    beside = {path.suffix for path in (ROOT / "docs").iterdir() if path.is_file()}
    assert wheel["exclude"] == ["docs/*.py", "docs/images"]
    assert beside == {".md", ".py"}
