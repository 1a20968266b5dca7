"""The documentation: complete, up to date, and true."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import runpy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import click
import numpy as np
import pytest
from safetensors.numpy import save_file

import reshard
from reshard import errors
from reshard.core.findings import CODES
from reshard.formats.info import every
from tests.test_imports import MODULES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])
MAKE_FINDINGS = runpy.run_path(str(DOCS / "make_findings.py"))
MAKE_CLI = runpy.run_path(str(DOCS / "make_cli.py"))
COMMANDS: Mapping[str, click.Command] = MAKE_CLI["commands"]()
CLASSES = [getattr(errors, name) for name in reshard.__all__ if name.endswith("Error")]
Array = np.ndarray[Any, np.dtype[Any]]
SINGLE = "model.safetensors"


def ones(*shape: int) -> Array:
    return np.ones(shape, np.float32)


class TestCommands:
    def test_the_reference_is_up_to_date(self) -> None:
        page = (DOCS / "cli.md").read_text(encoding="utf-8")
        assert page == MAKE_CLI["page"](), "run: python docs/make_cli.py"

    @pytest.mark.parametrize("name", COMMANDS)
    def test_each_command_and_option_has_words(self, name: str) -> None:
        command = COMMANDS[name]
        assert command.help
        options = [option for option in command.params if isinstance(option, click.Option)]
        assert [option.name for option in options if not option.help] == []

    @pytest.mark.parametrize("name", COMMANDS)
    def test_help_is_shown(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        COMMANDS[name].main(["--help"], prog_name=name, standalone_mode=False)
        shown = capsys.readouterr().out
        assert f"Usage: {name} " in shown
        assert "--help" in shown

    def test_no_other_script_is_installed(self) -> None:
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        scripts = project.split("[project.scripts]")[1].split("\n[")[0]
        names = re.findall(r"^(\w+) = ", scripts, re.MULTILINE)
        assert set(names) == {name.split()[0] for name in COMMANDS}


class TestFindings:
    CODE = "".join(path.read_text("utf-8") for path in MODULES.values())

    def test_the_page_is_up_to_date(self) -> None:
        page = (DOCS / "findings.md").read_text(encoding="utf-8")
        assert page == MAKE_FINDINGS["page"](), "run: python docs/make_findings.py"

    def test_each_code_is_reported_somewhere_and_stands_in_order(self) -> None:
        assert [name for name in CODES if self.CODE.count(f'"{name}"') < 2] == []
        assert list(CODES) == sorted(CODES)

    def test_what_is_reported_has_its_line_in_the_table(self) -> None:
        reported = re.findall(r'\bFinding\(\s*"([a-z-]+)"', self.CODE)
        assert set(reported) <= CODES.keys()


class TestFormats:
    @pytest.mark.parametrize("name", every())
    def test_each_format_has_a_page_that_names_its_room(self, name: str) -> None:
        page = (DOCS / "formats" / f"{name}.md").read_text(encoding="utf-8")
        assert every()[name].module.replace(".", "/") in page
        assert "## On disk" in page

    @pytest.mark.parametrize("name", every())
    def test_each_room_opens_with_its_layout_and_where_it_was_read_off(self, name: str) -> None:
        words = importlib.import_module(every()[name].module).__doc__
        assert words
        assert "\n    " in words
        assert re.search(r"Read\s+off\b.*\d", words, re.DOTALL)


class TestTheLibrary:
    @pytest.mark.parametrize("name", [n for n in reshard.__all__ if n != "__version__"])
    def test_each_public_name_has_a_docstring(self, name: str) -> None:
        words = getattr(reshard, name).__doc__
        assert words
        # What dataclass writes by itself begins with the signature.
        assert not words.startswith(f"{name}(")

    @pytest.mark.parametrize("module", MODULES)
    def test_each_module_says_what_it_is_for(self, module: str) -> None:
        path = MODULES[module]
        assert re.match(r'r?"""\S', path.read_text(encoding="utf-8")), path

    @pytest.mark.parametrize(
        "module", [name for name, path in MODULES.items() if ">>> " in path.read_text("utf-8")]
    )
    def test_examples_in_docstrings_are_true(self, module: str) -> None:
        found: ModuleType = importlib.import_module(module)
        assert doctest.testmod(found).failed == 0


