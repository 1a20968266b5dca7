"""Commands in processes of their own: without torch, interrupted, in a terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from reshard.cli.app import reshard, run
from tests.child import until
from tests.cli.test_terminal import on_terminal
from tests.oracle.cache import Oracle, digest_of, kept

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bare(pytestconfig: pytest.Config) -> Path:
    """The Python of an environment with reshard's run-time dependencies and nothing else."""
    assert pytestconfig.cache is not None
    names = ("numpy", "ml_dtypes", "xxhash", "zlib-ng", "msgspec", "click", "rich")
    constraints = ROOT / "constraints.txt"

    def make(folder: Path) -> None:
        venv.create(folder, with_pip=True)
        install = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q"]
        subprocess.run([*install, "-c", str(constraints), *names], check=True)

    cache = pytestconfig.cache.mkdir("bare")
    return kept(cache, digest_of([constraints], names), make) / "bin" / "python"


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), **more}


def test_without_torch_and_deepspeed(oracle: Oracle, tmp_path: Path, bare: Path) -> None:
    """inspect, convert and ds2hf, as a user types them, where neither is installed."""
    check = "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('deepspeed'))"
    found = subprocess.run([bare, "-c", check], check=True, capture_output=True, text=True)
    assert found.stdout.split() == ["None", "None"]
    case = oracle["llama-zero3"]
    script = ROOT / "lightrft" / "utils" / "ckpt_scripts" / "ds2hf.py"
    commands = {
        "door": [str(script), "--checkpoint_dir", str(case.last.path), "--output_dir",
                 str(tmp_path / "door"), "--hf_base", str(case.base)],
        "convert": ["-m", "reshard", "convert", str(case.root), str(tmp_path / "convert"),
                    "--to", "hf", "--base", str(case.base)],
        "inspect": ["-m", "reshard", "inspect", str(case.root), "--json"],
    }  # fmt: skip
    for arguments in commands.values():
        done = subprocess.run(
            [bare, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    one, other = (tmp_path / name / "model.safetensors" for name in ("door", "convert"))
    assert one.read_bytes() == other.read_bytes()
    masters = case.last.masters()
    with safe_open(one, "pt") as file:
        assert set(file.keys()) == set(masters)


@pytest.mark.heavy
def test_importing_reshard_is_quick_and_brings_no_torch(bare: Path) -> None:
    code = (
        "import sys, time; began = time.process_time(); import reshard; "
        "took = time.process_time() - began; "
        "print(took, sorted(m for m in sys.modules if m in ('torch', 'numpy', 'rich')))"
    )
    runs = [
        subprocess.run([bare, "-c", code], env=environment(), capture_output=True, text=True)
        for _ in range(3)
    ]
    assert all(run.stdout.endswith("[]\n") for run in runs), runs
    assert min(float(run.stdout.split()[0]) for run in runs) < 0.2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_conversion_leaves_nothing(
    oracle: Oracle, tmp_path: Path, number: signal.Signals
) -> None:
    """A conversion slowed down to seconds is interrupted in its midst: exit code 130."""
    code = (
        "import signal, sys, time, reshard.transfer.making as e; fill = e.fill\n"
        # A shell's background jobs, and what they start, may ignore these.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "def slow(*a):\n    time.sleep(0.3); return fill(*a)\n"
        "e.fill = slow\n"
        "from reshard.cli.app import main\nmain()"
    )
    source = str(oracle["llama-zero2"].root)
    process = subprocess.Popen(
        [sys.executable, "-c", code, "convert", source, str(tmp_path / "deep" / "out")],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: list(tmp_path.glob("deep/.out.partial-*/tmp/*")), process, seconds=60)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Interrupted" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_does_not_stand_in_the_way(oracle: Oracle, tmp_path: Path) -> None:
    code = (
        "import os, reshard.transfer.commit as c\n"
        "c.OutputFolder.commit = lambda self: os.kill(os.getpid(), 9)\n"
        "from reshard.cli.app import main\nmain()"
    )
    source = str(oracle["llama-zero2"].root)
    arguments = ["convert", source, str(tmp_path / "out")]
    killed = subprocess.run([sys.executable, "-c", code, *arguments], env=environment())
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == 2  # the lock's file, and what was written
    assert run(reshard, arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


STEERING = "a\x1b]0;title\x07\r[/b] \x9b31m"


def steering_model(folder: Path) -> Path:
    """A model folder, and a tensor in it, whose names would steer a terminal."""
    model = folder / os.fsdecode(b"caf\xe9 \x1b[31m[red]")
    model.mkdir()
    save_file({STEERING: np.zeros(2, np.float32)}, model / "model.safetensors")
    (model / "config.json").write_text('{"architectures": ["a\\u001b[31m"]}')
    return model


@pytest.mark.heavy
@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "{}", "--tensors"],
        ["inspect", "{}", "--tensors", "--json"],
        ["convert", "{}", "out"],
        ["convert", "{}", "out", "--json"],
        ["convert", "{}", "{}/model.safetensors/x"],
        ["convert", "{}", "out", "--base", "{}", "--allow-unchanged"],
        ["diff", "{}", "other"],
        ["diff", "{}", "{}"],
        ["verify", "other", "--against", "{}"],
        ["doctor", "{}"],
        ["doctor", "{}", "--json"],
    ],
    ids=" ".join,
)
def test_names_cannot_steer_the_terminal(tmp_path: Path, arguments: list[str]) -> None:
    model = steering_model(tmp_path)
    (tmp_path / "other").mkdir()
    save_file({"b": np.zeros(2, np.float32)}, tmp_path / "other" / "model.safetensors")
    given = [argument.format(model) for argument in arguments]
    shown = on_terminal(given, tmp_path, TERM="dumb", COLUMNS="200")
    assert "Traceback" not in shown
    assert all(c.isprintable() or c == "\n" for c in unstyled(shown)), shown
    if "--json" in arguments:
        assert isinstance(json.loads(shown), dict)


def unstyled(shown: str) -> str:
    """Without what the table's own borders and bold type take."""
    return re.sub(r"\x1b\[[0-9;]*m", "", shown) if "─" in shown or "━" in shown else shown


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["inspect", "nope"], 1, {"class": "NotFoundError", "path": "nope"}),
        (["convert", "nope", "out"], 1, {"class": "NotFoundError", "path": "nope"}),
        (["convert", "a", "b", "--allow", "x"], 2, {"class": "OptionError", "option": "allow"}),
        (["diff", "a"], 2, {"class": "UsageError", "message": "Missing argument 'B'."}),
        (["doctor", "nope"], 1, {"class": "NotFoundError", "path": "nope"}),
        (["verify", "nope"], 1, {"class": "NotFoundError", "path": "nope"}),
    ],
)
def test_an_error_is_an_object_with_json(
    arguments: list[str],
    code: int,
    error: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(reshard, [*arguments, "--json"]) == code
    shown = capsys.readouterr()
    assert json.loads(shown.out)["error"].items() >= error.items()
    assert json.loads(shown.out)["error"]["message"]
    assert shown.err
    assert run(reshard, arguments) == code
    assert capsys.readouterr().out == ""
