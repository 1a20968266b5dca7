"""What a terminal, a log and a pipe show: colours, tables, progress, what to do next."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import reshard
from reshard.cli.app import reshard as command
from reshard.cli.app import run
from reshard.cli.progress import Lines, shown_progress

pytestmark = pytest.mark.heavy

Shown = pytest.CaptureFixture[str]
LONG = "model.layers.0.self_attn.a_projection_whose_name_is_longer_than_any_terminal_is_wide.weight"
RED, GREEN, YELLOW = "\x1b[31m", "\x1b[32m", "\x1b[33m"


def model(folder: Path, value: float = 1, name: str = "w") -> Path:
    """A causal language model, as far as its config says."""
    folder.mkdir()
    save_file({name: np.full((3, 2), value, np.float32)}, folder / "model.safetensors")
    config = {"model_type": "tiny", "architectures": ["TinyForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """A trained model, and its base."""
    return str(model(tmp_path / "trained", 2)), str(model(tmp_path / "base"))


def on_terminal(arguments: list[str], folder: Path, **more: str) -> str:
    """What a command shows on a terminal of 80 columns; `more` are variables of its environment."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
    environment |= {"TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path), **more}
    child = subprocess.Popen(
        [sys.executable, "-m", "reshard", *map(os.fsencode, arguments)],
        cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while piece := os.read(ours, 1 << 16):
            shown += piece
    os.close(ours)
    assert child.wait() in (0, 1), shown
    return shown.decode().replace("\r\n", "\n")


def test_colours_mean_something(pair: tuple[str, str], tmp_path: Path) -> None:
    source, base = pair
    arguments = ["convert", source, "out", "--base", base, "--progress", "none"]
    assert f"{GREEN}yes, read back" in on_terminal(arguments, tmp_path)
    unread = on_terminal([*arguments, "--overwrite", "--no-verify"], tmp_path)
    assert f"{YELLOW}NOT VERIFIED: the output was not read back" in unread
    assert f"{RED}error:" in on_terminal(["inspect", "nope"], tmp_path)
    warned = ["convert", source, "o", "--base", base, "--allow", "x", "--progress", "none"]
    assert f"{YELLOW}warning:" in on_terminal(warned, tmp_path)
    assert f"{GREEN}yes, all 1" in on_terminal(["inspect", source, "-b", base], tmp_path)


@pytest.mark.parametrize("off", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colours_are_off_where_nobody_wants_them(
    pair: tuple[str, str], tmp_path: Path, off: dict[str, str]
) -> None:
    arguments = ["convert", pair[0], "out", "--base", pair[1], "--progress", "none"]
    shown = on_terminal(arguments, tmp_path, **off)
    assert "verified   yes, read back" in shown
    assert "\x1b" not in shown


def test_a_pipe_has_no_colours_and_nothing_to_do_next(
    pair: tuple[str, str], tmp_path: Path, capsys: Shown
) -> None:
    assert run(command, ["convert", pair[0], str(tmp_path / "out"), "--base", pair[1]]) == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert "next" not in shown.out


def test_what_to_do_next_is_said_on_a_terminal(pair: tuple[str, str], tmp_path: Path) -> None:
    shown = on_terminal(["convert", pair[0], "my out", "--base", pair[1]], tmp_path)
    assert f"next   try it    reshard try 'my out' --compare {pair[1]}\n" in shown
    assert shown.endswith("next   serve it  vllm serve 'my out'\n")
    for arguments in (
        ["convert", pair[0], "dcp", "--to", "dcp"],
        ["convert", pair[0], "dry", "--base", pair[1], "--dry-run"],
    ):
        assert "next   " not in on_terminal(arguments, tmp_path)


def test_the_command_that_inspect_names_converts(pair: tuple[str, str], tmp_path: Path) -> None:
    shown = on_terminal(["inspect", pair[0], "--base", pair[1]], tmp_path)
    line = shown.splitlines()[-1]
    assert line == f"next   reshard convert {pair[0]} OUT --base {pair[1]}"
    assert run(command, line.replace("OUT", str(tmp_path / "o")).split()[2:]) == 0


def test_names_are_never_cut(tmp_path: Path) -> None:
    source = model(tmp_path / "a", name=LONG)
    shown = on_terminal(["inspect", str(source), "--tensors"], tmp_path, NO_COLOR="1")
    row = next(line for line in shown.splitlines() if line.startswith(LONG))
    assert row.split() == [LONG, "[3,", "2]", "24", "B"]
    assert "All of them: float32, parameter." in shown
    other = model(tmp_path / "b", 2, LONG)
    assert LONG in on_terminal(["diff", str(source), str(other)], tmp_path)
    deep = tmp_path.joinpath(*(["a-folder-with-a-name"] * 5))
    deep.parent.mkdir(parents=True)
    model(deep)
    assert str(deep) in on_terminal(["inspect", str(deep)], tmp_path)


def test_sizes_line_up_to_the_right(tmp_path: Path, capsys: Shown) -> None:
    tensors = {"a": np.zeros(2, np.float32), "b": np.zeros(20000, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert run(command, ["inspect", str(tmp_path), "--tensors"]) == 0
    rows = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(rows) if line.startswith("name"))
    ends = [re.search(r"(size| k?B)\b", row) for row in rows[first : first + 3]]
    assert len({found.end() for found in ends if found}) == 1
    assert all(ends)


def test_a_log_has_a_line_at_the_start_and_one_each_half_minute(capsys: Shown) -> None:
    now = 0.0
    lines = Lines(lambda: now)
    for second in range(0, 91, 5):
        now = float(second)
        lines("write", second * 10**9, 140 * 10**9)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "reshard: writing 140 GB",
        "reshard: writing 30 GB of 140 GB, 1 GB/s, 110 s left",
        "reshard: writing 60 GB of 140 GB, 1 GB/s, 80 s left",
        "reshard: writing 90 GB of 140 GB, 1 GB/s, 50 s left",
    ]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "reshard: writing 24 B\n"),
        (["--progress", "plain"], "reshard: writing 24 B\n"),
        (["--progress", "none"], ""),
        (["--quiet"], ""),
        (["-q", "--progress", "plain"], "reshard: writing 24 B\n"),
        (["--json"], ""),
    ],
)
def test_progress_without_a_terminal(
    pair: tuple[str, str], tmp_path: Path, capsys: Shown, flags: list[str], said: str
) -> None:
    arguments = ["convert", pair[0], str(tmp_path / "out"), "--base", pair[1], *flags]
    assert run(command, arguments) == 0
    shown = capsys.readouterr()
    assert shown.err == said
    assert bool(shown.out) == (not {"-q", "--quiet"} & {*flags})


