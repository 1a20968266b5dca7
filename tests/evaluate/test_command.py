"""The command line: both doors, both spellings, exit codes, streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from reshard.cli.app import reshard, run
from reshard.cli.flags import repeat_flags
from reshard.cli.lightrft.test_model import command
from reshard.cli.try_ import try_model
from reshard.evaluate.options import Options
from reshard.evaluate.progress import Event
from reshard.evaluate.report import Answer, TryReport
from reshard.evaluate.terminal import Terminal
from tests.evaluate import tiny
from tests.evaluate.conftest import Models
from tests.evaluate.test_report import DOCS, ROOT

FAST = ["--max_new_tokens", "4"]
pytestmark = pytest.mark.usefixtures("in_tmp_path")


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def report(path: str = "test_results.json") -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return raw


def test_the_users_command_runs_verbatim(models: Models, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "lightrft/utils/ckpt_scripts/test_model.py"),
            *("--model_path", str(models("causal"))),
            *("--test_prompts", "Write a Python function.", "Say “hello” in 中文."),
            *("--max_new_tokens", "12", "--benchmark", "--output_file", "test_results.json"),
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    found = report(str(tmp_path / "test_results.json"))
    assert [a["prompt"] for a in found["answers"]] == [
        "Write a Python function.",
        "Say “hello” in 中文.",
    ]
    assert len(found["benchmark"]["batches"][0]["samples"]) == 5
    for words in ("Say “hello” in 中文.", "benchmark: 12 new tokens", "passed in"):
        assert words in done.stdout
    if not torch.cuda.is_available():
        assert "There is no CUDA device; going on with the CPU." in done.stdout
    # No bar where standard error is no terminal.
    assert "look at the weights" not in done.stderr


def test_both_doors_give_the_same_report(models: Models) -> None:
    folder = str(models("causal"))
    same = ["--device", "cpu", "--benchmark_samples", "2", "--seed", "3", *FAST]
    assert run(command, ["--model_path", folder, "--test_prompts", "a", "b", *same]) == 0
    one = report()
    dashed = [flag.replace("_", "-") if flag.startswith("--") else flag for flag in same]
    assert run(reshard, ["try", folder, "--test-prompts", "a", "b", *dashed]) == 0
    other = report()
    assert one["options"] == other["options"]
    assert [a["token_ids"] for a in one["answers"]] == [a["token_ids"] for a in other["answers"]]
    assert one["environment"] == other["environment"]


def test_the_defaults_are_the_contracts() -> None:
    parameters = {parameter.name: parameter for parameter in command.params}
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert defaults["device"] == "cuda"
    assert defaults["max_new_tokens"] == 256
    assert defaults["benchmark_samples"] == 5
    assert str(defaults["output_file"]) == "test_results.json"
    assert parameters["model"].required


def test_every_option_is_in_both_doors_in_both_spellings() -> None:
    options = {flag for parameter in command.params for flag in parameter.opts}
    assert {flag.replace("_", "-") for flag in options} | options == options
    tried = {flag for parameter in try_model.params for flag in parameter.opts}
    assert options - tried == {"--model_path", "--model-path"}


def test_every_option_is_documented() -> None:
    for parameter in command.params:
        flag = parameter.opts[0].replace("_", "-")
        if parameter.name != "model":
            assert f"`{flag}" in DOCS, flag


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (["--p", "a", "b", "--n", "1"], ["--p", "a", "--p", "b", "--n", "1"]),
        (["m", "--p", "a"], ["m", "--p", "a"]),
        (["--p", "a", "--", "b"], ["--p", "a", "--", "b"]),
        (["--p=a", "b"], ["--p=a", "b"]),
        (["--n", "1", "m"], ["--n", "1", "m"]),
        (["--p", "-", "a"], ["--p", "-", "--p", "a"]),
        ([], []),
    ],
)
def test_values_after_one_flag(given: list[str], written: list[str]) -> None:
    assert repeat_flags(given, {"--p"}) == written


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--benchmark_samples", "0"],
        ["--max_new_tokens", "none"],
        ["--dtype", "int4"],
        ["--image", "nowhere.png"],
        ["--output_file", "no/such/folder/report.json"],
        ["--html", "no/such/folder/page.html"],
        ["--temperature", "0", "--top_p", "0.5"],
        ["--no_such_flag"],
    ],
)
def test_wrong_usage_is_2(models: Models, arguments: list[str]) -> None:
    given = ["--model_path", str(models("causal")), *arguments] if arguments else []
    assert run(command, given) == 2


def test_a_failure_is_1_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(reshard, ["try", "nowhere"]) == 1
    assert "error: nowhere: there is no such model folder." in capsys.readouterr().err
    assert not Path("test_results.json").exists()
    Path("empty").mkdir()
    assert run(reshard, ["try", "empty"]) == 1
    assert "failed to read the folder: empty: the folder has no" in capsys.readouterr().out
    assert report()["status"] == "failed"


DOORS = [(reshard, ["try"]), (command, ["--model_path"])]


@pytest.mark.parametrize(("door", "start"), DOORS, ids=["try", "test_model"])
def test_a_wrong_path_writes_nothing(
    models: Models, door: click.Command, start: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = Path("test_results.json")
    for text in ("precious", TryReport(model_path="other").to_json()):
        earlier.write_text(json.dumps(text), encoding="utf-8")
        assert run(door, [*start, "nope"]) == 1
        assert run(door, [*start, str(models("causal")), "--compare", "nope"]) == 1
        assert "nope: there is no such model folder" in capsys.readouterr().err
        assert json.loads(earlier.read_text("utf-8")) == text
    assert [path.name for path in Path().iterdir()] == ["test_results.json"]


@pytest.mark.parametrize(("door", "start"), DOORS, ids=["try", "test_model"])
@pytest.mark.parametrize("flag", ["--output_file", "--html"])
@pytest.mark.parametrize("text", ["precious", "{}", '["x"]', "<html></html>", "\0\1"])
def test_a_file_that_is_not_a_report_is_never_replaced(
    door: click.Command,
    start: list[str],
    flag: str,
    text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("empty").mkdir()
    Path("mine").write_text(text, encoding="utf-8")
    assert run(door, [*start, "empty", flag, "mine"]) == 1
    assert "mine: this file is not a" in capsys.readouterr().err
    assert Path("mine").read_text("utf-8") == text
    assert run(door, [*start, "empty", "--output_file", "new", "--html", "new"]) == 2


def test_reports_of_other_models_stay(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        Path(name).mkdir()
    Path("test_results-3.json").write_text("precious", encoding="utf-8")
    for model, name in (("one", ""), ("two", "-2"), ("one", ""), ("./two/", "-2")):
        assert run(reshard, ["try", model]) == 1
        shown = capsys.readouterr()
        assert f"report: test_results{name}.json" in shown.out
    assert "held the report of an earlier run ('two', '20" in shown.err
    assert report()["model_path"] == "one"
    Path("three").mkdir()
    assert run(reshard, ["try", "three"]) == 1
    assert report("test_results-4.json")["model_path"] == "three"
    assert Path("test_results-3.json").read_text("utf-8") == "precious"
    assert run(command, ["--model_path", "two", "--html", "page.html"]) == 1  # as LightRFT's does
    assert report()["model_path"] == "two"
    assert run(command, ["--model_path", "two", "--html", "page.html"]) == 1


def test_a_report_into_a_link_and_a_device() -> None:
    Path("empty").mkdir()
    Path("link.json").symlink_to("real.json")
    assert run(reshard, ["try", "empty", "--output-file", "link.json"]) == 1
    assert Path("link.json").is_symlink()
    assert report("real.json")["status"] == "failed"
    assert run(reshard, ["try", "empty", "--output-file", os.devnull]) == 1
    assert Path(os.devnull).is_char_device()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"do_sample": False, "temperature": None}),
        (["--temperature", "0"], {"do_sample": False, "temperature": None}),
        (["--temperature", "0.7"], {"do_sample": True, "temperature": 0.7}),
        (["--top_p", "0.9"], {"do_sample": True, "top_p": 0.9}),
        (["--top-k", "5", "--repetition-penalty", "1.1"],
         {"do_sample": True, "top_k": 5, "repetition_penalty": 1.1}),
        (["--do_sample"], {"do_sample": True}),
    ],
)  # fmt: skip
def test_sampling_options(models: Models, arguments: list[str], expected: dict[str, Any]) -> None:
    folder = str(models("causal"))
    assert run(reshard, ["try", folder, "--device", "cpu", *FAST, *arguments]) == 0
    generation = report()["generation"]
    assert {name: generation[name] for name in expected} == expected


def test_images_after_one_flag_and_the_page(models: Models) -> None:
    pictures = [str(tiny.image(Path(name))) for name in ("one.png", "two.png")]
    arguments = ["--image", *pictures, "--test_prompts", "What?", "--html", "page.html", *FAST]
    assert run(reshard, ["try", str(models("llava")), "--device", "cpu", *arguments]) == 0
    assert report()["options"]["images"] == pictures
    assert Path("page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_an_interrupt_is_130_and_leaves_the_report(
    models: Models, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import reshard.evaluate.run as flow

    def interrupt(*arguments: object, **named: object) -> TryReport:
        raise KeyboardInterrupt

    monkeypatch.setattr(flow, "benchmark", interrupt)
    given = ["try", str(models("causal")), "--device", "cpu", "--benchmark", *FAST]
    assert run(reshard, given) == 130
    assert "test_results.json holds what was done" in capsys.readouterr().err
    found = report()
    assert found["status"] == "interrupted"
    assert len(found["answers"]) == 3


def test_control_characters_of_a_model_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = "fine\n\x1b]0;title\x07 \x9b2J 👩\u200d💻"
    answer = Answer("\x1b[31mp", "r", said, 1, (1,), "stop", 1.0)
    with Terminal() as terminal:
        terminal.listen(Event("answer", 1, 1, answer))
    printed = capsys.readouterr().out
    assert "fine\n�]0;title� �2J 👩\u200d💻" in printed
    assert "\x07" not in printed
    assert "> �[31mp" in printed


def test_options_are_the_fields_of_the_report(models: Models) -> None:
    assert run(reshard, ["try", str(models("causal")), "--device", "cpu", *FAST]) == 0
    assert report()["options"].keys() == set(Options.__slots__)


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from reshard.cli.app import run, reshard; "
        "run(reshard, ['try', '--help']); sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--trust_remote_code" in done.stdout
