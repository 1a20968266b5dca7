"""The wheel: what it takes from the tree, and that what is built from it works by itself."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import reshard
from reshard.cli.app import reshard as command
from reshard.cli.app import run
from reshard.cli.version import EXTRAS
from tests.test_imports import MODULES

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


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install .` installs: a wheel, built by the backend and unpacked."""
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (wheel,) = folder.glob("reshard-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def installed(site: Path, script: str, *arguments: object) -> str:
    """What a console script of the wheel prints, run away from the tree."""
    points = configparser.ConfigParser()
    points.read(next(site.glob("*.dist-info")) / "entry_points.txt")
    module, function = points["console_scripts"][script].split(":")
    code = f"""
import sys
sys.path[:] = [{str(site)!r}] + [p for p in sys.path if p != {str(ROOT / "src")!r}]
sys.argv[0] = {script!r}
import {module} as start
assert start.__file__.startswith({str(site)!r})
start.{function}()
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, *map(str, arguments)],
        cwd=site.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_built_wheel_converts_and_has_its_pages_and_types(unpacked: Path) -> None:
    assert (unpacked / "reshard" / "py.typed").exists()
    assert installed(unpacked, "reshard", "--version").startswith(f"reshard {reshard.__version__}")
    assert "# What happens when something" in installed(unpacked, "reshard", "help", "reliability")
    out = unpacked.parent / "out"
    source = ROOT / "tests" / "golden" / "zero3" / "checkpoint"
    assert "yes, read back" in installed(unpacked, "reshard", "convert", source, out)
    assert "all as written" in installed(unpacked, "reshard", "verify", out)
    for script in ("ds2hf", "fsdp2hf", "hf2fsdp", "test_model"):
        assert f"Usage: {script}" in installed(unpacked, script, "--help")


def test_the_built_wheel_has_every_module_and_no_other_file(unpacked: Path) -> None:
    there = {path.relative_to(unpacked / "reshard") for path in unpacked.rglob("*.py")}
    assert there == {path.relative_to(ROOT / "src" / "reshard") for path in MODULES.values()}
    beside = {path.suffix for path in (unpacked / "reshard").rglob("*") if path.is_file()}
    assert beside - {".pyc"} <= {".py", ".md", ".jinja", ".json", ".txt", ".css", ".js", ".typed"}
