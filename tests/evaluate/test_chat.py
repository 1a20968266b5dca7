"""Answers as they are written, and a conversation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reshard
from reshard.cli.app import reshard as command
from reshard.cli.app import run
from reshard.evaluate.chat import converse
from reshard.evaluate.options import Options
from reshard.evaluate.progress import Event
from reshard.evaluate.run import run as run_model
from reshard.evaluate.streaming import Spoken
from tests.cli.test_terminal import on_terminal
from tests.evaluate import tiny
from tests.evaluate.conftest import Models
from tests.evaluate.test_report import ROOT

TOKENIZER = tiny.tokenizer("<|im_end|>")


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=12), st.lists(st.integers(1, 3), max_size=30))
def test_the_pieces_make_the_text(text: str, sizes: list[int]) -> None:
    """Whatever the tokens are cut into: one token a byte, so that most characters need several."""
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    spoken, pieces = Spoken(TOKENIZER), []
    while ids:
        size = sizes.pop() if sizes else 1
        pieces.append(spoken.add(ids[:size]))
        ids = ids[size:]
    assert "".join([*pieces, spoken.rest()]) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_a_run_tells_each_answer_as_it_is_written(models: Models, tmp_path: Path) -> None:
    told: dict[str, str] = {}

    def listen(event: Event) -> None:
        if event.text:
            told[event.prompt] = told.get(event.prompt, "") + event.text

    prompts = ("One", "Two")
    place = tmp_path / "report.json"
    options = Options(models("causal"), prompts, device="cpu", max_new_tokens=8, output_file=place)
    report = run_model(options, listen)
    assert [answer.prompt for answer in report.answers] == [*prompts]
    for answer in report.answers:
        assert answer.text
        text = told.get(answer.prompt, "")
        assert answer.text.startswith(text)
        # Bytes of a random model that are no character are told at the end.
        assert len(text) > 0 or answer.text.startswith("\ufffd")


def test_a_terminal_shows_each_answer_once(models: Models, tmp_path: Path) -> None:
    flags = ["--test_prompts", "Hello", "--max_new_tokens", "6", "--output_file", "r.json"]
    shown = on_terminal(["try", str(models("causal")), *flags], tmp_path)
    assert shown.count("> Hello") == 1
    assert "6 tokens" in shown
    assert "Traceback" not in shown


def conversation(folder: Path, lines: Sequence[str]) -> list[str]:
    """The answers to some lines."""
    given, said = iter(lines), [""]

    def say(piece: str) -> None:
        said[-1] += piece
        if piece.endswith("\n"):
            said.append("")

    options = Options(model=folder, device="cpu", max_new_tokens=5)
    assert converse(options, lambda: next(given, None), say) == sum(x != "/new" for x in lines)
    return said[:-1]


def test_a_conversation_keeps_its_turns(models: Models) -> None:
    """What is asked again is another question; after /new it is the same one."""
    folder = models("causal")
    alone = conversation(folder, ["Hello"])
    assert conversation(folder, ["Hello"]) == alone
    both = conversation(folder, ["Hello", "And then?"])
    anew = conversation(folder, ["And then?", "/new", "Hello"])
    assert both[: len(alone)] == alone
    assert "".join(anew).endswith("".join(alone))


def test_a_conversation_is_taken_from_standard_input(models: Models, tmp_path: Path) -> None:
    arguments = ["try", str(models("causal")), "--chat", "--device", "cpu", "--max_new_tokens", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "reshard", *arguments],
        cwd=tmp_path, input="Hello\n" + "\n" * 3000 + "Again\n", capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("\n") >= 2
    assert not (tmp_path / "test_results.json").exists()


def test_what_cannot_be_talked_with(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(reshard.UnsupportedError, match=r"scores, not answers.*Leave out --chat"):
        conversation(models("srm_vl"), [])
    bare = tmp_path / "bare"
    tiny.causal(bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(reshard.UnsupportedError, match="no chat template"):
        conversation(bare, [])
    shutil.copy(models("causal") / "chat_template.jinja", bare)
    assert conversation(bare, ["Hello"])[0]
    place = tmp_path / "report.json"
    scored = Options(models("srm_vl"), ("Hello",), device="cpu", output_file=place)
    assert run_model(scored).scores  # --chat is left out
    folder = str(models("causal"))
    assert run(command, ["try", folder, "--chat", "--benchmark"]) == 2
    assert "--benchmark has no effect with --chat" in capsys.readouterr().err
    assert run(command, ["try", str(tmp_path / "no"), "--chat"]) == 1