def test_a_bar_can_be_asked_for(capsys: Shown) -> None:
    with shown_progress("bar") as step:
        assert step is not None
        step("write", 5, 10)
    assert "writing" in capsys.readouterr().err


def test_quiet_says_errors_and_nothing_else(
    pair: tuple[str, str], tmp_path: Path, capsys: Shown
) -> None:
    out = str(tmp_path / "out")
    assert run(command, ["convert", pair[0], out, "-q", "--base", pair[1]]) == 0
    assert run(command, ["verify", out, "-q"]) == 0
    assert run(command, ["diff", out, pair[1], "-q"]) == 1
    assert run(command, ["doctor", pair[0], "-q", "-b", pair[1]]) in (0, 1)
    assert capsys.readouterr() == ("", "")
    assert run(command, ["convert", "nope", f"{out}2", "-q"]) == 1
    assert capsys.readouterr().err.startswith("error: nope: ")


def test_a_dry_run_says_what_it_would_do(
    pair: tuple[str, str], tmp_path: Path, capsys: Shown
) -> None:
    arguments = ["convert", pair[0], str(tmp_path / "out"), "-b", pair[1], "-n"]
    assert run(command, arguments) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^would read +24 B$", shown, re.MULTILINE)
    assert re.search(r"^would write +120 B$", shown, re.MULTILINE)
    assert re.search(rf"^free +[\d.]+ .?B at {tmp_path}$", shown, re.MULTILINE)


def test_a_report_prints_as_the_command_line_shows_it(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    report = reshard.convert(pair[0], tmp_path / "out", base=pair[1])
    assert re.search(r"^verified +yes, read back$", str(report), re.MULTILINE)
    assert repr(report).endswith("1 tensors, 120 B, verified, 0 finding(s)>")
    checkpoint = reshard.open(pair[0])
    assert repr(checkpoint.tensors["w"]) == "<Tensor 'w': float32 (3, 2), parameter>"
    assert repr(checkpoint.tensors) == "<1 tensors>"
    assert "1 differ>" in repr(reshard.diff(*pair))
    assert "Hugging Face model" in str(reshard.inspect(pair[0]))


def test_a_name_that_is_not_there_is_told_its_neighbours(tmp_path: Path) -> None:
    checkpoint = reshard.open(model(tmp_path / "m", name="lm_head.weight"))
    with pytest.raises(KeyError, match=r"lm_hed.weight' \(nearest: lm_head.weight\)"):
        checkpoint.tensors["lm_hed.weight"]
    with pytest.raises(KeyError, match=r"^'zzz'$"):
        checkpoint.tensors["zzz"]
    assert "lm_hed.weight" not in checkpoint.tensors
    assert checkpoint.tensors.get("lm_hed.weight") is None


def test_dir_lists_what_is_public() -> None:
    assert dir(reshard) == sorted(reshard.__all__)
