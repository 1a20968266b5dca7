"""The page of `reshard diff`, in a real browser."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import reshard
from reshard.cli.app import reshard as command
from reshard.cli.app import run
from reshard.comparison.steps import diff_steps
from reshard.pages.changes import changes_page
from reshard.pages.page import check_place
from tests.browser import browse, needs_browser, probed

pytestmark = pytest.mark.heavy

Array = np.ndarray[Any, np.dtype[np.float32]]
EVIL = "<img src=x onerror='window.alerted=true'><script>window.alerted=true</script>\"'`\u202e"
HOSTILE = {
    f"model.layers.0.{EVIL}.weight": 2,
    f"{EVIL}": 3,
    f"model.layers.1.{EVIL}.weight": 2,
    "javascript:window.alerted=true": 1,
}


def save(folder: Path, step: float, more: dict[str, Array] | None = None) -> Path:
    """Three layers: the first is the same at every step, the others move, the last most."""
    tensors: dict[str, Array] = {"model.norm.weight": np.ones(4, np.float32)}
    for layer in range(12):
        for at, module in enumerate(("attn.q", "mlp.up")):
            moved = layer * step * (1 + at) * 1e-3
            tensors[f"model.layers.{layer}.{module}.weight"] = np.full(
                (4, 6), 1 + moved, np.float32
            )
    tensors |= more or {}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def page(tmp_path: Path) -> str:
    """The page of two checkpoints with every kind of difference."""
    extra = {"head.weight": np.ones(3, np.float32), "gone": np.ones(1, np.float32)}
    one = save(tmp_path / "one", 0, extra)
    two = save(tmp_path / "two", 1, {"head.weight": np.ones(4, np.float32)})
    return changes_page([reshard.diff(one, two, spectrum=True)])


LAYOUT = """
const cells = [...document.querySelectorAll("table.map a")];
const found = {
  width: document.documentElement.scrollWidth, faults,
  requests: performance.getEntriesByType("resource").length,
  cells: cells.length, equal: document.querySelectorAll("a.equal").length,
  apart: document.querySelectorAll("a.apart").length,
  colours: new Set(cells.map(a => getComputedStyle(a).backgroundColor)).size,
  broken: cells.filter(a => !document.querySelector(a.getAttribute("href"))).length,
  bars: [...document.querySelectorAll(".bars span")].map(bar => bar.offsetHeight),
  background: getComputedStyle(document.body).backgroundColor,
  small: cells.some(a => a.offsetHeight < 14 || a.offsetWidth < 14),
  rows: document.querySelectorAll("#t0 tbody tr").length,
}
"""


@needs_browser
@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_in_a_browser(page: str, width: int, tmp_path: Path) -> None:
    found = probed(page, LAYOUT, tmp_path, width)
    assert found["faults"] == []
    assert found["requests"] == 0
    assert found["width"] <= width, "the page must not scroll sideways"
    assert (found["rows"], found["cells"]) == (27, 27)
    assert (found["equal"], found["apart"]) == (3, 2)
    assert found["colours"] > 10
    assert found["broken"] == 0
    assert not found["small"]
    assert max(found["bars"]) > 100
    assert found["background"] == "rgb(246, 246, 244)"


@needs_browser
def test_it_is_dark_where_that_is_preferred(page: str, tmp_path: Path) -> None:
    found = probed(page, LAYOUT, tmp_path, 1200, "--blink-settings=preferredColorScheme=0")
    assert found["background"] == "rgb(22, 24, 26)"


CLICKS = """
const names = () => [...document.querySelectorAll("#t0 tbody tr:not([hidden]) td.name")]
  .map(cell => cell.textContent);
const heads = [...document.querySelectorAll("#t0 th button")];
const head = title => heads.find(button => button.textContent === title);
const found = { faults, first: names() };
head("change").click(); found.most = names()[0]; head("change").click(); found.least = names();
found.sorted = head("change").closest("th").getAttribute("aria-sort");
head("tensor").click(); found.named = names(); head("tensor").click(); found.turned = names()[0];
const words = document.querySelector("#s0 input[type=search]");
const filter = text => { words.value = text; words.dispatchEvent(new Event("input")); };
filter("layers.11. UP"); found.filtered = names();
found.told = document.querySelector("#s0 output").textContent;
const cell = [...document.querySelectorAll("table.map a")]
  .find(a => a.title.includes("layers.3.attn"));
