"""The documentation site: it is built without a warning, and its commands are ones that exist."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import click
import pytest

from reshard.cli.app import reshard as command
from tests.browser import browse, needs_browser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SCRIPTS: dict[str, click.Command] = runpy.run_path(str(DOCS / "make_cli.py"))["SCRIPTS"]
PAGES = [ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if path.stem != "cli")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed")
    place = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(place)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return place


class Loaded(HTMLParser):
    """What a page loads: styles, scripts, pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img"):
            self.found.append(given.get("src") or "")
        if tag == "link" and "stylesheet" in (given.get("rel") or ""):
            self.found.append(given.get("href") or "")


def test_every_page_is_in_the_site_and_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in DOCS.rglob("*.md"):
        built = site / page.relative_to(DOCS).with_suffix(".html")
        loaded = Loaded()
        loaded.feed(built.read_text(encoding="utf-8"))
        assert any(name.endswith(".css") for name in loaded.found)
        assert [name for name in loaded.found if re.match(r"(?:[a-z]+:)?//", name)] == []


def test_the_reference_has_the_options_of_each_function(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "api.html").read_text(encoding="utf-8"))
    for words in (
        "max_shard_size",
        "First map both onto the names of this Hugging Face model",
        "NamesError",
        "keep",
    ):
        assert words in text


@needs_browser
def test_the_site_in_a_browser(site: Path, tmp_path: Path) -> None:
    dom = browse(site / "index.html", tmp_path, "--dump-dom")
    assert 'data-md-color-scheme="default"' in dom
    dark = browse(
        site / "index.html", tmp_path, "--blink-settings=preferredColorScheme=0", "--dump-dom"
    )
    assert 'data-md-color-scheme="slate"' in dark


def commands(page: Path) -> Iterator[str]:
    """The command lines of a page: in fences, and in code of a table or a sentence."""
    text = page.read_text(encoding="utf-8")
    for fence in re.findall(r"^```(?:bash|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        joined = fence.replace("\\\n", " ")
        for line in joined.splitlines():
            found = re.match(r"(?:\$ )?(?:python \S*/)?((?:reshard|\w+\.py) .*)", line)
            if found and found[1].split()[0].removesuffix(".py") in ("reshard", *SCRIPTS):
                yield found[1]
    for code in re.findall(r"`(reshard [a-z]+ [^`\n]*)`", text):
        if not re.search(r"\.\.\.|\{", code):
            yield code


def parsed(line: str) -> tuple[click.Command | None, list[str]]:
    """The command of a line and what it is given; None for `reshard` with a flag alone."""
    name, *given = shlex.split(line, comments=True)
    if name != "reshard":
        return SCRIPTS[name.removesuffix(".py")], given
    if given[0].startswith("-"):
        return None, given
    found = command.get_command(click.Context(command), given[0])
    assert found is not None, line
    return found, given[1:]


CASES = [(page, line) for page in PAGES for line in dict.fromkeys(commands(page))]


@pytest.mark.parametrize(
    ("page", "line"), CASES, ids=[f"{page.stem}: {line}" for page, line in CASES]
)
def test_the_commands_of_the_pages_are_ones_that_exist(page: Path, line: str) -> None:
    found, given = parsed(line)
    if found is None:
        return
    if any(word in ("--help", "COMMAND", "TOPIC") for word in given):
        return
    # A shell makes several paths of a pattern; a sentence may name a command by its flag alone.
    given = [word for name in given for word in ([name, name] if "*" in name else [name])]
    if given[-1].startswith("--") and any(given[-1] in option.opts for option in found.params):
        return
    with contextlib.suppress(click.MissingParameter):
        assert found.make_context(str(found.name), given).params
