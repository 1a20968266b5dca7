"""The page of `reshard inspect`, in a real browser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import reshard
from reshard.cli.app import reshard as command
from reshard.cli.app import run
from reshard.pages.contents import contents_page
from tests.browser import needs_browser, probed
from tests.oracle.cache import Oracle

SCRIPT = """
const text = s => document.querySelector(s).innerText;
document.querySelectorAll("details").forEach(d => { d.open = true; });
const link = [...document.querySelectorAll(".leaf a")]
  .find(a => a.parentElement.parentElement.innerText.startsWith("q_proj"));
document.querySelector("#tensors input").value = "no such";
document.querySelector("#tensors input").dispatchEvent(new Event("input"));
const filtered = document.querySelectorAll("#t tbody tr:not([hidden])").length;
link.click();
const found = {
  faults, filtered, width: document.documentElement.scrollWidth, base: text("#base"),
  summary: text("#summary"), modules: text("#modules"), files: text("#f tbody").split("\\n"),
  target: document.querySelector(":target td.name").textContent,
  rows: document.querySelectorAll("#t tbody tr:not([hidden])").length,
  shares: [...document.querySelectorAll("#t tbody tr:last-child .shares i")].map(i => i.title),
  images: document.querySelectorAll("img").length,
}
"""


@needs_browser
@pytest.mark.parametrize("width", [1100, 500])
def test_a_checkpoint_in_a_browser(oracle: Oracle, width: int, tmp_path: Path) -> None:
    case = oracle["llama-tied-zero3"]
    page = contents_page(reshard.inspect(case.root, base=case.base))
    found = probed(page, SCRIPT, tmp_path, width)
    assert found["faults"] == []
    assert found["width"] <= width
    assert "The names and shapes fit." in found["base"]
    assert "ZeRO-3, 2 ranks" in found["summary"]
    names = reshard.open(case.root).tensors
    assert (found["filtered"], found["rows"]) == (0, len(names))
    assert "tied to model.embed_tokens.weight" in found["modules"]
    assert found["target"].endswith(".q_proj.weight")
    assert [line.split("\t")[-1] for line in found["files"]] == ["50.0 %", "50.0 %"]
    assert [share.split(": ")[1] for share in found["shares"]] == ["50.0 %", "50.0 %"]


def test_what_does_not_fit_is_listed(oracle: Oracle, tmp_path: Path) -> None:
    case, place = oracle["llama-tied-zero3"], tmp_path / "page.html"
    other = tmp_path / "other"
    other.mkdir()
    save_file({"x.weight": np.ones(2, np.float32)}, other / "model.safetensors")
    (other / "config.json").write_text('{"model_type": "llama"}')
    arguments = ["inspect", str(case.root), "--base", str(other), "--html", str(place)]
    assert run(command, arguments) == 1
    page = place.read_text(encoding="utf-8")
    assert "They do not fit." in page
    assert "Only in the base: 1" in page


def test_frozen_parts_are_summed(oracle: Oracle) -> None:
    page = contents_page(reshard.inspect(oracle["lora-zero2"].root))
    assert ", frozen" in page
    assert " frozen</span>" in page


def test_files_are_told_apart_by_their_folders(
    oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(case for case in oracle.values() if case.recipe.universal)
    monkeypatch.chdir(case.universal.parent)
    page = contents_page(reshard.inspect(case.universal.name))
    names = reshard.open(case.universal).catalog.entries
    told = [name for name in names if f"zero/{name}/fp32.pt" in page]
    assert len(told) > 1
    file = case.folder / "one.safetensors"
    save_file({"w": np.ones(2, np.float32)}, file)
    assert "one.safetensors: 100" in contents_page(reshard.inspect(file))


@needs_browser
def test_hostile_names_are_text_and_deep_ones_end(tmp_path: Path) -> None:
    evil = "<img src=x onerror=window.alerted=true>"
    names = [f"a.{evil}.q_proj.weight", ".".join("d" * 128), evil, "", "..", "q_proj.w"]
    (tmp_path / "model").mkdir()
    tensors = {name: np.full(2, n, np.float32) for n, name in enumerate(names)}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    page = contents_page(reshard.inspect(tmp_path / "model"))
    script = SCRIPT.replace('base: text("#base")', "alerted: window.alerted === true")
    found = probed(page, script, tmp_path)
    assert found["faults"] == []
    assert not found["alerted"]
    assert found["images"] == 0
    assert "<img src=x onerror=window" in found["modules"]
