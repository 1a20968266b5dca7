"""The page, in a real browser: headless Chromium lays it out, and a probe script measures it."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest

from reshard.core.findings import Finding
from reshard.evaluate.page import render_page
from reshard.evaluate.plots import axis, strip
from reshard.evaluate.report import Answer, Failure, TryReport
from tests.browser import browse, needs_browser
from tests.evaluate.conftest import Models
from tests.evaluate.trying import attempt

# Put behind the page: what it finds becomes an attribute of <body>, which --dump-dom prints.
PROBE = """<script>
const inside = (outer, inner) => { const a = outer.getBoundingClientRect(),
  b = inner.getBoundingClientRect();
  return b.left >= a.left - 1 && b.right <= a.right + 1 && b.top >= a.top - 1
    && b.bottom <= a.bottom + 1; };
const marks = [...document.querySelectorAll("svg circle, svg text, svg line")];
document.body.setAttribute("data-probe", JSON.stringify({
  width: document.documentElement.scrollWidth, window: innerWidth,
  requests: performance.getEntriesByType("resource").length,
  status: document.querySelector("#status").innerText,
  sections: [...document.querySelectorAll("section")].map(s => s.id),
  dots: document.querySelectorAll("svg circle").length,
  marksInside: marks.every(mark => inside(mark.closest("svg"), mark)),
  visible: [...document.querySelectorAll("section")].every(s => s.offsetHeight > 20),
  text: document.body.innerText,
  alert: window.alerted === true,
}));
</script>"""


def probe(page: str, tmp_path: Path, width: int = 1000) -> dict[str, Any]:
    path = tmp_path / "probed.html"
    path.write_text(page.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    dom = browse(path, tmp_path, f"--window-size={width},900", "--dump-dom")
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found is not None, dom[:2000]
    measured: dict[str, Any] = json.loads(html.unescape(found[1]))
    return measured


@pytest.fixture(scope="module")
def full(models: Models, tmp_path_factory: pytest.TempPathFactory) -> tuple[TryReport, str]:
    """A report with everything in it, and its page."""
    tmp_path = tmp_path_factory.mktemp("page")
    page = tmp_path / "page.html"
    report = attempt(
        models("causal"),
        tmp_path,
        benchmark=True,
        benchmark_samples=3,
        batch_sizes=(1, 2),
        compare=models("other"),
        html=page,
    )
    return report, page.read_text(encoding="utf-8")


@needs_browser
@pytest.mark.parametrize("width", [1000, 500])
def test_the_page_in_a_browser(full: tuple[TryReport, str], tmp_path: Path, width: int) -> None:
    report, page = full
    found = probe(page, tmp_path, width)
    assert found["window"] == width
    assert found["width"] <= width, "the page must not scroll sideways"
    assert found["requests"] == 0
    assert found["status"] == "passed"
    assert found["visible"]
    assert found["sections"] == ["model", "answers", "comparison", "benchmark", "findings", "run"]
    # Five figures on a CPU, six on a GPU: three dots for each of two batch sizes.
    assert found["dots"] in (5 * 6, 6 * 6)
    assert found["marksInside"]
    for answer in report.answers:
        assert answer.prompt in found["text"]
    assert "another model" in found["text"]
    assert not re.search(r"\d\.\d{7}", found["text"]), "a number with all its digits"
    assert "vectors-constant" in found["text"]


@needs_browser
def test_the_page_is_drawn(full: tuple[TryReport, str], tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "page.html"
    path.write_text(full[1], encoding="utf-8")
    shot = tmp_path / "shot.png"
    browse(path, tmp_path, "--window-size=1000,1600", f"--screenshot={shot}")
    with Image.open(shot) as image:
        colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert colours is not None
    found = {colour: count for count, colour in colours}
    # The page, its cards and its ink; the accent that the plots are drawn in.
    for colour in ((0xF6, 0xF6, 0xF4), (0xFF, 0xFF, 0xFF), (0x1D, 0x1F, 0x21), (0x25, 0x63, 0xA8)):
        assert found.get(colour, 0) > 20, colour


@needs_browser
def test_what_a_model_says_is_text_and_never_runs(tmp_path: Path) -> None:
    evil = "<script>window.alerted = true</script><img src=x onerror='window.alerted = true'>"
    report = TryReport(
        model_path=evil,
        answers=[Answer(evil, evil, evil, 1, (1,), "stop", 1.0)],
        findings=[Finding("weights-constant", evil, evidence={evil: evil})],
        failures=[Failure(evil, evil, evil, evil)],
    )
    found = probe(render_page(report), tmp_path)
    assert not found["alert"]
    assert evil in found["text"]


@needs_browser
def test_the_page_of_a_failure(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    attempt(tmp_path / "nowhere", tmp_path, html=page)
    found = probe(page.read_text(encoding="utf-8"), tmp_path)
    assert found["status"] == "failed"
    assert found["sections"] == ["failures", "findings", "run"]
    assert "there is no such model folder" in found["text"]


@needs_browser
def test_the_page_of_scores(models: Models, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    attempt(models("srm_vl"), tmp_path, html=page, benchmark=True, compare=models("srm_vl"))
    found = probe(page.read_text(encoding="utf-8"), tmp_path)
    assert found["sections"] == ["model", "scores", "comparison", "benchmark", "findings", "run"]
    assert "alignment" in found["text"]
    assert found["marksInside"]


class _Outside(html.parser.HTMLParser):
    """Collects everything that a page would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object", "embed", "base"):
            self.found.append(tag)
        self.found += [name for name, _ in attrs if name in ("src", "href", "srcset")]


def test_the_page_stands_alone(full: tuple[TryReport, str]) -> None:
    parser = _Outside()
    parser.feed(full[1])
    assert parser.found == []
    style = re.findall(r"<style>(.*?)</style>", full[1], re.DOTALL)[0]
    assert "url(" not in style
    assert "@import" not in style


@pytest.mark.parametrize("largest", [0.0, 1e-7, 0.31, 1.0, 7.3, 99.9, 100.0, 12345.0, 3e12])
def test_an_axis_has_round_steps_up_to_the_largest(largest: float) -> None:
    ticks = axis(largest)
    assert ticks[0] == 0
    assert ticks[-1] >= largest * (1 - 1e-9)
    assert 2 <= len(ticks) <= 6
    step = ticks[1]
    assert ticks == pytest.approx([step * index for index in range(len(ticks))])


def test_marks_lie_in_proportion() -> None:
    plot = strip("t", "s", [("one", [1.0, 2.0, 3.0]), ("two", [4.0])])
    zero, full_scale = plot.ticks[0].x, plot.ticks[-1].x
    assert (zero, full_scale) == (plot.left, plot.right)
    first, second = plot.rows
    assert first.median.x - zero == pytest.approx((second.median.x - zero) / 2, abs=0.1)
    assert [dot.words for dot in first.dots] == ["1 s", "2 s", "3 s"]
    assert first.y < second.y < plot.base < plot.height