class TestLinks:
    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
    def test_relative_links_lead_somewhere(self, page: Path) -> None:
        for link in links(page):
            target, _, anchor = link.partition("#")
            path = page.parent / unquote(target) if target else page
            assert path.exists(), link
            if anchor and path.suffix == ".md":
                assert anchor in anchors(path), link


def prose(page: Path) -> str:
    """The page's text without what stands in fences."""
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> Iterator[str]:
    """The targets of the page's links and images that are no addresses."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"[a-z]+:", link):
            yield link


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def save(folder: str, **tensors: Array) -> None:
    """A small model folder."""
    Path(folder).mkdir()
    save_file({name.replace("_", "."): t for name, t in tensors.items()}, f"{folder}/{SINGLE}")
    Path(folder, "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")


def nothing_there() -> None:
    reshard.open("run/_actor")


def damaged() -> None:
    Path("damaged").mkdir()
    Path("damaged", SINGLE).write_bytes(b"\x10" + bytes(7) + b"is not a header.")
    reshard.open("damaged")


def shard_missing() -> None:
    Path("base").mkdir()
    index = {"weight_map": {"w": "model-00002-of-00002.safetensors"}}
    Path("base", f"{SINGLE}.index.json").write_text(json.dumps(index), encoding="utf-8")
    reshard.open("base")


def megatron() -> None:
    Path("iter_0000010").mkdir()
    stated = '{"sharded_backend": "zarr", "sharded_backend_version": 1}'
    Path("iter_0000010", "metadata.json").write_text(stated, encoding="utf-8")
    reshard.open("iter_0000010")


def other_names() -> None:
    save("trained", up_weight=ones(3, 2), extra_weight=ones(5))
    save("qwen", up_weight=ones(3, 2), model_norm_weight=ones(5, 1))
    reshard.convert("trained", "out", base="qwen")


def no_rounding() -> None:
    save("trained", w=ones(2))
    save("quantised", w=ones(2).astype("int8"))
    reshard.convert("trained", "out", base="quantised")


def idle_options() -> None:
    reshard.convert("trained", "out", srm_format="split", lora_alpha=16)


def output_exists() -> None:
    save("trained", w=ones(2))
    save("full", w=ones(2))
    reshard.convert("trained", "full", overwrite=True)


def too_large() -> None:
    save("trained", model_norm_weight=ones(4) * 70_000)
    reshard.convert("trained", "out", dtype="float16")


def unchanged() -> None:
    for folder in ("trained", "qwen"):
        save(folder, w=ones(2), b=ones(3))
    reshard.convert("trained", "out", base="qwen")


class TestErrors:
    PAGE = (DOCS / "errors.md").read_text(encoding="utf-8")

    @pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
    def test_each_class_is_described(self, error: type[Exception]) -> None:
        assert error.__doc__
        words = re.sub(r"(?<!^)([A-Z])", r" \1", error.__name__).lower().split()
        heading = "Reshard error" if words[0] == "reshard" else words[0].capitalize()
        heading = heading if words[:2] != ["not", "found"] else "Not found"
        section = self.PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
        assert f"`{error.__name__}`" in section
        assert f"(#{heading.lower().replace(' ', '-')})" in self.PAGE
        if error is not reshard.ReshardError:
            assert "```\n" in section
            assert "Fix: " in section

    def test_all_classes_are_public(self) -> None:
        classes = {value for value in vars(errors).values() if isinstance(value, type)}
        tree = {error for error in classes if issubclass(error, Exception)}
        assert tree == set(CLASSES)

    @pytest.mark.parametrize(
        ("error", "situation"),
        [
            (reshard.NotFoundError, nothing_there),
            (reshard.FormatError, damaged),
            (reshard.IncompleteError, shard_missing),
            (reshard.UnsupportedError, megatron),
            (reshard.NamesError, other_names),
            (reshard.PlanError, no_rounding),
            (reshard.OptionError, idle_options),
            (reshard.WriteError, output_exists),
            (reshard.VerificationError, too_large),
            (reshard.VerificationError, unchanged),
        ],
    )
    def test_the_messages_shown_are_what_reshard_says(
        self,
        error: type[reshard.ReshardError],
        situation: Callable[[], None],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(error) as caught:
            situation()
        said = str(caught.value).replace(f"{tmp_path}/", "")
        assert any(said.startswith(shown.strip()) for shown in self._messages()), said

    def _messages(self) -> list[str]:
        return re.findall(r"^```\n(.*?)^```", self.PAGE, re.DOTALL | re.MULTILINE)