cell.click(); found.cleared = names().length; found.hash = location.hash;
found.target = document.querySelector(":target td.name").textContent;
document.querySelector("#s0 input[type=checkbox]").click(); found.without = names().length;
const select = document.querySelector("select"), level = () => cell.style.getPropertyValue("--v");
found.change = level(); select.value = "elements"; select.dispatchEvent(new Event("change"));
found.elements = level();
found.legend = [...document.querySelectorAll("[data-measure]")].filter(l => !l.hidden)
  .map(l => l.dataset.measure);
"""


@needs_browser
def test_the_table_sorts_filters_and_is_led_to(page: str, tmp_path: Path) -> None:
    found = probed(page, CLICKS, tmp_path)
    assert found["faults"] == []
    layers = [f"model.layers.{n}.{m}.weight" for n in range(12) for m in ("attn.q", "mlp.up")]
    assert found["first"] == ["gone", "head.weight", *layers, "model.norm.weight"]
    assert found["most"] == "model.layers.11.mlp.up.weight"
    assert found["sorted"] == "ascending"
    assert found["least"][-1] == "model.layers.11.mlp.up.weight"
    assert found["named"] == found["first"]
    assert found["turned"] == "model.norm.weight"
    assert found["filtered"] == ["model.layers.11.mlp.up.weight"]
    assert found["told"] == "1 of 27 rows"
    assert found["cleared"] == 27
    assert found["target"] == "model.layers.3.attn.q.weight"
    assert found["without"] == 24
    assert found["legend"] == ["elements"]
    assert 0 < float(found["change"]) < float(found["elements"]) == 1


@needs_browser
def test_the_policy_lets_the_pages_own_script_run_and_no_other(page: str, tmp_path: Path) -> None:
    """The page as it is: its script counts the rows; one that is added does nothing."""
    place = tmp_path / "page.html"
    added = "<script>document.title = 'run';</script><img src=x onerror=\"document.title='run'\">"
    place.write_text(page.replace("</body>", f"{added}</body>"), encoding="utf-8")
    dom = browse(place, tmp_path, "--dump-dom")
    assert ">27 rows</output>" in dom
    assert "<title>run</title>" not in dom


@needs_browser
def test_hostile_names_are_text(tmp_path: Path) -> None:
    tensors = {name: np.ones(size, np.float32) for name, size in HOSTILE.items()}
    one = save(tmp_path / "one", 0, tensors)
    two = save(tmp_path / "t<b>wo", 1, {name: value + 1 for name, value in tensors.items()})
    page = changes_page([reshard.diff(one, two)])
    script = """const found = { faults, alerted: window.alerted === true,
      images: document.querySelectorAll("img, iframe, b").length,
      scripts: document.scripts.length, text: document.body.innerText }"""
    found = probed(page, script, tmp_path)
    assert found["faults"] == []
    assert not found["alerted"]
    assert found["images"] == 0
    assert found["scripts"] == 3  # the page's own, and those of the probe
    assert "<img src=x onerror='window.alerted=true'>" in found["text"]
    assert "\u202e" not in page, "a character that turns the direction of text"
    assert "\\u202e" in page


@needs_browser
def test_the_steps_of_a_run(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"checkpoint-{step}", step) for step in (0, 5, 10)]
    page = changes_page(diff_steps(paths))
    script = """const found = { faults, width: document.documentElement.scrollWidth,
      sections: [...document.querySelectorAll("section")].map(s => s.id),
      heads: [...document.querySelectorAll("#over table.map thead th")].map(t => t.textContent),
      broken: [...document.querySelectorAll("#over a")]
        .filter(a => !document.querySelector(a.getAttribute("href"))).length,
      text: document.querySelector("#steps").innerText }"""
    found = probed(page, script, tmp_path)
    assert found["faults"] == []
    assert found["width"] <= 1000
    assert found["sections"] == ["steps", "s0", "s1"]
    assert found["heads"] == ["checkpoint-5", "checkpoint-10"] * 2
    assert found["broken"] == 0
    assert "checkpoint-0 → checkpoint-5" in found["text"]


def test_a_run_is_taken_by_its_steps_and_without_what_is_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a shell lists `RUN/*`: 10 before 5, and the files beside the saves."""
    run_folder = tmp_path / "run"
    for step in (5, 10, 20):
        save(run_folder / f"checkpoint-{step}", step)
    (run_folder / "trainer_state.json").write_text("{}")
    (run_folder / "runs").mkdir()
    listed = sorted(map(str, run_folder.iterdir()))
    out = tmp_path / "page.html"
    assert run(command, ["diff", *listed, "--html", str(out)]) == 1
    shown = capsys.readouterr()
    steps = [line.split()[-3::2] for line in shown.out.splitlines() if " -> " in line][1:]
    assert [[Path(path).name for path in pair] for pair in steps] == [
        ["checkpoint-5", "checkpoint-10"],
        ["checkpoint-10", "checkpoint-20"],
    ]
    assert "left out, since no checkpoint is there: " in shown.err
    assert "trainer_state.json" in shown.err
    assert f"Page: {out}" in shown.out
    assert "checkpoint-10 → checkpoint-20" in out.read_text(encoding="utf-8")
    assert run(command, ["diff", *listed, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [Path(step["second"]).name for step in found["steps"]] == [
        "checkpoint-10",
        "checkpoint-20",
    ]
    named = [listed[0], listed[2], listed[1]]
    assert run(command, ["diff", *named, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [step["second"] for step in found["steps"]] == named[1:]


def test_fewer_than_two_checkpoints_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = str(save(tmp_path / "one", 0))
    (tmp_path / "a.txt").touch()
    assert run(command, ["diff", one, str(tmp_path / "a.txt"), str(tmp_path / "a.txt")]) == 1
    assert "1 of these 3 paths is a checkpoint; diff needs two or more" in capsys.readouterr().err
    with pytest.raises(reshard.OptionError, match="two or more checkpoints"):
        diff_steps([one])


def test_a_file_that_is_no_page_is_never_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = str(save(tmp_path / "one", 0)), str(save(tmp_path / "two", 1))
    place = tmp_path / "thesis.html"
    place.write_text("precious")
    assert run(command, ["diff", one, two, "--html", str(place)]) == 1
    assert "is not a page of reshard, and is not replaced" in capsys.readouterr().err
    assert place.read_text() == "precious"
    other = tmp_path / "page.html"
    for _ in range(2):
        assert run(command, ["diff", one, two, "--html", str(other), "--quiet"]) == 1
    assert capsys.readouterr().out == ""
    assert run(command, ["diff", one, two, "--html", str(tmp_path / "no" / "page.html")]) == 1
    assert "there is no such folder" in capsys.readouterr().err
    with pytest.raises(reshard.WriteError, match=r"this is a folder\. Name a file with --html"):
        check_place(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_page_needs_jinja2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    one = str(save(tmp_path / "one", 0))
    assert run(command, ["diff", one, one, "--html", str(tmp_path / "page.html")]) == 1
    assert "pip install '.[html]'" in capsys.readouterr().err
    assert run(command, ["diff", one, one]) == 0
    monkeypatch.undo()  # the extra is installed
    assert run(command, ["diff", one, one, "--html", str(tmp_path / "page.html")]) == 0
    assert "<html" in (tmp_path / "page.html").read_text("utf-8")


def test_every_file_of_the_pages_is_installed() -> None:
    """hatchling takes what is in the package; the templates name each other by file."""
    data = Path(reshard.__file__).parent / "pages" / "data"
    named = {
        name
        for path in data.glob("*.jinja")
        for name in re.findall(r'(?:extends|import) "([^"]+)"', path.read_text("utf-8"))
    }
    assert named <= {path.name for path in data.iterdir()}
    assert named
