"""Ctrl-C and SIGTERM at any moment: what is said is true, and no traceback is shown."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import reshard
from tests.commit.conftest import listing

pytestmark = pytest.mark.heavy

SRC = Path(__file__).parents[2] / "src"
# Sends a signal to itself where a function is called for the first time, and then calls it.
AT = """
import os, signal, sys
def interrupt(owner, name, signum):
    original = getattr(owner, name)
    def call(*arguments, **options):
        setattr(owner, name, original)
        os.kill(os.getpid(), signum)
        return original(*arguments, **options)
    setattr(owner, name, call)
from reshard.transfer import commit, leftovers, making
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SRC), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("package", ["click", "reshard.cli.app", "reshard.cli.flags"])
def test_while_the_command_is_imported(tmp_path: Path, package: str, signal: str) -> None:
    code = (
        "import builtins, os, signal\n"
        "original = builtins.__import__\n"
        "def hook(name, *rest):\n"
        f"    if name == {package!r}: os.kill(os.getpid(), signal.{signal})\n"
        "    return original(name, *rest)\n"
        "from reshard.cli.start import reshard\n"
        "import importlib\n"
        f"if {package!r} == 'reshard.cli.app':\n"
        "    import reshard.cli.start as start\n"
        "    module = importlib.import_module\n"
        "    start.import_module = lambda n: "
        f"(os.kill(os.getpid(), signal.{signal}), module(n))[1]\n"
        "builtins.__import__ = hook\n"
        "reshard()"
    )
    done = run(code, "convert", tmp_path, tmp_path / "out")
    assert done.returncode == 130
    assert done.stderr == "Interrupted. No output was written.\n"


# Moments, what stands afterwards, and whether an old output is replaced.
MOMENTS = [
    ("making, 'fill'", "before", False),  # while bytes pass
    ("making, 'fill'", "before", True),
    ("commit, 'reserve'", "before", False),
    ("leftovers, 'mark'", "before", True),  # while the folder is begun: held
    ("commit, 'rename_new'", "new", False),  # in the commit: held
    ("commit, 'exchange'", "new", True),
    ("leftovers, 'remove_tree'", "new", True),  # while the old output is deleted: held
]


@pytest.mark.parametrize(
    ("moment", "stands", "old", "signum"),
    [
        *((*moment, "SIGINT") for moment in MOMENTS),
        *((*MOMENTS[index], signum) for index in (1, 5) for signum in ("SIGTERM", "SIGHUP")),
    ],
)
def test_what_stands_is_said(
    model: Path, tmp_path: Path, moment: str, stands: str, old: bool, signum: str
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    if old:
        reshard.convert(model, place / "out")
    before = {path: (place / path).stat().st_ino for path in listing(place)}
    code = (
        f"{AT}interrupt({moment}, signal.{signum})\n"
        "from reshard.cli.start import reshard\nreshard()"
    )
    done = run(code, "convert", model, place / "out", "--overwrite", "--dtype", "float16")
    assert done.returncode == 130, done.stderr
    if stands == "new":
        assert f"Interrupted. The new output is complete: {place / 'out'}." in done.stderr
        assert reshard.verify(place / "out")
        assert [path.name for path in place.iterdir()] == ["out"]
        assert (place / "out").stat().st_ino != before.get("out")
        return
    out = place / "out"
    words = f"{out} is unchanged" if old else f"No output was written to {out}"
    assert f"Interrupted. {words}; run the command again." in done.stderr
    assert {path: (place / path).stat().st_ino for path in listing(place)} == before


def test_after_everything_is_done(model: Path, tmp_path: Path) -> None:
    """While the report is shown."""
    code = (
        f"{AT}from reshard.cli import output\ninterrupt(output, 'print_table', signal.SIGINT)\n"
        "from reshard.cli.start import reshard\nreshard()"
    )
    done = run(code, "convert", model, tmp_path / "out")
    assert done.returncode == 130
    assert f"The new output is complete: {tmp_path / 'out'}." in done.stderr
    assert reshard.verify(tmp_path / "out")


@pytest.mark.parametrize("signum", ["SIGINT", "SIGTERM"])
def test_what_is_finished_is_kept_with_resume(model: Path, tmp_path: Path, signum: str) -> None:
    """The message says so, and it is true."""
    place = tmp_path / "place"
    place.mkdir()
    code = (
        f"{AT}interrupt(commit, 'rename_new', signal.SIGKILL)\n"
        "from reshard.cli.start import reshard\nreshard()"
    )
    arguments = ("convert", model, place / "out", "--dtype", "float16", "--resume")
    assert run(code, *arguments).returncode == -9
    code = code.replace(
        "commit, 'rename_new', signal.SIGKILL", f"manifest, 'render', signal.{signum}"
    )
    done = run(f"from reshard.conversion import manifest\n{code}", *arguments)
    assert done.returncode == 130, done.stderr
    assert "what is finished is kept beside it: run the command again to continue." in done.stderr
    assert [path.name[:13] for path in place.iterdir()] == [".out.partial-"]
    done = run("from reshard.cli.start import reshard\nreshard()", *arguments)
    assert done.returncode == 0, done.stderr
    assert "of an interrupted run" in done.stdout
    assert [path.name for path in place.iterdir()] == ["out"]
    reshard.convert(model, tmp_path / "whole", dtype="float16")
    names = listing(tmp_path / "whole")
    assert listing(place / "out") == names
    files = [name for name in names if (place / "out" / name).is_file()]
    assert files
    assert all(
        (place / "out" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in files
    )
