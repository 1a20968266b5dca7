"""`reshard help TOPIC`: every kind of error, every finding and every page is explained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reshard.cli.app import reshard as command
from reshard.cli.app import run
from reshard.cli.topics import classes, pages, text, topics
from reshard.core.findings import CODES
from reshard.core.options import GROUPS
from tests.oracle.cache import Oracle

Shown = pytest.CaptureFixture[str]


@pytest.mark.parametrize("name", classes())
def test_every_kind_of_error_leads_to_its_section(name: str, capsys: Shown) -> None:
    assert run(command, ["help", name]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("## ")
    assert f"`{name}`" in shown
    assert shown.count("\n## ") == 0


@pytest.mark.parametrize("name", CODES)
def test_every_finding_is_explained(name: str) -> None:
    shown = text(name)
    assert shown is not None
    assert CODES[name].meaning in shown
    assert CODES[name].fix in shown


def test_every_page_is_there() -> None:
    assert {"names", "convert", "watch", "formats/dcp"} <= pages().keys()
    for name, path in pages().items():
        assert text(name) is not None, name
        assert path.read_text(encoding="utf-8").startswith("# ")
    assert text("dcp") == text("formats/dcp") == text("docs/formats/dcp.md")


@pytest.mark.parametrize(
    ("topic", "words"),
    [
        ("convert", " convert SRC DST --base MODEL [OPTIONS]"),
        ("namesERROR", "## Names"),
        ("not found", "## Not found"),
        ("not-finite", "--strict not-finite"),
        ("names", "# "),
    ],
)
def test_topics_of_each_kind(topic: str, words: str, capsys: Shown) -> None:
    assert run(command, ["help", topic]) == 0
    assert words in capsys.readouterr().out


def test_all_topics_are_listed(capsys: Shown) -> None:
    assert run(command, ["help", "topics"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for names in topics().values() for name in names)


def test_what_is_unknown_names_what_is_near(capsys: Shown) -> None:
    assert run(command, ["help", "not-finit"]) == 2
    assert "No such topic 'not-finit'. Did you mean not-finite" in capsys.readouterr().err
    assert run(command, ["help", "zzzzzz"]) == 2
    assert "All of them: reshard help topics" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "page"), [("LoRA", "adapters"), ("vllm", "serving"), ("tokenizer", "doctor")]
)
def test_words_name_the_pages_that_say_them(words: str, page: str, capsys: Shown) -> None:
    assert run(command, ["help", words]) == 2
    told = capsys.readouterr().err.partition("Pages that speak of it: ")[2]
    assert page in told


def test_the_most_used_options_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, ["convert", "--help"]) == 0
    titles = re.findall(r"^([A-Z][\w ]+):$", capsys.readouterr().out, re.MULTILINE)
    known = [title for title in titles if title in GROUPS]
    assert known == list(GROUPS)
    assert titles[0] == "Arguments"


def test_a_save_is_named_by_its_step(
    oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = oracle["two-tags"].root
    assert run(command, ["inspect", str(root), "--step", "1"]) == 0
    assert "tag global_step1" in capsys.readouterr().out
