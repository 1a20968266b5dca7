"""The wheel, as far as it can be told without building one: what it takes from the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import reshard
from reshard.cli.app import reshard as command
from reshard.cli.app import run
from reshard.cli.version import EXTRAS

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


def test_the_version_tells_of_every_extra() -> None:
    tomllib = pytest.importorskip("tomllib", reason="it came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    stated = {
        extra: tuple(re.split(r"[>=<;\[ ]", requirement)[0] for requirement in requirements)
        for extra, requirements in project["project"]["optional-dependencies"].items()
    }
    assert stated == EXTRAS


def test_the_version_and_the_extras_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--version", "-V"):
        assert run(command, [flag]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"reshard {reshard.__version__}, Python 3.")
        assert [line.split()[0] for line in lines[1:]] == [*EXTRAS]
        assert re.search(r"zstd +(zstandard \d|lacks zstandard)", lines[-1])
