"""What a notebook shows of results and of work that goes on."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

import reshard

EVIL = "<script>alert(1)</script>"


class Tags(HTMLParser):
    """The tags of a text, which must be closed in order, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += f" {data}"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints, of which one tensor's name is hostile."""
    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        tensors = {f"model.layers.{n}.up.weight": np.full(4, value, np.float32) for n in range(3)}
        tensors[EVIL] = np.ones(2, np.float32)
        save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path / "a", tmp_path / "b"


def test_results_show_themselves(folders: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = folders
    results = {
        "checkpoint": reshard.open(one),
        "inspection": reshard.inspect(one),
        "report": reshard.convert(one, tmp_path / "out"),
        "comparison": reshard.diff(one, two),
        "same": reshard.diff(one, one),
    }
    shown = {name: Tags(getattr(result, "_repr_html_")()) for name, result in results.items()}  # noqa: B009
    assert {tag for found in shown.values() for tag in found.seen} <= {
        "div", "b", "table", "thead", "tbody", "tr", "th", "td", "details", "summary",
    }  # fmt: skip
    assert EVIL in shown["checkpoint"].words
    assert "4 tensors" in shown["inspection"].words
    assert "yes, read back" in shown["report"].words
    assert "1 tensors are equal, 3 differ" in shown["comparison"].words
    assert "model.layers.*.up.weight" in shown["comparison"].words
    assert "4 tensors are equal, 0 differ" in shown["same"].words


def test_a_bar_is_updated_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def display(html: str, *, display_id: bool) -> SimpleNamespace:
        told.append(html)
        assert display_id
        return SimpleNamespace(update=told.append)

    module = ModuleType("IPython")
    module.display = SimpleNamespace(HTML=str, display=display)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", module)
    clock = iter([0.0, 0.05, 1.0, 2.0, 2.01])
    bar = reshard.NotebookBar(now=lambda: next(clock))
    for event in (("write", 0, 400), ("write", 50, 400), ("write", 100, 400), ("write", 400, 400)):
        bar(*event)
    assert [re.sub("<.*?> ", "", text) for text in told] == [
        "write: 0 B of 400 B",
        "write: 100 B of 400 B, 100 B/s, 3 s left",
        "write: 400 B of 400 B, 200 B/s",
    ]
    assert 'value="100" max="400"' in told[1]
    bar(7, 7)
    assert "working: 7 B of 7 B" in told[-1]


def test_a_bar_without_a_notebook_is_silent(
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "IPython", None)
    reshard.convert(folders[0], tmp_path / "out", progress=reshard.NotebookBar())
    reshard.diff(*folders, progress=reshard.NotebookBar())
    assert capsys.readouterr() == ("", "")
