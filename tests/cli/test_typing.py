"""What people type by mistake, and what they are told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reshard.cli.app import reshard as command
from reshard.cli.app import run
from tests.cli.test_terminal import model
from tests.oracle.cache import Oracle

Shown = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspct"], "No such command 'inspct'. Did you mean inspect? Commands: convert, inspect"),
        (["merge", "a"], "Did you mean convert?"),
        (["version"], "Did you mean --version?"),
        (["qqq"], "No such command 'qqq'. Commands: convert"),
        (["convert", "a", "-o", "b"], "Did you mean DST, the second argument?"),
        (["convert", "a", "b", "--src=c"], "Did you mean SRC, the first argument?"),
        (["convert", "-help"], "Did you mean --help?"),
        (["convert", "a", "b", "--bse", "c"], "--base"),
        (["convert", "a", "b", "c d"], "Is it the base model? Then write: --base 'c d'"),
        (["verify", "a", "b"], "Is it what to compare with? Then write: --against b"),
        (["convert", "a", "b", "c", "--base", "d"], "takes SRC and DST; 'c' is one too many."),
        (["inspect", "a", "b", "c"], "takes SRC; 'b' is one too many."),
        (["help", "inspct"], "Did you mean inspect?"),
    ],
)
def test_what_was_meant(arguments: list[str], words: str, capsys: Shown) -> None:
    assert run(command, arguments) == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert shown.err.startswith("Usage: ")
    assert shown.out == ""


def test_a_flag_that_is_known_is_not_doubted(tmp_path: Path, capsys: Shown) -> None:
    """`doctor` and `try` have other flags than `convert`; values may look like flags."""
    source = str(model(tmp_path / "m"))
    assert run(command, ["inspect", source, "--prefix", "--", "x"]) == 2
    assert run(command, ["convert", source, str(tmp_path / "out"), "-n"]) == 0
    assert not (tmp_path / "out").exists()


def test_help_is_a_command(capsys: Shown) -> None:
    assert run(command, ["help"]) == 0
    shown = capsys.readouterr().out
    assert "Commands:" in shown
    assert "..." not in shown.replace("[ARGS]...", "")
    assert run(command, ["help", "convert"]) == 0
    shown = capsys.readouterr().out
    assert "convert SRC DST --base MODEL [OPTIONS]" in shown
    assert "-b, --base" in shown
    assert run(command, ["-V"]) == 0
    assert "reshard" in capsys.readouterr().out


def test_all_wrong_paths_are_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    monkeypatch.chdir(tmp_path)
    model(Path("model"))
    arguments = ["convert", "nope", "model", "--base", "none", "--json"]
    assert run(command, arguments) == 1
    shown = capsys.readouterr()
    said = shown.err.splitlines()
    assert [line.split(":")[1].strip() for line in said] == ["model", "nope", "none"]
    assert all(line.startswith("error: ") for line in said)
    error = json.loads(shown.out)["error"]
    assert (error["class"], error["path"]) == ("WriteError", "model")
    assert [other["path"] for other in error["also"]] == ["nope", "none"]
    assert run(command, ["convert", "nope", "new", "--base", "none"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert run(command, ["convert", "nope", "new", "--base", "model"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert run(command, ["convert", "model", "new", "--tag", "5", "--base", "none"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_all_wrong_options_are_told_at_once(capsys: Shown) -> None:
    arguments = ["convert", "a", "b", "--max-shard-size", "foo", "--transformers-version", "x"]
    assert run(command, arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("error: --max-shard-size: 'foo' is not a size")
    assert said[1].startswith("error: --transformers-version: 'x'")


def test_the_shell_completes_tags(oracle: Oracle, tmp_path: Path) -> None:
    shutil.copytree(oracle["two-tags"].root, tmp_path / "run" / "_actor")

    def completed(line: str) -> list[str]:
        environment = {
            **os.environ, "_RESHARD_COMPLETE": "bash_complete", "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1), "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        start = [
            sys.executable,
            "-c",
            "from reshard.cli.app import reshard as r; r(prog_name='reshard')",
        ]
        done = subprocess.run(start, env=environment, capture_output=True, text=True, cwd=tmp_path)
        return [item.partition(",")[2] for item in done.stdout.split()]

    tags = ["global_step2", "global_step1", "latest"]
    assert completed("reshard convert run/_actor out --tag ") == tags
    assert completed("reshard convert run out --tag g") == tags[:2]
    assert completed("reshard inspect run -t ") == tags
    assert completed("reshard verify out --against run --tag l") == ["latest"]
    assert completed("reshard convert nope out --tag ") == []
    assert completed("reshard convert --tag ") == []
    assert completed("reshard insp") == ["inspect"]


def test_a_space_at_the_end_of_a_path_is_seen(tmp_path: Path, capsys: Shown) -> None:
    assert run(command, ["inspect", f"{tmp_path}/run "]) == 1
    assert f"error: '{tmp_path}/run ': there is no such file or folder." in capsys.readouterr().err
